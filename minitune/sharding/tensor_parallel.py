"""Tensor parallelism: linear maps that the ranks along the axis "tensor" share, each with a part.

The maps into attention and into the feed-forward are cut by rows: each rank has the outputs of some
heads, or some of d_ff numbers, for all tokens. The maps out of them are cut by columns: each rank
has a sum over its numbers, and the ranks add these up (Shoeybi et al. 2019, arXiv 1909.08053,
section 3). Between the two pairs each rank has some of the tokens, for norms and the residual
stream (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2): tokens come together before the
first map, and are parted with the sum after the second.

Gradients follow from the transposes: the sum over all ranks of what each has found is the gradient
of a leaf that all have whole, and a part has its own complete.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from minitune import tree
from minitune.quant import nf4
from minitune.quant.tensors import QNF4
from minitune.sharding.parts import is_sharded, part_range
from minitune.sharding.tokens import AxisMember, Sharers, exchanged, member_of
from minitune.tree import Tree
from minitune.types import Adapted, Dropout, Params

AXIS = "tensor"


class ColumnParallel(NamedTuple):
    """Rows of a weight [out, in], which give some of its outputs for the tokens of all sharers."""

    w: Any  # Tensor [length, in], a QTensor or Adapted
    start: int  # of the rows
    length: int
    sharers: Sharers

    def own(self, x: Tensor | None, n_each: int = 1) -> Tensor | None:
        """Part of a vector that belongs to the rows: one number for each n_each of them."""
        return None if x is None else x.narrow(0, self.start // n_each, self.length // n_each)


class RowParallel(NamedTuple):
    """Columns of a weight [out, in], which give a summand of all outputs."""

    w: Any  # Tensor [out, length], a QTensor or Adapted
    sharers: Sharers


def in_parts(layer: Params, gathered: Params) -> Params:
    """Leaves of a layer as its block computes with them, from those at rest and from what `gather`
    has made of them: a weight that is cut along tensor is ColumnParallel or RowParallel.
    """
    if not isinstance(layer, Mapping):
        return gathered
    return {name: _in_parts(leaf, gathered[name]) for name, leaf in layer.items()}


def of_rank(leaf: Tree, dim: int, size: int, member: AxisMember) -> Tree:
    """ColumnParallel or RowParallel leaf of a weight of which a rank has its part along a dim that
    has this size when it is whole.
    """
    start, length = part_range(size, member.size, member.place)
    own = _standing_alone(leaf, dim, start, size)
    if dim == 0:
        return ColumnParallel(_rows(own, start, length), start, length, member.sharers)
    return RowParallel(_columns(own, start, length, size), member.sharers)


def is_in_parts(leaf: Tree) -> bool:
    """True for a leaf at rest that is cut along tensor."""
    return _cut_dim(leaf) is not None


def all_tokens(x: Float[Tensor, "B t D"], sharers: Sharers) -> Float[Tensor, "B T D"]:
    """Tokens of all sharers, in their order."""
    got = exchanged(x.expand(len(sharers.ranks), *x.shape), sharers)  # [n B t D]
    return got.movedim(0, 1).flatten(1, 2)


def summed_own_tokens(y: Float[Tensor, "B T D"], sharers: Sharers) -> Float[Tensor, "B t D"]:
    """Sum over all sharers of what they have of each token, for the tokens of this rank."""
    sent = y.unflatten(1, (len(sharers.ranks), -1)).movedim(1, 0)  # [n B t D]
    return exchanged(sent, sharers).sum(0)


def summed(x: Float[Tensor, "*n"], sharers: Sharers) -> Float[Tensor, "*n"]:
    """Sum over all sharers of a tensor that each has."""
    return exchanged(x.expand(len(sharers.ranks), *x.shape), sharers).sum(0)


def _in_parts(leaf: Tree, gathered: Tree) -> Tree:
    dim = _cut_dim(leaf)
    if dim is None:
        return gathered
    member = member_of(_stored(leaf).device_mesh, AXIS)
    assert member is not None, "what is cut along an axis of one rank is no part"
    return of_rank(gathered, dim, leaf.shape[dim], member)


def _stored(leaf: Tree) -> Any:
    """First tensor of the weight of a leaf."""
    leaves: Sequence[Any] = tree.leaves(leaf.w if isinstance(leaf, Adapted) else leaf)
    return leaves[0]


def _cut_dim(leaf: Tree) -> int | None:
    """Dim of a weight that the axis tensor cuts."""
    x = _stored(leaf)
    if not is_sharded(x) or AXIS not in (x.device_mesh.mesh_dim_names or ()):
        return None
    placement = x.placements[x.device_mesh.mesh_dim_names.index(AXIS)]
    return placement.dim if placement.is_shard() else None


def _standing_alone(leaf: Tree, dim: int, start: int, size: int) -> Tree:
    """Leaf whose codes are read without what only the whole weight knows."""
    if isinstance(leaf, Adapted):
        return leaf._replace(w=_standing_alone(leaf.w, dim, start, size))
    return nf4.part(leaf, dim, start, size) if isinstance(leaf, QNF4) else leaf


def _rows(leaf: Tree, start: int, length: int) -> Tree:
    """Leaf of whose weight the rank has these rows, with as many of its low-rank change."""
    if not isinstance(leaf, Adapted):
        return leaf
    m = leaf.m.narrow(-1, start, length) if isinstance(leaf.m, Tensor) else leaf.m
    return leaf._replace(b=leaf.b.narrow(-2, start, length), m=m)


def _columns(leaf: Tree, start: int, length: int, size: int) -> Tree:
    """Leaf of whose weight the rank has these columns, with as many of its low-rank change."""
    if not isinstance(leaf, Adapted):
        return leaf
    dropout = leaf.dropout
    if isinstance(dropout, Dropout):
        dropout = dropout._replace(part=(start, size))
    return leaf._replace(a=leaf.a.narrow(-1, start, length), dropout=dropout)
