"""Gradients of blocks, summed over ranks while the backward goes on.

A block's reduce-scatter begins when its backward is done, and runs while the block before it
computes. Autograd wants gradients at once: it gets zeros that take no memory in their place, and
the sums come in at one operator that stands before all blocks, whose backward is the last.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitune import tree
from minitune.autodiff.value_and_grad import under_transform
from minitune.sharding.collectives import Scattering, begin_scatter, end_scatter, reduce_scatter
from minitune.sharding.parts import Placed, cuts_of, is_sharded, placed_of, placed_part
from minitune.sharding.routes import WeightRoutes, from_owners
from minitune.tree import Tree
from minitune.types import Params

# (number of a block, number of a leaf among those of the block that are in parts)
LeafKey = tuple[int, int]


class LaterSums:
    """Sums of the gradients of one forward's blocks, of which one block's are on their way."""

    def __init__(self) -> None:
        self._found: dict[LeafKey, Tensor] = {}
        self._begun: tuple[list[LeafKey], Scattering] | None = None

    def begin(
        self, keys: Sequence[LeafKey], grads: Sequence[Tensor], cuts: Sequence[Any], group: Any
    ) -> None:
        """Send gradients to be summed, once those that were sent before have come."""
        self._end()
        self._begun = [*keys], begin_scatter(grads, cuts, group)

    def take(self, key: LeafKey) -> Tensor | None:
        """Part of this rank of a sum; None if nothing was sent for it."""
        self._end()
        return self._found.pop(key, None)

    def _end(self) -> None:
        if self._begun is None:
            return
        keys, scattering = self._begun
        self._begun = None
        for key, part in zip(keys, end_scatter(scattering), strict=True):
            earlier = self._found.get(key)
            self._found[key] = part if earlier is None else earlier + part


def sums_later(
    params: Params, n_layers: int, layer_of: Callable[[Params, int], Tree]
) -> tuple[Params, LaterSums | None]:
    """(parameters whose blocks' gradients are summed while the backward goes on, where the sums
    will be); the parameters as they are, and None, where no block trains weights in parts.

    layer_of(params, i): the leaves of block i among them.
    """
    trains_parts = any(is_sharded(x) and x.requires_grad for x in tree.leaves(params))
    if not trains_parts or not torch.is_grad_enabled() or under_transform():
        return params, None
    leaf_of: dict[LeafKey, Any] = {}
    for number in range(n_layers):
        parts = filter(is_sharded, tree.leaves(layer_of(params, number)))
        leaf_of |= {(number, i): x for i, x in enumerate(parts) if x.requires_grad}
    # of a leaf with several uses autograd adds gradients, and the zeros would be among them
    uses = Counter(id(x) for x in tree.leaves(params))
    leaf_of = {key: x for key, x in leaf_of.items() if uses[id(x)] == 1}
    if not leaf_of:
        return params, None
    sums = LaterSums()
    same = _Later.apply(sums, [*leaf_of], *leaf_of.values())
    same_of = {id(x): y for x, y in zip(leaf_of.values(), same, strict=True)}
    return tree.map(lambda x: same_of.get(id(x), x), params), sums


def summed_parts(
    grads: Sequence[Tensor],
    shapes: Sequence[torch.Size],
    placed: Sequence[Placed],
    routes: WeightRoutes,
    later: tuple[LaterSums, Sequence[LeafKey]] | None,
) -> list[Tensor]:
    """Part of this rank, of these shapes, of the sums of whole gradients over the ranks that the
    leaves are cut among.

    later: where sums may come in later, and the leaves' keys there; zeros stand for these. Every
    rank calls it with the same leaves.
    """
    found = list(grads)
    groups = [*cuts_of(placed, routes.stays)][::-1]
    for number, (group, cuts) in enumerate(groups, 1):
        some = [found[i] for i in cuts]
        if later is not None and number == len(groups) and not routes.owned():
            sums, keys = later
            sums.begin([keys[i] for i in cuts], some, [*cuts.values()], group)
            parts = [grads[i].new_zeros(()).expand(shapes[i]) for i in cuts]
        else:
            parts = reduce_scatter(some, [*cuts.values()], group)
        for i, part in zip(cuts, parts, strict=True):
            found[i] = part
    return from_owners(found, shapes, placed, routes)


class _Later(torch.autograd.Function):
    """Leaves as they are; the gradients of those that are summed later are the sums."""

    @staticmethod
    def forward(ctx: Any, sums: LaterSums, keys: list[LeafKey], *leaves: Any) -> tuple[Any, ...]:
        ctx.sums, ctx.keys = sums, keys
        ctx.placed = [placed_of(leaf) for leaf in leaves]
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = []
        for key, placed, grad in zip(ctx.keys, ctx.placed, grad_outputs, strict=True):
            part = ctx.sums.take(key)
            grads.append(grad if part is None else placed_part(part, placed))
        return None, None, *grads
