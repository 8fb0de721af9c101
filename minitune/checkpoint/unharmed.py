"""Files of a training state, read only when their bytes are those that were written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from minitune.errors import InputError
from minitune.io.checksums import Checksum, checksum, unsealed
from minitune.io.state_files import META, SINGLE, StoredPart, read_parts, tensor_file, tensor_files
from minitune.sharding.ranks import Ranks


def unharmed_parts(path: Path, ranks: Ranks) -> tuple[dict[str, Any], dict[str, list[StoredPart]]]:
    """(meta, parts of each tensor) of a state whose bytes are those that were written.

    Each rank reads the bytes of its share of the files, and the headers of all.
    """
    try:
        meta = unsealed(json.loads((path / META).read_bytes()))
        expected = _expected(meta)
        found = {
            name: checksum(path / name)
            for i, name in enumerate(expected)
            if i % ranks.size == ranks.rank
        }
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"checkpoint: {path} can't be read ({error}); remove it to continue from the step "
            "before"
        ) from None
    for name, own in found.items():
        if own.sha256 != expected[name]:
            raise InputError(
                f"checkpoint: {path / name} does not match its sha256; remove {path} to continue "
                "from the step before"
            )
    files = [path / name for name in expected]
    if extras := sorted(set(tensor_files(path)) - set(files)):
        raise InputError(
            f"checkpoint: {extras[0]} is no file of the state beside it, expected those that "
            f"{META} names; move it away"
        )
    try:
        return meta, read_parts(files)
    except ValueError as error:
        raise InputError(
            f"checkpoint: {error}; remove {path} to continue from the step before"
        ) from None


def _expected(meta: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each file of a state, by name; ValueError for what no save wrote."""
    if "files" not in meta:
        return {SINGLE: str(meta.get("sha256"))}
    files = msgspec.convert(meta["files"], dict[str, Checksum])
    if [*files] != [tensor_file(i, len(files)) for i in range(len(files))]:
        raise ValueError(f"{META} names {', '.join([*files][:4])}, which are no files of a state")
    return {name: file.sha256 for name, file in files.items()}
