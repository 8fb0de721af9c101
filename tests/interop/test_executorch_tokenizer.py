"""Tokenizers as ExecuTorch's runner reads them: byte-level BPE alike, and what is read in another way is said."""

from pathlib import Path

import pytest

from minitune.interop.executorch_tokenizer import notes
from minitune.io import paths
from minitune.text.chat import open_template
from minitune.text.tokenizer import open_tokenizer
from support.gguf_tokenizers import CUTS, byte_level_folder, sentencepiece_folder, sentencepiece_json_folder

pytestmark = pytest.mark.reference


def notes_on(folder: Path) -> list[str]:
    tokenizer = open_tokenizer(folder)
    return notes(folder, tokenizer, open_template(folder, tokenizer))


@pytest.mark.parametrize("name", CUTS)
def test_byte_level_tokenizers_are_read_alike(name: str, tmp_path: Path) -> None:
    cut, ignore_merges = CUTS[name]
    assert notes_on(byte_level_folder(tmp_path, cut, ignore_merges)) == []


def test_the_demo_is_read_alike() -> None:
    assert notes_on(paths.locate("demo")) == []


def test_what_the_runner_reads_in_another_way_is_said(tmp_path: Path) -> None:
    for name in ("model", "json", "none"):
        (tmp_path / name).mkdir()
    # chat tokens that are no pieces of the sentencepiece model
    (line,) = notes_on(sentencepiece_folder(tmp_path / "model"))
    assert "runner reads tokenizer.model in another way: its tokens of a prompt differ from minitune's from '<|im_" in line
    (line,) = notes_on(sentencepiece_json_folder(tmp_path / "json"))
    assert "runner can't read tokenizer.json (Failed to load HF tokenizer)" in line
    tokenizer = open_tokenizer(paths.locate("demo"))
    (line,) = notes(tmp_path / "none", tokenizer, open_template(paths.locate("demo"), tokenizer))
    assert "has no tokenizer.json and no tokenizer.model, one of which ExecuTorch's runner reads" in line
