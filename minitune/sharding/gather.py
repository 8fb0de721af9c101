"""Whole weights, from the parts that ranks hold: the only communication of a forward. And frozen
ones from the host or a file (sharding/offloaded.py).

A block asks for the leaves of its layer with one `gather`, inside the boundary of recomputation:
the backward asks for them once more, and nothing keeps them in between. The parts of all leaves
travel together, in the dtypes that they have; gradients come back by one reduce-scatter. The head
is the last that a forward asks for and the first that the backward needs: it stays.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitune import tree
from minitune.autodiff.value_and_grad import under_transform
from minitune.sharding import experts, tensor_parallel
from minitune.sharding.collectives import begin_gather, end_gather
from minitune.sharding.kept_weights import KeptWeights
from minitune.sharding.later import LaterSums, LeafKey, summed_parts
from minitune.sharding.offloaded import begin_fetch, end_fetch, is_offloaded
from minitune.sharding.parts import cuts_of, is_sharded, placed_of, placed_part
from minitune.sharding.routes import WeightRoutes, at_owners, begin_to_owners
from minitune.tree import Tree

Axes = tuple[str, ...]


class Ahead:
    """Weights of the blocks of one forward: each block's are on their way while another computes,
    the next one's in the forward, and in the backward those of the one before.
    """

    def __init__(
        self,
        layers: Sequence[Tree],
        in_part: Axes = (),
        expert_ranks: experts.ExpertRanks | None = None,
        owner_of: experts.OwnerOf = lambda name: None,
        sums: LaterSums | None = None,
    ) -> None:
        self.parts = [
            [_detached(leaf) for leaf in tree.leaves(layer) if is_elsewhere(leaf)]
            for layer in layers
        ]
        # axes of the mesh: what is cut along them stays so, because blocks compute with parts
        self.in_part = in_part
        self.expert_ranks, self.owner_of, self.sums = expert_ranks, owner_of, sums
        self.routes = [self._routes(layer) for layer in layers]
        self.begun: dict[int, Any] = {}  # by the block's number
        self.latest = -1  # block that has asked

    def _routes(self, layer: Tree) -> WeightRoutes:
        owners: list[int | None] = []
        if self.expert_ranks is not None:
            for name, leaf in layer.items():
                elsewhere = filter(is_elsewhere, tree.leaves(leaf))
                owners.extend(self.owner_of(name) for _ in elsewhere)
        return WeightRoutes(self.in_part, self.expert_ranks, tuple(owners))

    def wholes(self, number: int, leaves: Sequence[Any]) -> list[Tensor]:
        """Whole weights of a block; once their buffers are gone its neighbour's begin to come."""
        found = _wholes(leaves, self.begun.pop(number, None), self.routes[number])
        # a backward begins with the block that the forward ended with
        goes_back = self.latest in (number, number + 1)
        neighbour = number - 1 if goes_back else number + 1
        self.latest = number
        if 0 <= neighbour < len(self.parts) and self.parts[neighbour]:
            self.begun[neighbour] = _begun(self.parts[neighbour], self.routes[neighbour])
        return found


class Numbered(NamedTuple):
    """Leaves of a block and its number, as a tree of tensors: what a recomputed function takes."""

    leaves: Tree
    number: Tensor


class Slot(NamedTuple):
    """One block of those whose weights are asked for ahead."""

    ahead: Ahead
    number: int

    def later(self, leaves: Sequence[int]) -> tuple[LaterSums, list[LeafKey]] | None:
        """Place where the sums of these leaves' gradients may come in later."""
        sums = self.ahead.sums
        return None if sums is None else (sums, [(self.number, i) for i in leaves])


def is_elsewhere(x: Any) -> bool:
    """True for a weight that is not whole on the device: a part of it is, or nothing."""
    return is_sharded(x) or is_offloaded(x)


def gather(w: Tree, slot: Slot | None = None) -> Tree:
    """Tree with whole tensors in place of those of which each rank holds a part, or which are
    offloaded; a tree without any is returned as it is. Every rank of the mesh calls it with the
    same leaves.

    The gradient of a part is the sum over the ranks among which the whole is cut. Ranks that hold
    copies of one part have each their own, which the step sums. What is offloaded has none. slot:
    where the weights of a block may be on their way already, and whether it computes with parts.
    """
    leaves = tree.leaves(w)
    places = [i for i, leaf in enumerate(leaves) if is_elsewhere(leaf)]
    if not places:
        return w
    some = [leaves[i] for i in places]
    wholes = _fetched(slot, some) if is_offloaded(some[0]) else _Gather.apply(slot, *some)
    whole_at = dict(zip(places, wholes, strict=True))
    return tree.rebuild(w, [whole_at.get(i, leaf) for i, leaf in enumerate(leaves)])


def gather_for_block(leaves: Tree, in_part: Axes = ()) -> Tree:
    """Weights of one block as it computes with them, from those at rest."""
    slot = Slot(Ahead([leaves], in_part), 0)
    return _for_block(leaves, gather(leaves, slot), slot)


def gathered(f: Callable[..., Tensor], ahead: Ahead | None = None) -> Callable[..., Tensor]:
    """f(w, *rest) of a tree w that `gather` makes whole, for an f that the backward recomputes:
    what autograd keeps is kept for a moment. With `ahead`, w is Numbered.
    """

    def run(w: Any, *rest: Any) -> Tensor:
        leaves, slot = _unnumbered(w, ahead)
        return f(_for_block(leaves, gather(leaves, slot), slot), *rest)

    return run


def gathered_again(f: Callable[..., Tensor], ahead: Ahead | None = None) -> Callable[..., Tensor]:
    """f(w, *rest) of a tree w that `gather` makes whole, for an f whose graph is kept: in place of
    whole weights that keeps where they were, and its backward begins with gathering them once more.
    With `ahead`, w is Numbered. Under a functorch transform, which refuses this, they are kept.
    """

    def run(w: Any, *rest: Any) -> Tensor:
        leaves, slot = _unnumbered(w, ahead)
        wholes = gather(leaves, slot)
        own = _for_block(leaves, wholes, slot)
        if wholes is leaves or not torch.is_grad_enabled() or under_transform():
            return f(own, *rest)
        pairs = zip(tree.leaves(leaves), tree.leaves(wholes), strict=True)
        gone = [(_detached(part), whole) for part, whole in pairs if is_elsewhere(part)]
        kept = KeptWeights([whole for _, whole in gone])
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
            y = f(own, *rest)
        return _GatherAgain.apply(y, [part for part, _ in gone], slot, weakref.ref(kept))

    return run


def numbered(f: Callable[..., Tensor], number: int) -> Callable[..., Tensor]:
    """f(w, *rest) that is given w with the block's number."""
    return lambda w, *rest: f(Numbered(w, torch.tensor(number)), *rest)


def _for_block(leaves: Tree, wholes: Tree, slot: Slot | None) -> Tree:
    """Weights as a block computes with them: those of which its rank has a part as such."""
    if slot is None:
        return wholes
    ahead, own = slot.ahead, wholes
    if tensor_parallel.AXIS in ahead.in_part:
        own = tensor_parallel.in_parts(leaves, own)
    if ahead.expert_ranks is not None:
        own = experts.own_experts(own, ahead.owner_of, ahead.expert_ranks)
    return own


def _detached(leaf: Any) -> Any:
    # what is detached of an offloaded tensor is none any more under torch.func.grad, and torch
    # imports DTensor for it; it has no gradient in any case
    return leaf if is_offloaded(leaf) else leaf.detach()


def _unnumbered(w: Any, ahead: Ahead | None) -> tuple[Tree, Slot | None]:
    return (w, None) if ahead is None else (w.leaves, Slot(ahead, int(w.number)))


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
        ctx.shapes = [leaf.to_local().shape for leaf in leaves]
        ctx.slot = slot
        ctx.routes = WeightRoutes() if slot is None else slot.ahead.routes[slot.number]
        return tuple(_wholes_of(slot, leaves))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needed = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]
        placed = [ctx.placed[i] for i in needed]
        grads = [grad_outputs[i] for i in needed]
        routes = ctx.routes.of(needed)
        later = None if ctx.slot is None else ctx.slot.later(needed)
        own = summed_parts(grads, [ctx.shapes[i] for i in needed], placed, routes, later)
        grad_of = {
            number: placed_part(grad, where)
            for number, grad, where in zip(needed, own, placed, strict=True)
        }
        return None, *(grad_of.get(i) for i in range(len(ctx.placed)))


def _fetched(slot: Slot | None, leaves: Sequence[Any]) -> list[Tensor]:
    """Whole tensors of offloaded ones, outside of any graph."""
    with torch.no_grad():
        return _wholes_of(slot, leaves)


def _wholes_of(slot: Slot | None, leaves: Sequence[Any]) -> list[Tensor]:
    if slot is not None:
        return slot.ahead.wholes(slot.number, leaves)
    return _wholes(leaves, None, WeightRoutes())


def _begun(leaves: Sequence[Any], routes: WeightRoutes) -> Any:
    """Weights on their way: offloaded ones, or parts of DTensors along the first axis to gather
    them along; None if there is no such axis.
    """
    if is_offloaded(leaves[0]):
        return begin_fetch(leaves)
    placed = [placed_of(leaf) for leaf in leaves]
    sending = begin_to_owners([leaf.to_local() for leaf in leaves], placed, routes)
    if sending is not None:
        return sending
    for group, cuts in cuts_of(placed, routes.stays):
        return begin_gather([leaves[i].to_local() for i in cuts], [*cuts.values()], group)
    return None


def _wholes(leaves: Sequence[Any], begun: Any, routes: WeightRoutes) -> list[Tensor]:
    """Whole tensors of weights, which have begun to come or begin now."""
    begun = begun or _begun(leaves, routes)
    if is_offloaded(leaves[0]):
        return [*end_fetch(leaves, begun)]
    # views, because autograd writes to what comes out of its functions
    own = [leaf.to_local().detach() for leaf in leaves]
    placed = [placed_of(leaf) for leaf in leaves]
    at_hand, begun = at_owners(own, placed, begun, routes)
    parts = [*at_hand]
    for number, (group, cuts) in enumerate(cuts_of(placed, routes.stays)):
        some = [parts[i] for i in cuts]
        if number or begun is None:
            begun = begin_gather(some, [*cuts.values()], group)
        for i, whole in zip(cuts, end_gather(begun), strict=True):
            parts[i] = whole
        begun = None  # its buffer is gone before the next axis needs one
    return parts
