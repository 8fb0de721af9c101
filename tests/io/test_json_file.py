"""JSON files: what is read, and the one sentence for what is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from minitune.errors import InputError
from minitune.io.json_file import read_json, read_json_object


def test_characters_are_read_in_every_spelling_and_infinity_too(tmp_path: Path) -> None:
    content = {"\U0001f600": ["\U0001f600", "\u00fc", {"x": float("inf")}]}
    for text in (json.dumps(content), json.dumps(content, ensure_ascii=False), json.dumps(content).replace("\\ud83d", "\\uD83D")):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        assert read_json_object(tmp_path / "a.json", "tests") == content


@pytest.mark.parametrize("odd", ["\\ud800", "\\uDC00", "\\udc00\\ud800", "\\ud83dx\\ude00"])
@pytest.mark.parametrize("shape", ['{{"a{}": 1}}', '{{"a": ["{}"]}}', '{{"a": {{"b": "x{}"}}}}'])
def test_half_of_a_surrogate_pair_is_refused_wherever_it_stands(odd: str, shape: str, tmp_path: Path) -> None:
    """No tokenizer takes it and no file can hold it again."""
    (tmp_path / "a.json").write_text(shape.format(odd), encoding="utf-8")
    with pytest.raises(
        InputError, match=r"tests: .*a\.json can't be read \(a string holds half of a surrogate pair, which is no"
    ):
        read_json(tmp_path / "a.json", dict[str, Any], "tests", "mend it")
