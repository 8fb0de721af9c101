"""Loops over all weights say how far they are where they take long."""

import re
from itertools import count
from pathlib import Path

import pytest

from minitune.programs import progress
from support.programs import NF4, start

SAVE = '[[stage]]\nop = "save"\nwhat = "params"\n'


def test_loading_quantizing_and_writing_say_how_far_they_are(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seconds = count(0, progress.LINE_EVERY_S)  # each look at the clock is a line's time later
    monkeypatch.setattr(progress, "monotonic", lambda: next(seconds))
    assert start(tmp_path, tiny, SAVE + NF4) == 0
    lines = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    for title, total in (("loading", 20), ("save: writing", 20), ("quantize", 14)):
        assert [line for line in lines if re.match(rf"{title} \d", line)] == [f"{title} {n}/{total}" for n in range(1, total + 1)]
