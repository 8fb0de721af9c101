"""Arrays in a folder whose name is a hash of all that they depend on: written once, whole or not at all, and memory-mapped."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from minitune.errors import InputError
from minitune.io.atomic import sync_tree


def key(*parts: Any) -> str:
    """Name of a cache folder: the SHA-256 of its JSON-able parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Folder beside `folder`, to fill, which gets its name when the block ends without an error.

    Another process that was faster wrote the same, so its folder stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
    try:
        yield aside
        sync_tree(aside)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def intact(folder: Path, expected: str) -> Iterator[None]:
    """Turns what goes wrong while a cache is read into an InputError that names its folder."""
    try:
        yield
    except (OSError, EOFError, ValueError, msgspec.DecodeError) as error:
        raise InputError(f"data: {folder} is damaged ({error}), expected {expected}; delete the folder") from None


def load(folder: Path, *names: str) -> list[np.ndarray]:
    """Arrays name.npy, memory-mapped; whatever numpy raises for a file that is missing or cut short."""
    return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]
