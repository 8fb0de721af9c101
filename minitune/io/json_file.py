"""JSON objects in files that came from elsewhere, with an error that names the file."""

import json
from pathlib import Path
from typing import Any

from minitune.errors import InputError


def read_json_object(path: Path, room: str, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in a file; {} if it may be absent (optional) and is.

    room: the word that a message begins with, such as "tokenizer". InputError for a file that can't be
    read, for anything but an object, and for text that is not Unicode.
    """
    if optional and not path.is_file():
        return {}
    try:
        data = path.read_bytes()
        value = json.loads(data)
        # Half of a surrogate pair is valid JSON, but no text that could be written or tokenized.
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{room}: {path} is not JSON ({error}), expected an object; fetch the file again") from None
    if not isinstance(value, dict):
        raise InputError(f"{room}: {path} holds a {type(value).__name__}, expected an object; fetch the file again")
    return value
