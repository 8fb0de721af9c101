"""JSON files, read with one message for whatever is wrong with them."""

from pathlib import Path
from typing import Any

import msgspec

from minitune.errors import InputError


def read_json(path: Path, kind: Any, room: str, remedy: str) -> Any:
    """Content of a file that holds one JSON object, decoded as `kind`.

    InputError, begun by `room` ("checkpoint") and ended by `remedy` ("download it again"), for a file that
    can't be read, that is no JSON or no text, or that holds something else.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{room}: {path} can't be read ({error}), expected a JSON object; {remedy}") from None


def read_json_object(path: Path, room: str, *, optional: bool = False) -> dict[str, Any]:
    """JSON object in a file; {} if it may be absent (optional) and is; InputError as read_json raises it."""
    if optional and not path.is_file():
        return {}
    return read_json(path, dict[str, Any], room, "fetch the file again")
