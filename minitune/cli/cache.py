"""Cache verb: what the cache of tokenized and fetched data holds, and how it is emptied."""

import sys
import time
from collections.abc import Sequence

from minitune.cli.command_result import CommandResult
from minitune.errors import InputError
from minitune.io import paths
from minitune.io.array_cache import remove_unfinished
from minitune.io.cache_size import LIMIT_BYTES, CachedFolder, downloads, entries, remove
from minitune.io.units import format_bytes


def cache(words: Sequence[str]) -> CommandResult:
    """Print where the cache is and how large, or empty it; returns the same figures."""
    if list(words) not in ([], ["clear"]):
        raise InputError(f"cache: {' '.join(words)!r} is unknown, expected cache or cache clear")
    folder = paths.cache()
    there, fetched = entries(folder), downloads(folder)
    if words:
        remove_unfinished(folder)
        unwanted = [*there, *fetched]
        gone = remove(unwanted)
        sys.stdout.write(
            f"{folder}: {len(gone)} of {len(unwanted)} folders removed, {_size(gone)}\n"
        )
        found = {"path": str(folder), "folders_removed": len(gone), "bytes": _n_bytes(gone)}
        return CommandResult(found)
    limit = format_bytes(LIMIT_BYTES)
    sys.stdout.write(
        f"{folder}: {len(there)} folders, {_size(there)}; beyond {limit} the oldest go\n"
    )
    if fetched:
        what = f"data sets and models that were fetched: {len(fetched)}, {_size(fetched)}"
        sys.stdout.write(f"{what}; they stay until `cache clear`\n")
    if there:
        day = time.strftime("%Y-%m-%d", time.localtime(there[0].used_s))
        sys.stdout.write(f"the oldest was last used on {day}; `cache clear` removes all\n")
    kept = [*there, *fetched]
    return CommandResult({"path": str(folder), "folders": len(kept), "bytes": _n_bytes(kept)})


def _n_bytes(folders: Sequence[CachedFolder]) -> int:
    return sum(entry.n_bytes for entry in folders)


def _size(folders: Sequence[CachedFolder]) -> str:
    return format_bytes(_n_bytes(folders))
