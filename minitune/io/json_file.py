"""JSON files, read with one message for whatever is wrong with them."""

import json
from pathlib import Path
from typing import Any

import msgspec

from minitune.errors import InputError
from minitune.io.paths import is_present


def read_json(path: Path, kind: Any, room: str, remedy: str) -> Any:
    """Content of a file that holds one JSON object, decoded as `kind`, a type or a generic such as dict[str, Any].

    InputError, begun by `room` ("checkpoint") and ended by `remedy` ("download it again"), for a file that
    can't be read, that is no JSON or no text, or that holds something else.
    """
    try:
        # json reads the Infinity that transformers writes into some config.json; msgspec.json refuses it
        return msgspec.convert(json.loads(path.read_bytes()), kind)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{room}: {path} can't be read ({error}), expected a JSON object; {remedy}") from None


def read_json_object(path: Path, room: str, *, optional: bool = False) -> dict[str, Any]:
    """JSON object in a file; {} if it may be absent (optional) and is; InputError as read_json raises it."""
    if optional and not is_present(path):
        return {}
    return read_json(path, dict[str, Any], room, "fetch the file again")
