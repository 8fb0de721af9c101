"""SHA-256 of files, kept beside them, so that one changed bit is found when they are read."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from minitune.io.atomic import write_json

CHECKSUMS = "checksums.json"
SEAL = "seal"  # key of a JSON object that holds the hash of all its other keys


class Checksum(msgspec.Struct, frozen=True):
    """Size in bytes and SHA-256 of a file."""

    bytes: int
    sha256: str


def checksum(file: Path) -> Checksum:
    """Checksum of a file of any size, read at the speed of the disk."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    return Checksum(file.stat().st_size, digest.hexdigest())


def write_checksums(folder: Path, files: Iterable[Path]) -> None:
    """Write checksums.json, with an entry for each of some files in a folder."""
    entries = {file.name: msgspec.to_builtins(checksum(file)) for file in sorted(files)}
    write_json(folder / CHECKSUMS, sealed(entries))


def damaged_file(folder: Path) -> str | None:
    """Name of the first file in a folder that is not what its checksums.json says; None if all are.

    A checksums.json that is missing, cut short or changed is itself the damaged file.
    """
    try:
        content = json.loads((folder / CHECKSUMS).read_bytes())
        entries = msgspec.convert(unsealed(content), dict[str, Checksum])
    except (OSError, ValueError, RecursionError):
        return CHECKSUMS
    for name, expected in entries.items():
        try:
            is_whole = checksum(folder / name) == expected
        except OSError:
            is_whole = False
        if not is_whole:
            return name
    return None


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON object with one more key, the hash of all the others."""
    return {**content, SEAL: _seal(content)}


def unsealed(content: Any) -> dict[str, Any]:
    """JSON object without its seal; ValueError if it is no object, or is not what was sealed."""
    if not isinstance(content, dict) or SEAL not in content:
        raise ValueError("it has no seal")
    rest = {key: value for key, value in content.items() if key != SEAL}
    if _seal(rest) != content[SEAL]:
        raise ValueError("its content does not match its seal")
    return rest


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
