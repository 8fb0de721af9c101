"""Errors of Inductor's kernels against plain sums in float64, as shares of the L2 norm: words KIND DEVICE DTYPE."""

import sys
from collections.abc import Callable

import torch

from minitune.nn.attention import flex
from minitune.nn.attention.attention import attention
from support.attention import plain, runs

kind, device, dtype = sys.argv[1], torch.device(sys.argv[2]), getattr(torch, sys.argv[3])
trains = device.type == "cuda"  # torch has no backward for the CPU, and no sum of exponentials, which sinks need
flex.serves = flex.serves if trains else lambda q, k, v: True
generator = torch.Generator().manual_seed(0)
keys = runs(kind, 3, 517, 200, 0.01, generator)
keys = type(keys)(*(x if isinstance(x, tuple) else x.to(device) for x in keys))
drawn = [torch.randn(*shape, generator=generator).to(device, dtype) for shape in [(3, n, 517, 64) for n in (6, 2, 2, 6)] + [(6,)]]
q, k, v, cotangent, sinks = drawn


def results(run: Callable[..., torch.Tensor], wide: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients, computed in this dtype."""
    leaves = [x.to(wide).requires_grad_(trains) for x in (q, k, v, *([sinks] if trains else []))]
    out = run(*leaves[:3], leaves[3] if trains else None)
    return [out, *(torch.autograd.grad(out, leaves, cotangent.to(wide)) if trains else [])]


@torch.compile(fullgraph=True)
def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """minitune's."""
    return attention(q, k, v, keys, scale=0.1, soft_cap=2.0, sinks=sinks)


def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """The definition."""
    return plain(q, k, v, keys, 0.1, 2.0, sinks)


for actual, wanted in zip(results(ours, dtype), results(theirs, torch.float64), strict=True):
    print(float(torch.linalg.vector_norm(actual.double() - wanted) / torch.linalg.vector_norm(wanted)))
