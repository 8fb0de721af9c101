"""seq_len = "auto": as long as the longest row, bounded, decided by the one pass that tokenizes."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from minitune.data import preference, row_lengths, supervised
from minitune.data.row_lengths import MOST_TOKENS, length_line, rounded, with_length
from minitune.data.source import Source
from minitune.errors import InputError
from minitune.text.chat import CHATML
from minitune.text.template import compile_template
from support.tokenizers import WORDS, llama

TEXT = llama()[0], compile_template(CHATML, {"eos_token": "</s>"}, "chatml")


def written(folder: Path, lengths: list[int], **more: Any) -> Source:
    """A table of rows whose answers have so many words."""
    words = [" ".join(WORDS[(i + j) % 7] for j in range(n)) for i, n in enumerate(lengths)]
    rows = [{"text": text} for text in words]
    if more["format"] == "pairs":
        rows = [{"prompt": "Which?", "chosen": text, "rejected": f"{text} {WORDS[3]}"} for text in words]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(path), **more)


def n_tokens(source: Source) -> list[int]:
    """Tokens of every document, by a pass of the test's own."""
    if source.format == "pairs":
        rows = preference.tokenized(source, *TEXT)
        return [len(tokens.ids) for _, answers in rows for tokens, _ in answers]
    return [len(tokens.ids) for _, tokens in supervised.tokenized(source, *TEXT)]


@pytest.mark.parametrize("format", ["text", "pairs"])
@pytest.mark.parametrize("overlong", ["drop", "truncate"])
@pytest.mark.parametrize("most", [MOST_TOKENS, 130])
def test_the_longest_row_decides_and_the_tokens_are_there_already(
    format: str, overlong: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path, [3, 137, 40, 21], format=format, packed=False, overlong=overlong)
    kind = preference if format == "pairs" else supervised
    longest = max(n_tokens(source))
    assert 130 < longest < MOST_TOKENS

    decided, report = with_length(source, *TEXT, tmp_path / "cache", most)

    assert decided.seq_len == (130 if most == 130 else 64 * math.ceil(longest / 64))
    assert report.longest == longest
    expected = kind.prepare(decided, *TEXT, tmp_path / "fresh")
    writers = [name for name in dir(kind) if name.startswith("_write")]
    for name in writers:  # whatever tokenizes from here on fails
        monkeypatch.setattr(kind, name, lambda *_: pytest.fail("tokenized a second time"))
    found = kind.prepare(decided, *TEXT, tmp_path / "cache")
    for name in ("tokens", "mask", "offsets"):
        both = [getattr(getattr(one, "answers", one), name) for one in (expected, found)]
        np.testing.assert_array_equal(*both)
    assert found.report == expected.report
    assert with_length(source, *TEXT, tmp_path / "cache", most)[0] == decided


def test_a_line_says_what_is_cut_and_how_to_have_it_whole(tmp_path: Path) -> None:
    source = written(tmp_path, [3, 177, 160], format="text", packed=False, overlong="truncate")
    long = max(n_tokens(source))
    decided, report = with_length(source, *TEXT, tmp_path / "cache", 2048)
    assert (
        length_line("train", decided, report)
        == f'data.train.seq_len = {decided.seq_len} ("auto"): the longest row has {long} tokens'
    )
    cut, report = with_length(source, *TEXT, tmp_path / "cache", 100)
    assert length_line("train", cut, report) == (
        f'data.train.seq_len = 100 ("auto"): 2 rows are longer and cut, the longest row has {long} tokens; '
        "the most that it takes is 4,096, or the positions of the model; write data.train.seq_len for another"
    )
    split = msgspec.structs.replace(source, overlong="split")
    parted, report = with_length(split, *TEXT, tmp_path / "cache", 100)
    assert parted.seq_len == 100
    assert "2 rows are longer and split; the most" in length_line("train", parted, report)


@pytest.mark.parametrize(
    ("longest", "packed", "most", "expected"),
    [
        (1, False, 4096, 64),
        (64, False, 4096, 64),
        (65, False, 4096, 128),
        (9000, False, 4096, 4096),
        (65, False, 100, 100),
        (5, True, 4096, 1024),
        (1025, True, 4096, 1088),
        (5, True, 512, 512),
    ],
)
def test_lengths_are_rounded_up_and_bounded(longest: int, packed: bool, most: int, expected: int) -> None:
    assert rounded(longest, packed, most) == expected
    assert Source(path="x", format="text").seq_len == row_lengths.AUTO


def test_outside_of_a_program_a_length_is_a_number(tmp_path: Path) -> None:
    source = written(tmp_path, [3], format="text")
    with pytest.raises(
        InputError, match=r'data: .*rows.jsonl has seq_len = "auto", expected a number outside of a program; write one'
    ):
        supervised.prepare(source, *TEXT, tmp_path / "cache")
