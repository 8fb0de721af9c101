"""Bytes by which a process grows while it multiplies bfloat16 matrices of 600 shapes: kernel_cache.py bounded|free."""

import sys

import torch

from minitune import host
from minitune.programs.allocator import bound_kernel_cache

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
