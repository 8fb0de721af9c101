"""JSON files, read with one message for whatever is wrong with them."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec

from minitune.errors import InputError, quoted
from minitune.io import git_lfs
from minitune.io.paths import is_present

# half of a character, as JSON escapes it; alone it is none
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: Path, kind: Any, room: str, remedy: str) -> Any:
    """Content of a file that holds one JSON object, decoded as `kind`, a type or a generic such as
    dict[str, Any].

    InputError, begun by `room` ("checkpoint") and ended by `remedy` ("download it again"), for a
    file that can't be read, that is no JSON or no text, or that holds something else.
    """
    if git_lfs.is_pointer(path):
        raise InputError(f"{room}: {path} {git_lfs.REMEDY}")
    try:
        return msgspec.convert(_decoded(path.read_bytes()), kind)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{room}: {path} can't be read ({quoted(error)}), expected a JSON object; {remedy}"
        ) from None


def _decoded(content: bytes) -> Any:
    """Value of JSON; ValueError for what is none, and for strings that are no text."""
    # json reads the Infinity that transformers writes into some config.json; msgspec refuses it
    value = json.loads(content)
    if SURROGATE.search(content):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            found = "a string holds half of a surrogate pair, which is no character"
            raise ValueError(found) from None
    return value


def read_json_object(path: Path, room: str, *, optional: bool = False) -> dict[str, Any]:
    """JSON object in a file; {} if it may be absent (optional) and is; InputError as read_json
    raises it.
    """
    if optional and not is_present(path):
        return {}
    return read_json(path, dict[str, Any], room, "fetch the file again")
