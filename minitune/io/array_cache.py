"""Arrays in a folder whose name is a hash of all that they depend on.

They are written once, whole or not at all, checked when they are opened, and memory-mapped.
"""

import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from minitune.errors import DiskFullError, InputError
from minitune.io.atomic import NO_ROOM, create_folder, free_bytes, link, remove_folder, sync_tree
from minitune.io.cache_size import keep_below
from minitune.io.checksums import CHECKSUMS, damaged_file, write_checksums

UNFINISHED = ".tmp-"  # begins the names of folders that are being filled: .tmp-HOST-PID-RANDOM
ABANDONED_S = 7 * 24 * 3600.0  # after which a folder that another machine was filling is given up
MOVE = "free some space, or move the cache: set XDG_CACHE_HOME to a folder on another disk"


def key(*parts: Any) -> str:
    """Name of a cache folder: the SHA-256 of its JSON-able parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def is_whole(folder: Path) -> bool:
    """True if a cache is there and every byte of it is what was written.

    A damaged one is removed, so that it is made again; InputError if that is not possible.
    """
    if not folder.is_dir():
        return False
    damaged = damaged_file(folder)
    if damaged is None:
        with suppress(OSError):
            os.utime(folder)  # the time of its last use
        return True
    try:
        remove_folder(folder)
    except OSError as error:
        raise InputError(
            f"data: {folder / damaged} is damaged, and the folder can't be removed ({error}), "
            "expected what was written; delete it, or set XDG_CACHE_HOME to another folder"
        ) from None
    return False


@contextmanager
def filling(folder: Path, n_bytes: int = 0) -> Iterator[Path]:
    """Folder beside `folder`, to fill, which gets its name when the block ends without an error.

    n_bytes: about what it will take; InputError, which says so, if the disk has less or gets full.
    Another process that was faster wrote the same, so its folder stays.
    """
    with _error_in_words(folder, n_bytes):
        create_folder(folder.parent)
        remove_unfinished(folder.parent)
        keep_below(folder.parent)
        if n_bytes > free_bytes(folder):
            raise OSError(errno.ENOSPC, "its disk is too full")
        prefix = f"{UNFINISHED}{socket.gethostname()}-{os.getpid()}-"
        aside = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
        try:
            yield aside
            write_checksums(aside, aside.iterdir())
            sync_tree(aside)
            try:
                aside.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def share(folder: Path, other: Path) -> None:
    """Make `other` a cache of the same files as `folder`, which take no second room; nothing if it
    is there."""
    if is_whole(other):
        return
    with filling(other) as unfinished:
        for file in folder.iterdir():
            if file.name != CHECKSUMS:
                link(file, unfinished / file.name)


def remove_unfinished(cache: Path) -> None:
    """Remove what killed processes were filling: those of this machine, and others after a week."""
    here = f"{UNFINISHED}{socket.gethostname()}-"
    for left in cache.glob(f"{UNFINISHED}*"):
        pid = left.name.removeprefix(here).partition("-")[0]
        is_ours = left.name.startswith(here) and pid.isdigit()
        if (is_ours and not _is_alive(int(pid))) or _age_s(left) > ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)


def zeros(path: Path, dtype: type[np.generic], shape: Sequence[int]) -> np.memmap:
    """Memory-mapped array of zeros, every byte of which has its place on the disk.

    A file with holes would end the process by SIGBUS when the disk gets full; this is an OSError.
    """
    values = np.lib.format.open_memmap(path, "w+", dtype, tuple(shape))
    n_bytes = path.stat().st_size
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        else:
            _fill(file.fileno(), n_bytes - values.nbytes, n_bytes)
    return values


@contextmanager
def intact(folder: Path, expected: str) -> Iterator[None]:
    """Turns what goes wrong while a cache is read into an InputError that names its folder."""
    try:
        yield
    except (OSError, EOFError, ValueError, msgspec.DecodeError) as error:
        raise InputError(
            f"data: {folder} is damaged ({error}), expected {expected}; delete the folder"
        ) from None


def load(folder: Path, *names: str) -> list[np.ndarray]:
    """Arrays name.npy, memory-mapped; whatever numpy raises for a missing or shortened file."""
    return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]


@contextmanager
def _error_in_words(folder: Path, n_bytes: int) -> Iterator[None]:
    """Turn an OSError, met while a cache is written, into an InputError with the way to move it."""
    try:
        yield
    except OSError as error:
        kind = DiskFullError if error.errno in NO_ROOM else InputError
        needs = f"needs about {n_bytes:,} bytes, and " if n_bytes else ""
        reason = error.strerror or str(error)
        raise kind(
            f"data: the cache {folder} {needs}can't be written ({reason}; "
            f"{_free(folder)} bytes are free), expected room for it; {MOVE}"
        ) from None


def _free(folder: Path) -> str:
    try:
        return f"{free_bytes(folder):,}"
    except OSError:
        return "an unknown number of"


def _is_alive(pid: int) -> bool:
    if not hasattr(os, "getpgid"):
        return True  # Windows, where a signal 0 would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _age_s(folder: Path) -> float:
    try:
        newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return 0.0
    return time.time() - newest


def _fill(handle: int, start: int, end: int) -> None:
    os.lseek(handle, start, os.SEEK_SET)
    while start < end:
        start += os.write(handle, bytes(min(2**20, end - start)))
