"""JSON files, read with one message for whatever is wrong with them."""

from pathlib import Path
from typing import TypeVar

import msgspec

from minitune.errors import InputError

T = TypeVar("T")


def read_json(path: Path, kind: type[T], room: str, remedy: str) -> T:
    """Content of a file that holds one JSON object, decoded as `kind`.

    InputError, begun by `room` ("checkpoint") and ended by `remedy` ("download it again"), for a file that is missing, is no
    JSON, or holds something else.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{room}: {path} can't be read ({error}), expected a JSON object; {remedy}") from None
