"""Blocks recomputed in the backward, whose inputs wait in the host's memory until then (Rhu et al.
2016, arXiv 1602.08124).

A block's input is all that `remat.remat` keeps of it. How a tensor travels is a Mover's business;
when, that of _Inputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitune import hardware
from minitune.autodiff.remat import flattened
from minitune.autodiff.remat import remat as autodiff_remat
from minitune.autodiff.value_and_grad import pullback, under_transform, value_of_arguments

Block = Callable[..., Tensor]


class Mover(NamedTuple):
    """Way in which a tensor leaves the device and returns. No call makes the host wait."""

    send: Callable[[Tensor], Any]  # begins a copy out; its source must live until it was waited for
    fetch: Callable[[Any], Any]  # begins a copy back of what was sent
    # lets what is computed from here on come after a copy, and returns its result
    wait: Callable[[Any], Tensor]


def side_stream(device: torch.device) -> Mover:
    """Mover of an accelerator with streams: copies to and from pinned memory on a side stream,
    during the computation.
    """
    side = hardware.side_stream(device)
    return Mover(
        lambda x: side.copied(x, torch.device("cpu")),
        lambda sent: side.copied(sent[0], device),
        side.wait,
    )


def remat(mover: Mover) -> Callable[[Block], Block]:
    """Transform of the blocks f(w, x, *rest) of a model into remat.remat of them whose inputs x the
    mover keeps.

    Made anew by every forward. Differentiable once. Where no gradient is wanted nothing moves, and
    under a functorch transform inputs stay where they are.
    """

    def with_offloading(f: Block) -> Block:
        plain, inputs = autodiff_remat(f), _Inputs(mover)

        def recomputed(w: Any, x: Tensor, *rest: Any) -> Tensor:
            flat, tensors = flattened(lambda x, w, *rest: f(w, x, *rest), (x, w, *rest))
            if under_transform() or not (
                torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
            ):
                return plain(w, x, *rest)
            return _Offloaded.apply(flat, inputs, *tensors)

        return recomputed

    return with_offloading


class _Inputs:
    # for the block inputs of one forward; its graph alone holds them
    def __init__(self, mover: Mover) -> None:
        self.mover, self.sent, self.newest, self.coming = mover, [], None, (-1, None)

    def put(self, x: Tensor) -> int:
        self._release()  # the one before it, which had the time of a block to leave
        self.newest = x.detach()  # without its graph, which holds this
        self.sent.append(self.mover.send(self.newest))
        return len(self.sent) - 1

    def take(self, i: int) -> Tensor:
        (place, coming), x = self.coming, self._release()
        if x is None or i + 1 < len(self.sent):
            x = self.mover.wait(coming if place == i else self.mover.fetch(self.sent[i]))
        # has a block's backward to arrive in
        self.coming = (i - 1, self.mover.fetch(self.sent[i - 1])) if i else (-1, None)
        return x

    def _release(self) -> Tensor | None:
        x, self.newest = self.newest, None
        if x is not None:
            self.mover.wait(self.sent[-1])
        return x


class _Offloaded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Block, inputs: _Inputs, x: Tensor, *others: Tensor) -> Tensor:
        ctx.f, ctx.inputs, ctx.place = f, inputs, inputs.put(x)
        ctx.save_for_backward(*others)
        return value_of_arguments(f, (x, *others))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # in this order: the first says so if all is gone
        others, x = ctx.saved_tensors, ctx.inputs.take(ctx.place)
        return None, None, *pullback(ctx.f, [x, *others], grad_outputs[0], ctx.needs_input_grad[2:])
