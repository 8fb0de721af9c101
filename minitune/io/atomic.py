"""Files and folders that are written whole or not at all, and the room that their disk has."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minitune.errors import DiskFullError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# ends of names that exist only while something is replaced
NEW, OLD, GONE = ".minitune-new", ".minitune-old", ".minitune-gone"


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash at any instant, meets the old content or the new
    one and nothing between.
    """
    with atomic_file(path) as aside:
        aside.write_bytes(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """File to write, which takes the place of `path` when the block ends without an error;
    InputError for a full disk.
    """
    aside = unfinished(path)
    with disk_full_is_input_error(path):
        try:
            yield aside
            sync(aside)
            aside.replace(path)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
        _sync_committed(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Folder to fill, which takes the place of `path` when the block ends without an error; an
    older one is replaced.

    Whoever calls this knows that the older one may go; results.result_folder finds it out.
    InputError for a full disk.
    """
    aside, old = unfinished(path), path.with_name(f".{path.name}{OLD}")
    shutil.rmtree(aside, ignore_errors=True)
    recover_replaced(old)
    with disk_full_is_input_error(path):
        create_folder(aside.parent)
        aside.mkdir()
        try:
            yield aside
            sync_tree(aside)
            # No system renames a folder over one that holds files, and Windows renames none over an
            # empty one.
            if path.exists():
                path.rename(old)
            aside.rename(path)
            _sync_committed(path.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            if path.exists():
                # What is committed is no failure any more: an older one that can't be removed now
                # goes later.
                with suppress(OSError):
                    recover_replaced(old)
            else:
                recover_replaced(old)


def unfinished(path: Path) -> Path:
    """Place where a file or folder is written before it takes the place of `path`."""
    return path.with_name(f".{path.name}{NEW}")


def create_folder(path: Path) -> None:
    """Make a folder and those above it, and flush the name of each to the disk."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in missing:
        _sync_committed(place.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a crash at any instant leaves it whole or none of that name."""
    gone = path.with_name(f".{path.name}{GONE}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def recover_replaced(old: Path) -> None:
    """Finish an interrupted replacement: restore the older folder if no newer one came to its
    place, else remove it.
    """
    path = old.with_name(old.name[1:].removesuffix(OLD))
    if old.exists() and not path.exists():
        old.rename(path)
    elif old.exists():
        remove_folder(old)


def sync_tree(folder: Path) -> None:
    """Flush every file in a folder, and the names in it and in the folders below, to the disk."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; on Windows, which opens no folder, only
    files are flushed.
    """
    if path.is_dir():
        if sys.platform == "win32":
            return
        handle = os.open(path, os.O_RDONLY)
    else:
        handle = os.open(path, os.O_RDWR)  # Windows flushes only what may be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_committed(folder: Path) -> None:
    """Flush the names in a folder where the file system can; the rename before it has already
    happened."""
    with suppress(OSError):
        sync(folder)


def link(source: str | Path, target: str | Path) -> None:
    """Give a file, which nothing writes to again, a second name; a copy where the disk has no
    links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def free_bytes(path: Path) -> int:
    """Bytes that can be written where a path lies or will lie."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def require_room(path: Path, n_bytes: int, what: str) -> None:
    """InputError with the bytes needed and free if n_bytes do not fit where a path will lie."""
    free = free_bytes(path)
    if n_bytes > free:
        raise DiskFullError(
            f"io: {path} needs {n_bytes:,} bytes for {what}, its disk has {free:,} free, expected "
            "at least as many; free some space, or choose another folder"
        )


@contextmanager
def disk_full_is_input_error(path: Path) -> Iterator[None]:
    """Turn a full disk, met while a path is written, into an InputError that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise DiskFullError(
            f"io: {path} does not fit on its disk, where {free_bytes(path):,} bytes are free, "
            "expected more; what was there before is as it was. Free some space and run the same "
            "command again"
        ) from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write indented JSON; for files in a folder that atomic_folder replaces as a whole."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
