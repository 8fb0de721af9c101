"""Number of page faults of allocations that come again; the word says whether what is freed is kept."""

import resource
import sys

import torch

from minitune.programs.allocator import keep_freed

if sys.argv[1] == "kept":
    assert keep_freed()


def faults() -> int:
    """Page faults of this process so far, after five rounds of allocations."""
    for _ in range(5):
        torch.zeros(48 * 2**18).add(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


faults()
faults()
before = faults()
print(faults() - before)
