"""Settings of the C library's allocator: a training step asks for the same memory each time, and gives it back in between."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt, as glibc's malloc.h numbers them
KEPT = 2**30  # bytes


def keep_freed() -> bool:
    """Let this process keep up to 1 GiB of memory that it freed, for its next allocations; False if the C library can't.

    By default glibc gives large blocks back to the kernel, which clears every page of the next ones: on a CPU a tenth of a step.
    For whoever owns the process, as `python -m minitune` does; peak memory stays, but for holes between blocks.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(TRIM_THRESHOLD, KEPT)) and bool(mallopt(MMAP_THRESHOLD, KEPT))
