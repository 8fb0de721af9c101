"""docs/mixers.md lists what a mixer declares, and its paths are there."""

import re

from minitune.models.mixers.mixer import Mixer
from support.paths import ROOT


def test_the_page_on_mixers_lists_what_a_mixer_declares() -> None:
    page = (ROOT / "docs/mixers.md").read_text("utf-8")
    assert re.findall(r"^\| `(\w+)\(", page, re.M) == list(Mixer._fields)
    for path in re.findall(r"`((?:models|tests)/[\w/]+(?:\.py|/))`", page):
        assert (ROOT / path).exists() or (ROOT / "minitune" / path).exists(), path
