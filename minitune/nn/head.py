"""Losses of the head over chunks of rows, so that whole logits never exist."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minitune import tree
from minitune.autodiff.chunked import chunked_with_gradients, with_row_gradients
from minitune.autodiff.remat import remat
from minitune.autodiff.row_values import checked_losses
from minitune.autodiff.value_and_grad import ClosedOverError, under_transform
from minitune.hardware import profiled, to_device
from minitune.nn.linear import linear
from minitune.quant.tensors import QTensor
from minitune.tree import Tree
from minitune.types import Adapted

HEAD_CHUNK = 2**22  # logits alive at a time: 16 MiB in float32, which stay near a core
# least rows of a chunk: with fewer, a matmul takes its time to read the head of a large vocabulary
HEAD_ROWS = 128
# times as many logits on a GPU, which has no such caches: the head is read once a chunk
GPU_CHUNK_FACTOR = 64
# times as many where the head trains: each chunk then adds to a gradient as large as the head
TRAINED_HEAD_FACTOR = 4
# logits that a loss sees at a time on a CPU: what it makes of them then stays near a core
LOSS_SLICE_LOGITS = 2**19


@profiled("head and loss")
def token_losses(
    loss: Callable[[Float[Tensor, "n V"], Tree], Float[Tensor, "n *values"]],
    hidden: Float[Tensor, "B T D"],
    targets: Tree,
    mask: Bool[Tensor, "B T"],
    head: Float[Tensor, "V D"] | QTensor | Adapted,
    *,
    summed: bool = False,
) -> Float[Tensor, "B T *values"]:
    """loss(hidden head^T, targets) at the rows where mask is True, 0 elsewhere, without ever
    holding whole logits.

    targets is a tree of tensors [B, T, ...], of which the loss sees the same rows: token ids,
    hidden states of a teacher. A loss may give several values a row. Labelled rows are flattened
    and cut in chunks, see head_chunk. The gradients of each chunk are taken while its logits are
    there: those of its rows, and of the head where that trains (chunked.chunked_with_gradients,
    which says what `summed` is for). targets and mask may lie on the host and hidden states on an
    accelerator: the labelled rows are then counted there and sent. If the mask lies on an
    accelerator, the host waits for it to learn how many rows are labelled.
    """

    def chunk_losses(rows: Tensor, labels: Tree, w: Tensor | QTensor | Adapted) -> Tensor:
        return loss(linear(rows, w), labels)

    chunk = head_chunk(head, any(leaf.requires_grad for leaf in tree.leaves(head)))
    flat, labels = hidden.flatten(0, 1), tree.map(lambda x: x.flatten(0, 1), targets)

    # no vmap can follow how many rows are labelled, which depends on the data: all rows are taken
    if under_transform():
        labels, mask = tree.map(lambda x: to_device(x, hidden.device), (labels, mask))
        nats = _recomputed(chunk_losses, flat, labels, head, chunk).unflatten(0, mask.shape)
        return torch.where(mask.view(*mask.shape, *(1 for _ in nats.shape[2:])), nats, 0.0)

    # rows are taken where they lie: what comes from the host is no more than the labelled ones
    index = mask.flatten().nonzero().squeeze(1)
    labels = tree.map(lambda x: to_device(x[to_device(index, x.device)], hidden.device), labels)
    index = to_device(index, hidden.device)
    nats = _losses_of_rows(chunk_losses, flat[index], labels, head, chunk, summed)
    whole = nats.new_zeros(mask.numel(), *nats.shape[1:]).index_put((index,), nats)
    return whole.unflatten(0, mask.shape)


def _losses_of_rows(
    losses: Callable[..., Tensor],
    rows: Tensor,
    labels: Tree,
    head: Tensor | QTensor | Adapted,
    chunk: int,
    summed: bool,
) -> Tensor:
    """losses(rows, labels, head) by chunks of rows, with the gradients that are wanted."""
    has_grad = [leaf.requires_grad for leaf in tree.leaves((rows, head))]
    if not torch.is_grad_enabled() or not any(has_grad):
        return _chunked(losses, rows, labels, head, chunk)
    if not any(has_grad[1:]):
        return _chunked(with_row_gradients(losses), rows, labels, head, chunk)

    def at(start: int, some: Tensor, head: Tree) -> Tensor:
        return losses(some, tree.map(lambda x: x[start : start + len(some)], labels), head)

    return chunked_with_gradients(at, rows, head, chunk, summed)


def by_rows(
    loss: Callable[..., Float[Tensor, "n *values"]],
    n_values: int = 1,
) -> Callable[..., Float[Tensor, "n *values"]]:
    """loss(logits [n V], *trees of n rows), taken of a few rows at a time, and its gradient by
    logits with it.

    Nothing but that gradient is kept. For a loss whose values of a row depend on that row alone.
    Differentiable once, but under a transform any number of times. TypeError for a loss that does
    not return n_values a row.
    """

    def checked(logits: Tensor, *targets: Tree) -> Tensor:
        return checked_losses(loss(logits, *targets), logits, n_values)

    def slices(logits: Tensor, *targets: Tree) -> Tensor:
        if under_transform():
            return checked(logits, *targets)
        has_grad = torch.is_grad_enabled() and logits.requires_grad
        losses = with_row_gradients(checked) if has_grad else checked
        n = rows_at_once(logits)
        # split and not slices, whose gradients would each be as large as the logits
        rows = enumerate(logits.split(n))
        return torch.cat(
            [
                losses(some, *tree.map(lambda x, i=i: x[n * i : n * (i + 1)], targets))
                for i, some in rows
            ]
        )

    return slices


def rows_at_once(logits: Float[Tensor, "n V"]) -> int:
    """Number of rows that `by_rows` gives to a loss."""
    return max(
        1, LOSS_SLICE_LOGITS // logits.shape[-1] if logits.device.type == "cpu" else len(logits)
    )


def head_chunk(head: Float[Tensor, "V D"] | QTensor | Adapted, trains: bool = False) -> int:
    """Number of rows of logits that are alive at a time."""
    times = (1 if tree.leaves(head)[0].device.type == "cpu" else GPU_CHUNK_FACTOR) * (
        TRAINED_HEAD_FACTOR if trains else 1
    )
    return max(HEAD_ROWS, times * HEAD_CHUNK // head.shape[0])


def _recomputed(losses: Callable[..., Tensor], *args: Any) -> Tensor:
    """Chunks under remat; as they are where the loss closes over parameters of its own."""
    try:
        return _chunked(remat(losses), *args)
    except ClosedOverError:
        return _chunked(losses, *args)


def _chunked(
    piece: Callable[..., Tensor],
    rows: Tensor,
    labels: Tree,
    head: Tensor | QTensor | Adapted,
    chunk: int,
) -> Tensor:
    starts = range(0, max(len(rows), 1), chunk)  # no row at all still makes one empty piece
    return torch.cat(
        [piece(*tree.map(lambda x, i=i: x[i : i + chunk], (rows, labels)), head) for i in starts]
    )
