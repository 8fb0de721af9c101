"""Vocabulary: what turns text into token ids between special tokens."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minitune.errors import InputError


class AddedToken(NamedTuple):
    """A token that is looked for in a text before the vocabulary is; lstrip, rstrip: it swallows the whitespace there."""

    text: str
    id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False


class Vocabulary(NamedTuple):
    """What tokenizes text between added tokens, and what its file declares.

    ids(text, opens): opens = the text opens a document. text(ids, added): added = text by id. matches: the added tokens
    that ids finds in a text by itself. opening: the token that tokenizer.json puts in front of a text, "" for none, None where
    that file was not asked. prefix_everywhere: text after an added token gets the dummy prefix too.
    """

    size: int
    ids: Callable[[str, bool], list[int]]
    text: Callable[[list[int], Mapping[int, str]], str]
    id_of: Callable[[str], int | None]
    added: list[AddedToken]
    names: Mapping[str, str]
    matches: frozenset[str]
    opening: str | None
    prefix_everywhere: bool


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} without the file; InputError for anything else."""
    try:
        data = path.read_bytes() if path.is_file() else b"{}"
        value = json.loads(data)
        if b"\\ud" in data.lower():  # half a surrogate pair is JSON, but no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InputError(f"tokenizer: {path} is not JSON ({error}), expected an object; fetch the file again") from None
    if not isinstance(value, dict):
        raise InputError(f"tokenizer: {path} holds a {type(value).__name__}, expected an object; fetch the file again")
    return value
