"""Whole weights, from the parts that ranks hold: the only communication of a forward.

A block asks for the leaves of its layer with one `gather`, inside the boundary of recomputation:
the backward asks for them once more, and nothing keeps them in between. The parts of all leaves
travel together, in the dtypes that they have; gradients come back by one reduce-scatter. The head
is the last that a forward asks for and the first that the backward needs: it stays.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitune import tree
from minitune.sharding.collectives import Gathering, begin_gather, end_gather, reduce_scatter
from minitune.sharding.parts import cuts_of, is_sharded, placed_of, placed_part
from minitune.tree import Tree


class Ahead:
    """Weights of the blocks of one forward: each block's are on their way while another computes,
    the next one's in the forward, and in the backward those of the one before.
    """

    def __init__(self, layers: Sequence[Tree]) -> None:
        self.parts = [
            [leaf.detach() for leaf in tree.leaves(layer) if is_sharded(leaf)] for layer in layers
        ]
        self.begun: dict[int, Gathering] = {}  # by the block's number
        self.seen: set[int] = set()  # blocks whose forward has been

    def wholes(self, number: int, leaves: Sequence[Any]) -> list[Tensor]:
        """Whole weights of a block; those of its neighbour begin to come."""
        begun = self.begun.pop(number, None) or _begun(leaves)
        found = _wholes(leaves, begun)
        neighbour = number - 1 if number in self.seen else number + 1
        self.seen.add(number)
        if 0 <= neighbour < len(self.parts) and self.parts[neighbour]:
            self.begun[neighbour] = _begun(self.parts[neighbour])
        return found


class Numbered(NamedTuple):
    """Leaves of a block and its number, as a tree of tensors: what a recomputed function takes."""

    leaves: Tree
    number: Tensor


class Slot(NamedTuple):
    """One block of those whose weights are asked for ahead."""

    ahead: Ahead
    number: int


def gather(w: Tree, slot: Slot | None = None) -> Tree:
    """Tree with whole tensors in place of those of which each rank holds a part; a tree without
    any is returned as it is. Every rank of the mesh calls it with the same leaves.

    The gradient of a part is the sum over the ranks among which the whole is cut. Ranks that hold
    copies of one part have each their own, which the step sums. slot: where the weights of a block
    may be on their way already.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return w
    leaves = tree.leaves(w)
    places = [i for i, leaf in enumerate(leaves) if is_sharded(leaf)]
    if not places:
        return w
    wholes = _Gather.apply(slot, *(leaves[i] for i in places))
    whole_at = dict(zip(places, wholes, strict=True))
    return tree.rebuild(w, [whole_at.get(i, leaf) for i, leaf in enumerate(leaves)])


def gathered(f: Callable[..., Tensor], ahead: Ahead | None = None) -> Callable[..., Tensor]:
    """f(w, *rest) of a tree w that ranks hold in parts, for an f of whole tensors whose backward
    recomputes it: what autograd keeps of it is kept for a moment. With `ahead`, w is Numbered.
    """

    def run(w: Any, *rest: Any) -> Tensor:
        leaves, slot = _unnumbered(w, ahead)
        return f(gather(leaves, slot), *rest)

    return run


def gathered_again(f: Callable[..., Tensor], ahead: Ahead | None = None) -> Callable[..., Tensor]:
    """f(w, *rest) of a tree w that ranks hold in parts, for an f of whole tensors whose graph is
    kept: in place of whole weights that keeps where they were, and its backward begins with
    gathering them once more. With `ahead`, w is Numbered.
    """

    def run(w: Any, *rest: Any) -> Tensor:
        leaves, slot = _unnumbered(w, ahead)
        wholes = gather(leaves, slot)
        if wholes is leaves or not torch.is_grad_enabled():
            return f(wholes, *rest)
        kept = _KeptWeights(leaves, wholes)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
            y = f(wholes, *rest)
        return _GatherAgain.apply(y, kept.parts, slot, weakref.ref(kept))

    return run


def numbered(f: Callable[..., Tensor], number: int) -> Callable[..., Tensor]:
    """f(w, *rest) that is given w with the block's number."""
    return lambda w, *rest: f(Numbered(w, torch.tensor(number)), *rest)


def _unnumbered(w: Any, ahead: Ahead | None) -> tuple[Tree, Slot | None]:
    return (w, None) if ahead is None else (w.leaves, Slot(ahead, int(w.number)))


class _Kept(NamedTuple):
    """View of a whole weight that a graph would have kept."""

    number: int  # of the weight
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _KeptWeights:
    """Weights of one call of a block, for its graph: lives as long as that graph does."""

    def __init__(self, w: Tree, wholes: Tree) -> None:
        pairs = zip(tree.leaves(w), tree.leaves(wholes), strict=True)
        sharded = [(part, whole) for part, whole in pairs if is_sharded(part)]
        self.parts = [part.detach() for part, _ in sharded]
        storages = [whole.untyped_storage().data_ptr() for _, whole in sharded]
        self.number_of = {pointer: i for i, pointer in enumerate(storages)}
        self.wholes: list[Tensor] = []  # in the backward

    def pack(self, x: Tensor) -> Any:
        number = self.number_of.get(x.untyped_storage().data_ptr())
        if number is None:
            return x
        return _Kept(number, x.dtype, x.size(), x.stride(), int(x.storage_offset()))

    def unpack(self, x: Any) -> Tensor:
        if not isinstance(x, _Kept):
            return x
        return self.wholes[x.number].view(x.dtype).as_strided(x.size, x.stride, x.offset)


class _GatherAgain(torch.autograd.Function):
    """Result of a block; the backward first brings its weights back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, parts: list[Tensor], slot: Slot | None, kept: Any) -> Tensor:
        ctx.parts, ctx.slot, ctx.kept = parts, slot, kept
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # also where this rank's graph kept no weight: the other ranks wait for its parts
        wholes, kept = gather(ctx.parts, ctx.slot), ctx.kept()
        if kept is not None:
            kept.wholes = wholes
        return grad_outputs[0], None, None, None


class _Gather(torch.autograd.Function):
    """Whole tensors of DTensors; the backward sums gradients, and leaves to each rank its part."""

    @staticmethod
    def forward(ctx: Any, slot: Slot | None, *leaves: Any) -> tuple[Tensor, ...]:
        ctx.placed = [placed_of(leaf) for leaf in leaves]
        if slot is not None:
            return tuple(slot.ahead.wholes(slot.number, leaves))
        return tuple(_wholes(leaves, _begun(leaves)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needed = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]
        placed = [ctx.placed[i] for i in needed]
        grads = [grad_outputs[i] for i in needed]
        for group, cuts in reversed([*cuts_of(placed)]):
            sums = reduce_scatter([grads[i] for i in cuts], [*cuts.values()], group)
            for i, part in zip(cuts, sums, strict=True):
                grads[i] = part
        grad_of = {
            number: placed_part(grad, where)
            for number, grad, where in zip(needed, grads, placed, strict=True)
        }
        return None, *(grad_of.get(i) for i in range(len(ctx.placed)))


def _begun(leaves: Sequence[Any]) -> Gathering:
    """Parts of DTensors on their way along the first axis that cuts any."""
    group, cuts = next(cuts_of([placed_of(leaf) for leaf in leaves]))
    return begin_gather([leaves[i].to_local() for i in cuts], [*cuts.values()], group)


def _wholes(leaves: Sequence[Any], begun: Gathering) -> list[Tensor]:
    """Whole tensors of DTensors whose gathering has begun."""
    parts = [leaf.to_local() for leaf in leaves]
    for number, (group, cuts) in enumerate(cuts_of([placed_of(leaf) for leaf in leaves])):
        some = [parts[i] for i in cuts]
        gathering = begin_gather(some, [*cuts.values()], group) if number else begun
        for i, whole in zip(cuts, end_gather(gathering), strict=True):
            parts[i] = whole
    return parts
