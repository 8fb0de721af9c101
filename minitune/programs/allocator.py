"""Settings of a process that trains: memory that a step gives back, kernels it compiles."""

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt, as glibc's malloc.h numbers them
KEPT = 2**30  # bytes
KERNELS = "64"  # that oneDNN keeps, and as many of torch's own descriptions of them


def keep_freed() -> bool:
    """Let this process keep up to 1 GiB of memory that it freed, for its next allocations; False if
    the C library can't.

    By default glibc gives large blocks back to the kernel, which clears every page of the next
    ones: on a CPU a tenth of a step. For whoever owns the process, as `python -m minitune` does;
    peak memory stays, but for holes between blocks.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return (
        mallopt is not None
        and bool(mallopt(TRIM_THRESHOLD, KEPT))
        and bool(mallopt(MMAP_THRESHOLD, KEPT))
    )


def bound_kernel_cache() -> None:
    """Let oneDNN keep 64 compiled kernels, not 1,024, unless the environment says otherwise.

    It compiles one for every shape of a bfloat16 product, and packed rows bring ever new ones into
    attention's blocks: with 1,024 a process grows for hundreds of steps. This takes effect only
    before the first product of a process.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, KERNELS)
