"""Size of the cache: what is in it, when that was last used, and how it stays below a limit."""

import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from minitune.io.atomic import remove_folder

LIMIT_BYTES = 50 * 2**30  # beyond which the folders that were used longest ago go
IN_USE_S = 24 * 3600.0  # a folder that was used so lately may be in use, and stays
# folders of a cache for what was fetched, data sets and models; their size has no limit
HUB, MODELS = "hub", "registered"
KEY = re.compile(
    r"[0-9a-f]{64}"
)  # name of any other folder of a cache: nothing else is ever removed


class CachedFolder(NamedTuple):
    """Folder of the cache with its size and the time of its last use [s since 1970]."""

    folder: Path
    n_bytes: int
    used_s: float


def entries(cache: Path) -> list[CachedFolder]:
    """Folders of a cache, the one that was used longest ago first."""
    found = []
    for folder in cache.iterdir() if cache.is_dir() else ():
        # another process may remove it meanwhile
        with suppress(OSError):
            if KEY.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
                n_bytes = sum(file.stat().st_size for file in folder.iterdir())
                found.append(CachedFolder(folder, n_bytes, folder.stat().st_mtime))
    return sorted(found, key=lambda entry: entry.used_s)


def downloads(cache: Path) -> list[CachedFolder]:
    """Folders of what was fetched from elsewhere, one for each data set and each model."""
    found = []
    homes = [home for home in (cache / HUB, cache / MODELS) if home.is_dir()]
    for folder in (folder for home in homes for folder in home.iterdir()):
        with suppress(OSError):
            if folder.is_dir() and not folder.is_symlink():
                files = [file for file in folder.rglob("*") if file.is_file()]
                n_bytes = sum(file.stat().st_size for file in files)
                found.append(CachedFolder(folder, n_bytes, folder.stat().st_mtime))
    return found


def remove(unwanted: Iterable[CachedFolder]) -> list[CachedFolder]:
    """Remove folders of a cache; returns those that are gone. A run that has them open goes on."""
    gone = []
    for entry in unwanted:
        with suppress(OSError):
            remove_folder(entry.folder)
            gone.append(entry)
    return gone


def keep_below(cache: Path, limit: int = LIMIT_BYTES) -> list[CachedFolder]:
    """Remove what was used longest ago until a cache holds at most so many bytes."""
    there = entries(cache)
    n_bytes, old = sum(entry.n_bytes for entry in there), []
    for entry in there:
        if n_bytes <= limit or time.time() - entry.used_s < IN_USE_S:
            break
        old.append(entry)
        n_bytes -= entry.n_bytes
    return remove(old)
