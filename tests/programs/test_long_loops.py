"""Loops over all weights say how far they are where they take long."""

import re
from itertools import count
from pathlib import Path

import pytest
from gguf import GGUFReader
from safetensors import safe_open

from minitune.programs import progress
from support.programs import LORA, NF4, ONE_STEP, start

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


INT8 = '[[stage]]\nop = "quantize"\nscheme = { kind = "int8" }\n'
MERGE = '[[stage]]\nop = "merge"\n'


def test_merging_and_exporting_say_how_far_they_are(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seconds = count(0, progress.LINE_EVERY_S)
    monkeypatch.setattr(progress, "monotonic", lambda: next(seconds))
    formats = {"onnx": MERGE, "gguf": "", "compressed-tensors": INT8}
    exports = [f'{before}[[stage]]\nop = "export"\nname = "{one}"\nformat = "{one}"\n' for one, before in formats.items()]
    assert start(tmp_path, tiny, LORA + ONE_STEP + "".join(exports)) == 0
    lines = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    with safe_open(tmp_path / "p/compressed-tensors/model.safetensors", "pt") as file:
        n_compressed = len(file.keys())
    n_gguf = len(GGUFReader(tmp_path / "p/model.gguf").tensors)
    totals = {"merge: merging": 20, "onnx: writing": 2, "gguf: writing": n_gguf, "compressed-tensors: writing": n_compressed}
    for title, total in totals.items():
        assert [line for line in lines if re.match(rf"{title} \d", line)] == [f"{title} {n}/{total}" for n in range(1, total + 1)]
