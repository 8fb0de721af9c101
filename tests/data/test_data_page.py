"""The samples of docs/data.md are rows of the formats that they stand under."""

import json
import re
from pathlib import Path

import pytest

from minitune.data import preference, supervised
from minitune.data.source import PREFERENCE_FORMATS, Source
from minitune.text.chat import PLAIN
from minitune.text.template import compile_template
from support.paths import ROOT
from support.tokenizers import with_special_tokens

PAGE = (ROOT / "docs/data.md").read_text("utf-8")
SAMPLES = [
    (name, row)
    for name, block in re.findall(r'`format = "(\w+)"`.*?```jsonl\n(.*?)```', PAGE, re.S)
    for row in block.splitlines()
]
KEYS = re.findall(r"^\| `(\w+) = ", PAGE, re.M)
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TOKENIZER, _ = with_special_tokens(NAMES, ["<s>", "</s>", "<|user|>", "<|system|>", "<|assistant|>", "<|end|>"])


def test_every_format_has_its_sample() -> None:
    assert {name for name, _ in SAMPLES} == {"instruct", "chat", "text", "pairs", "unpaired"}


@pytest.mark.parametrize(("name", "row"), SAMPLES, ids=[f"{name} {i}" for i, (name, _) in enumerate(SAMPLES)])
def test_a_sample_is_a_row_of_its_format(name: str, row: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([row, row.replace("pears", "plums").replace("poires", "prunes")]), encoding="utf-8")
    prepare = preference.prepare if name in PREFERENCE_FORMATS else supervised.prepare
    dataset = prepare(Source(str(path), name, 256), TOKENIZER, compile_template(PLAIN, NAMES, "test"), tmp_path)  # pyright: ignore[reportArgumentType]
    assert dataset.report.n_samples == 2
    assert json.loads(row)


def test_the_keys_of_the_page_are_keys_of_a_table() -> None:
    assert KEYS
    assert set(KEYS) <= set(Source.__struct_fields__)
