"""Cache verb: what the cache of tokenized data holds, and how it is emptied."""

import sys
import time
from collections.abc import Sequence

from minitune.cli.command_result import CommandResult
from minitune.errors import InputError
from minitune.io import paths
from minitune.io.array_cache import remove_unfinished
from minitune.io.cache_size import LIMIT_BYTES, entries, remove
from minitune.io.units import format_bytes


def cache(words: Sequence[str]) -> CommandResult:
    """Print where the cache is and how large, or empty it; returns the same figures."""
    if list(words) not in ([], ["clear"]):
        raise InputError(f"cache: {' '.join(words)!r} is unknown, expected cache or cache clear")
    folder = paths.cache()
    there = entries(folder)
    if words:
        remove_unfinished(folder)
        gone = remove(there)
        n_bytes = sum(entry.n_bytes for entry in gone)
        size = format_bytes(n_bytes)
        sys.stdout.write(f"{folder}: {len(gone)} of {len(there)} folders removed, {size}\n")
        return CommandResult({"path": str(folder), "folders_removed": len(gone), "bytes": n_bytes})
    n_bytes = sum(entry.n_bytes for entry in there)
    size, limit = format_bytes(n_bytes), format_bytes(LIMIT_BYTES)
    sys.stdout.write(f"{folder}: {len(there)} folders, {size}; beyond {limit} the oldest go\n")
    if there:
        day = time.strftime("%Y-%m-%d", time.localtime(there[0].used_s))
        sys.stdout.write(f"the oldest was last used on {day}; `cache clear` removes all\n")
    return CommandResult({"path": str(folder), "folders": len(there), "bytes": n_bytes})
