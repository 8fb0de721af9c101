"""Results of a run under paths that a user chose: a save replaces an earlier save, and never
anything else.

A folder that a save wrote holds `.minitune-files.json`, the list of its files, of those in folders
below it too. A single file has its list in `.NAME.minitune-files.json` in the same folder. PEFT,
transformers and llama.cpp ignore both.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from minitune.errors import InputError
from minitune.io.atomic import atomic_file, atomic_folder, write_atomic

MARKER = ".minitune-files.json"
# hashing larger files would delay every start: size and time tell them apart
HASHED_BELOW_BYTES = 64 * 2**20

Record = dict[str, Any]


class Result(NamedTuple):
    """Output of a stage: a path as the program has it, and what will lie there."""

    path: str
    kind: Literal["folder", "file"]


class _Marker(msgspec.Struct, frozen=True):
    """Records of the files that a save wrote; a file that was replaced has those of its last two
    contents.
    """

    files: dict[str, tuple[Record, ...]]


def file_record(file: Path) -> Record:
    """SHA-256 and size of a file, or size and time of a large one."""
    stat = file.stat()
    if stat.st_size >= HASHED_BELOW_BYTES:
        return {"bytes": stat.st_size, "time": iso_time(stat.st_mtime)}
    return hashed_record(file)


def hashed_record(file: Path) -> Record:
    """SHA-256 and size of a file of any size."""
    with file.open("rb") as stream:
        return {
            "sha256": hashlib.file_digest(stream, "sha256").hexdigest(),
            "bytes": file.stat().st_size,
        }


def iso_time(time_s: float) -> str:
    """Time in seconds since 1970 as ISO 8601, to the second."""
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds")


@contextmanager
def result_folder(path: Path) -> Iterator[Path]:
    """Folder to fill with files, which takes the place of `path` when the block ends without an
    error.

    InputError as require_replaceable raises it, before the block and again after it, and for a full
    disk.
    """
    require_replaceable(path, "folder")
    with atomic_folder(path) as aside:
        yield aside
        files = {file.relative_to(aside).as_posix(): file for file in _entries(aside)}
        marker = _Marker({name: (_saved_record(file),) for name, file in files.items()})
        _write(aside / MARKER, marker)
        require_replaceable(path, "folder")


@contextmanager
def result_file(path: Path) -> Iterator[Path]:
    """File to write, which takes the place of `path` when the block ends without an error; raises
    as result_folder does.
    """
    require_replaceable(path, "file")
    with atomic_file(path) as aside:
        yield aside
        require_replaceable(path, "file")
        # Both contents are recorded before the replacement: after a crash, whichever lies there is
        # known.
        before = [_saved_record(path)] if path.exists() else []
        _write(_marker_of(path), _Marker({path.name: (*before, _saved_record(aside))}))


def write_beside(result: Path, name: str, content: bytes) -> Path:
    """Write a file about a result: NAME in a folder, which counts as part of it from then on, or
    RESULT.NAME beside a single file. Returns where it lies.

    InputError where another file of that name lies, which no save wrote.
    """
    if not result.is_dir():
        path = result.with_name(f"{result.name}.{name}")
        with result_file(path) as aside:
            aside.write_bytes(content)
        return path
    path, marker = result / name, _read(result / MARKER)
    known = marker.files.get(name, ())
    if os.path.lexists(path) and not (path.is_file() and _is_recorded(path, known)):
        raise _refused(path, "was not written by minitune, or was changed after it")
    # both contents are recorded before the replacement, as in result_file
    record = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    _write(result / MARKER, _Marker({**marker.files, name: (*known[-1:], record)}))
    write_atomic(path, content)
    return path


def require_unharmed(folder: Path) -> None:
    """InputError if weights in a folder are not, bit for bit, what a save stage wrote there.

    The folder of another tool, which has no list of its files, is not checked.
    """
    for name, records in _read(folder / MARKER).files.items():
        file = folder / name
        if file.suffix != ".safetensors" or not file.is_file():
            continue
        known = [record.get("sha256") for record in records]
        if hashed_record(file)["sha256"] not in known:
            found = "is not what a save stage wrote there (its sha256 differs)"
            remedy = f"save it again, or delete {MARKER} if you changed the file yourself"
            raise InputError(f"results: {file} {found}, expected the same bytes; {remedy}")


def saved_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of each file that a save has just written at a path, by its name."""
    marker = path / MARKER if path.is_dir() else _marker_of(path)
    records = {name: found[-1] for name, found in _read(marker).files.items() if found}
    return {name: str(record["sha256"]) for name, record in records.items() if "sha256" in record}


def require_replaceable(path: Path, kind: Literal["folder", "file"]) -> None:
    """InputError unless nothing lies at a path, or an empty folder, or exactly what an earlier save
    wrote there.
    """
    place = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not place.is_dir():
        raise InputError(
            f"results: {path} would lie in {place}, which is no folder; choose another path"
        )
    if not os.path.lexists(path):
        return
    if path.is_symlink():
        raise _refused(path, "is a symbolic link", "give the path that it points to")
    if kind == "file":
        if not path.is_file():
            raise _refused(path, "is no file")
        if not _is_recorded(path, _read(_marker_of(path)).files.get(path.name, ())):
            raise _refused(path, "was not written by an export stage, or was changed after it")
    elif not path.is_dir():
        raise _refused(path, "is a file where a folder is to be written")
    else:
        _require_earlier_save(path)


def _require_earlier_save(folder: Path) -> None:
    files = _read(folder / MARKER).files
    for entry in _entries(folder):
        name = entry.relative_to(folder).as_posix()
        if name == MARKER and files:
            continue
        if name not in files or entry.is_symlink() or not entry.is_file():
            raise _refused(folder, f"holds {name}, which no save stage wrote")
        if not _is_recorded(entry, files[name]):
            raise _refused(folder, f"holds {name}, which was changed after it was saved")


def _entries(folder: Path) -> Iterator[Path]:
    """Files in a folder and in those below it, links and empty folders too."""
    for entry in sorted(folder.iterdir()):
        inner = [] if entry.is_symlink() or not entry.is_dir() else list(_entries(entry))
        yield from inner or [entry]


def _saved_record(file: Path) -> Record:
    """SHA-256, size and time of a file that is saved."""
    return {**hashed_record(file), "time": iso_time(file.stat().st_mtime)}


def _is_recorded(file: Path, records: Sequence[Record]) -> bool:
    """True if a file is one of those recorded: by its bytes, or by size and time if it is large."""
    found = file_record(file)
    return any(found.items() <= record.items() for record in records)


def _refused(
    path: Path, reason: str, advice: str = "choose another path, or move it away"
) -> InputError:
    return InputError(
        f"results: {path} {reason}, expected nothing there, or an earlier save of a run and no "
        f"more; {advice}"
    )


def _marker_of(path: Path) -> Path:
    """Marker of a single file."""
    return path.with_name(f".{path.name}{MARKER}")


def _read(path: Path) -> _Marker:
    """Marker; an empty one for a file that is missing or that no save wrote."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Marker)
    except (OSError, ValueError, RecursionError):
        return _Marker({})


def _write(path: Path, marker: _Marker) -> None:
    write_atomic(path, msgspec.json.format(msgspec.json.encode(marker), indent=2) + b"\n")
