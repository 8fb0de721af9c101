"""Names that a researcher imports: what help() prints of them can be read."""

import json

from support.paths import ROOT
from support.scripts import run_script

PAGES = (ROOT / "README.md", ROOT / "docs/research.md")


def test_signatures_are_made_of_named_types() -> None:
    """In a process without checked signatures, whose annotations are as they were written."""
    signatures = json.loads(run_script("signatures_printed", *map(str, PAGES)))
    assert {"minitune.steps.kto_step", "minitune.models.load", "minitune.tree.map", "minitune.lora.Lora.init"} <= {*signatures}
    for name, (whole, *parts) in signatures.items():
        # ranges of numbers stand in the constructors of structs, such as betas of AdamW
        width = 140 if "msgspec.Meta" in whole else 100
        wide = [part for part in parts if len(part) > width]
        assert not wide, f"{name}: name the types of {wide}"
        is_class = name.rpartition(".")[2][0].isupper()
        assert is_class or len(whole) <= 400, f"{name}{whole}"
