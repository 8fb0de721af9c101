"""A block whose backward has no kernel runs as it is."""

import torch
from torch._inductor.lowering import register_lowering

from minitune.models.compile import wrap
from support.scripts.blocks import said, same


@torch.library.custom_op("tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    """2 x, with the gradient sin(d)."""
    return x * 2


twice.register_fake(torch.empty_like)
twice.register_autograd(lambda ctx, d: d.sin())


@register_lowering(torch.ops.aten.sin.default)
def no_kernel(x: object) -> None:
    """As on a card that is too small."""
    raise RuntimeError("needs 132 KiB of shared memory, the card has 99")


x = torch.full((3,), 0.5, requires_grad=True)
block = wrap(said.append)(lambda x: twice(x * 3))
for _ in range(2):
    same(block(x), x * 6)
    same(torch.autograd.grad(block(x), x, torch.ones(3)), (torch.ones(3).sin() * 3,))
print(len(said), said[0])
