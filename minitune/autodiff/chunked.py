"""Functions of many rows whose gradients are taken chunk by chunk, as the values are."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitune import tree
from minitune.autodiff.value_and_grad import (
    PLACEHOLDER,
    ClosedOverError,
    autograd_grads,
    detached_leaves,
    detached_where,
    refuse_other_leaves,
    value_of_arguments,
)
from minitune.hardware import is_accelerator
from minitune.tree import Tree
from minitune.types import wide_dtype


def with_row_gradients(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """f(rows [n ...], *args) -> values [n ...], whose gradient by rows is taken in the forward,
    while what f makes is there.

    For an f whose values of a row depend on that row alone. Differentiable once. Where they depend
    on anything else that requires grad, an argument or not, autograd differentiates f and keeps all
    of it.
    """

    def evaluate(rows: Tensor, *args: Tree) -> Tensor:
        fresh = detached_leaves(rows)
        with torch.enable_grad():
            values = f(fresh, *args)
            columns = (values[:, None] if values.ndim == 1 else values.flatten(1)).sum(0).unbind()
        try:
            refuse_other_leaves(values, [fresh])
        except ClosedOverError:
            return f(rows, *args)
        grads = []
        for i, x in enumerate(columns):
            grads += torch.autograd.grad(x, fresh, retain_graph=i + 1 < len(columns))
        return _RowGradients.apply(values.detach(), rows, *grads)

    return evaluate


class _RowGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, *grads: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # a sum's cotangent spares a pass over what is large; an accelerator would be waited for to
        # see it
        if (
            len(ctx.saved_tensors) == 1
            and not is_accelerator(grad_outputs[0].device)
            and bool((grad_outputs[0] == 1).all())
        ):
            return None, ctx.saved_tensors[0], None
        cotangents = (
            grad_outputs[0].unsqueeze(-1)
            if grad_outputs[0].ndim == 1
            else grad_outputs[0].flatten(1)
        )
        parts = (
            c[:, None] * g for c, g in zip(cotangents.unbind(1), ctx.saved_tensors, strict=True)
        )
        d_rows = reduce(torch.add, parts).to(ctx.saved_tensors[0].dtype)
        return None, d_rows, *(None for _ in ctx.saved_tensors)


def chunked_with_gradients(
    f: Callable[..., Tensor], rows: Tensor, weights: Tree, chunk: int, summed: bool = False
) -> Tensor:
    """f(start, rows[start : start + chunk], weights) -> one value a row, for all chunks together,
    with the gradients of rows and weights taken in the forward: right if the values are then
    summed, which is when they all have one cotangent.

    On a CPU, every chunk is recomputed if the cotangents turn out to differ. An accelerator would
    be waited for to see them, so there the caller says what they are: with `summed` they are 1, and
    the gradients are NaN if they are not; without it every chunk is recomputed. Differentiable
    once. Where f depends on a tensor that requires grad and is no argument, autograd differentiates
    f and keeps all of it.
    """
    structure = tree.map(lambda _: PLACEHOLDER, weights)

    def of_leaves(start: int, x: Tensor, *leaves: Tensor) -> Tensor:
        return f(start, x, tree.rebuild(structure, leaves))

    try:
        return _InChunks.apply(of_leaves, chunk, summed, rows, *tree.leaves(weights))
    except ClosedOverError:
        starts = range(0, max(len(rows), 1), chunk)
        return torch.cat([f(i, rows[i : i + chunk], weights) for i in starts])


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, f: Callable[..., Tensor], chunk: int, summed: bool, *tensors: Tensor
    ) -> Tensor:
        ctx.f, ctx.chunk, ctx.summed = f, chunk, summed
        if is_accelerator(tensors[0].device) and not summed:
            ctx.save_for_backward(*tensors)
            starts = range(0, max(len(tensors[0]), 1), chunk)
            pieces = [(i, [tensors[0][i : i + chunk], *tensors[1:]]) for i in starts]
            return torch.cat([value_of_arguments(partial(f, i), some) for i, some in pieces])
        values, grads = _chunk_gradients(
            f, chunk, tensors, ctx.needs_input_grad[3:], lambda x, start: torch.ones_like(x)
        )
        ctx.save_for_backward(*tensors, *grads)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needed, cotangent = ctx.needs_input_grad[3:], grad_outputs[0]
        tensors, grads = ctx.saved_tensors[: len(needed)], ctx.saved_tensors[len(needed) :]
        accelerated = is_accelerator(cotangent.device)
        one = cotangent.flatten()[:1].sum()  # of no row too
        if accelerated and ctx.summed:
            fault = torch.where((cotangent == 1).all(), 0.0, torch.nan)
            firsts = [g.view(-1)[:1] for g in grads if g.numel() > 0]
            tree.donate_sum(firsts, [fault.to(x.dtype)[None] for x in firsts])
        elif not accelerated and bool((cotangent == one).all()):
            # a copy is as large as the head
            grads = grads if bool(one == 1) else [g * one.to(g.dtype) for g in grads]
        else:
            grads = _chunk_gradients(
                ctx.f, ctx.chunk, tensors, needed, lambda x, i: cotangent[i : i + len(x)]
            )[1]
        given = iter(grads)
        return None, None, None, *(next(given) if need else None for need in needed)


def _chunk_gradients(
    f: Callable[..., Tensor],
    chunk: int,
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    cotangent: Callable[[Tensor, int], Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """(the values of all chunks, the gradients of the tensors that need one); the first tensor is
    cut in chunks, and what the chunks say of the others is added up in float32 or wider.
    """
    rows, *weights = tensors
    chosen = [w for w, need in zip(weights, needed[1:], strict=True) if need]
    sums = [torch.zeros_like(w, dtype=wide_dtype(w.dtype)) for w in chosen]
    values, pieces = [], []
    for start in range(0, max(len(rows), 1), chunk):  # no row at all still makes one empty piece
        fresh = detached_where([rows[start : start + chunk], *weights], needed)
        with torch.enable_grad():
            results = f(start, *fresh)
        refuse_other_leaves(results, fresh)
        grads = list(
            autograd_grads(
                [results], [x for x in fresh if x.requires_grad], [cotangent(results, start)]
            )
        )
        values.append(results.detach())
        pieces += [grads.pop(0)] if needed[0] else []
        tree.donate_sum(sums, grads)
        # as large as the weights, and not to be there together with those of the next chunk
        del grads
    joined = [torch.cat(pieces)] if needed[0] else []
    return torch.cat(values), [*joined, *(x.to(w.dtype) for x, w in zip(sums, chosen, strict=True))]
