"""File systems of a few pages in memory, which fill up as a disk does."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, n_kib: int) -> Iterator[Path]:
    """A tmpfs of n_kib in a new folder; the test is skipped where mounting is not allowed."""
    folder.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={n_kib}k", "tmpfs", str(folder)]
    try:
        is_mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    if not is_mounted:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def grow(folder: Path, n_kib: int) -> None:
    """Give a small disk another size; what is on it stays."""
    subprocess.run(["mount", "-o", f"remount,size={n_kib}k", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """File that takes all the room that is left on a small disk."""
    file = folder / "other"
    with file.open("wb", buffering=0) as other, suppress(OSError):
        while True:
            other.write(bytes(4096))
    return file
