"""Bytes by which a process grows while it multiplies bfloat16 matrices of 600 shapes: kernel_cache.py bounded|free."""

import os
import sys

import torch

from minitune import host
from minitune.programs.allocator import bound_kernel_cache

for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # a run in the parent has set them
    os.environ.pop(name, None)
if sys.argv[1] == "bounded":
    bound_kernel_cache()


def multiply(n: int) -> None:
    """Product of matrices of n rows, as one of attention's blocks is."""
    x = torch.ones(4, n, 16, dtype=torch.bfloat16)
    torch.bmm(x, x.mT)


for n in range(1, 130):  # as many as the bounded cache holds
    multiply(n)
before = host.peak_bytes()
for n in range(130, 730):
    multiply(n)
print(host.peak_bytes() - before)
