"""Ranks that a plan is made for: which part of a weight each holds, and which rows it works on.

Who holds what is what sharding/placements.py says of a mesh and a plan. What is cut is gathered for
the block that computes with it, but along the axis "tensor", where a block computes with its part.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from minitune import tree
from minitune.errors import InputError, cut
from minitune.models.config import DecoderConfig
from minitune.models.weights import dims, shapes
from minitune.planning.alike import layer_number
from minitune.sharding.context import check_heads
from minitune.sharding.mesh import ROW_SHARING, check_mesh, n_ranks, n_sharers
from minitune.tree import Tree
from minitune.types import Adapted, Delta

# ranks of this axis compute each with their part of a block's weights, on the same rows
TENSOR = "tensor"
AXIS = re.compile(r"([a-z][a-z_]*)=([1-9][0-9]{0,6})")
NOTHING: Mapping[str, int] = MappingProxyType({})


class Mesh(NamedTuple):
    """Ranks of a training along named axes, and the plan by which they hold weights."""

    axes: Mapping[str, int] = NOTHING  # axis -> ranks along it, the outermost first
    plan: Mapping[str, str] = MappingProxyType({})  # meaning of a dim -> axis that cuts it
    # number of the dim that each axis cuts, by the names of the weights that are cut; others lie
    # whole on every rank
    cuts: Mapping[str, Mapping[str, int]] = MappingProxyType({})
    shares_rows: bool = True  # False: ranks that share rows in training have whole ones

    @property
    def n_ranks(self) -> int:
        """Number of ranks."""
        return n_ranks(self.axes)

    @property
    def n_sharers(self) -> int:
        """Number of ranks that work on the same rows."""
        return math.prod(self.n_sharing(axis) for axis in dict.fromkeys((*ROW_SHARING, TENSOR)))

    @property
    def n_shares(self) -> int:
        """Number of parts that the rows of a batch are dealt out in."""
        return self.n_ranks // self.n_sharers

    def n_sharing(self, axis: str) -> int:
        """Number of ranks along an axis on which they work on the same rows."""
        return self.axes.get(axis, 1) if self.shares_rows else 1

    def own_tokens(self, n_tokens: int) -> int:
        """Tokens of a row of n_tokens that a rank works on, outside of attention."""
        return -(-n_tokens // self.n_sharers)

    def for_model(self, config: DecoderConfig) -> "Mesh":
        """Mesh that knows which dims of a model's weights the plan cuts; InputError for a plan or a
        mesh that does not fit the model."""
        if self.n_ranks == 1:
            return self
        check_mesh(self.axes, self.plan.values(), self.n_ranks)
        n_sharers(self.axes)
        check_heads(config.n_heads, self.axes.get("context", 1))
        if not self.plan:
            return self
        # torch's DTensor takes more than half a second to import
        from minitune.sharding.placements import check_plan, placements, sharded_dim

        named = dims(config)
        check_plan(self.plan, named, self.axes)
        # weights whose dims mean the same are cut alike
        by_dims: dict[tuple[str, ...], dict[str, int]] = {}
        for name, shape in shapes(config).items():
            if named[name] not in by_dims:
                placed = placements(name, shape, named[name], self.plan, self.axes)
                numbers = zip(self.axes, map(sharded_dim, placed), strict=True)
                by_dims[named[name]] = {axis: dim for axis, dim in numbers if dim is not None}
        cuts = {name: by_dims[found] for name, found in named.items() if by_dims[found]}
        return self._replace(cuts=cuts)

    def gathered_along(self, name: str, axes: Iterable[str]) -> list[str]:
        """Axes among these, which cut a weight, along which it is gathered; the outermost first."""
        in_part = () if layer_number(name) is None else (TENSOR,)
        return [axis for axis in self.axes if axis in axes and axis not in in_part]


ALONE = Mesh()


def mesh_under(axes: Mapping[str, int], plan: str | Mapping[str, str]) -> Mesh:
    """Mesh of so many ranks along each axis under a plan, by its name or as a table; InputError for
    a name without a file, and for an axis that means nothing."""
    table: Mapping[str, str] = MappingProxyType({})
    if isinstance(plan, Mapping):
        table = plan
    elif plan != "dp":  # which cuts nothing
        # torch's DTensor takes more than half a second to import
        from minitune.sharding.plans import named_plan

        table = named_plan(plan)
    check_mesh(axes, table.values(), n_ranks(axes))
    return Mesh(dict(axes), table)


def axes_of(written: str) -> dict[str, int]:
    """Ranks along each axis, the outermost first, as in "replica=16,data=8"; InputError for what is
    no mesh."""
    axes: dict[str, int] = {}
    for part in written.split(","):
        found = AXIS.fullmatch(part.strip())
        if found is None or found[1] in axes:
            raise InputError(
                f"plan: the mesh {cut(written)} has {cut(part)!r}, expected axes once each as in "
                "replica=16,data=8; correct it"
            )
        axes[found[1]] = int(found[2])
    return axes


def local_part(leaves: Mapping[str, Tree], mesh: Mesh) -> dict[str, Tree]:
    """Largest parts of leaves that a rank holds, by the names of their weights and on the meta
    device: those of torch's Shard."""
    return {
        name: tree.rebuild(
            leaf,
            [
                torch.empty(_part(x.shape, axes, mesh), dtype=x.dtype, device="meta")
                for x, axes in _cut_tensors(leaf, mesh.cuts.get(name, NOTHING))
            ],
        )
        for name, leaf in leaves.items()
    }


def local_bytes(leaves: Mapping[str, Tree], mesh: Mesh, *, wide: bool = False) -> int:
    """Bytes of these parts; wide: in float32 or wider, as gradients are summed."""
    return sum(
        math.prod(_part(x.shape, axes, mesh)) * _element_bytes(x, wide)
        for name, leaf in leaves.items()
        for x, axes in _cut_tensors(leaf, mesh.cuts.get(name, NOTHING))
    )


def gathered_bytes(leaves: Mapping[str, Tree], mesh: Mesh) -> int:
    """Bytes that the leaves which are gathered have then: whole, but along the axis "tensor"."""
    total = 0
    for name, leaf in leaves.items():
        for x, axes in _cut_tensors(leaf, mesh.cuts.get(name, NOTHING)):
            gathered = mesh.gathered_along(name, axes)
            if gathered:
                rest = {axis: dim for axis, dim in axes.items() if axis not in gathered}
                total += math.prod(_part(x.shape, rest, mesh)) * x.element_size()
    return total


def copied_bytes(leaves: Mapping[str, Tree], mesh: Mesh) -> int:
    """Bytes, in float32 or wider, of the parts of which several ranks hold copies: their gradients
    are summed between these."""
    cutting = {axis for axis, n in mesh.axes.items() if n > 1}
    return sum(
        math.prod(_part(x.shape, axes, mesh)) * _element_bytes(x, wide=True)
        for name, leaf in leaves.items()
        for x, axes in _cut_tensors(leaf, mesh.cuts.get(name, NOTHING))
        if not cutting <= set(axes)
    )


def bytes_by_cut(
    leaves: Mapping[str, Tree], mesh: Mesh, *, wide: bool = False
) -> dict[tuple[tuple[str, ...], tuple[str, ...]], int]:
    """Bytes, whole, of leaves by (axes that cut them, axes along which they are gathered); wide: in
    float32 or wider, as gradients are summed."""
    found: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}
    for name, leaf in leaves.items():
        for x, axes in _cut_tensors(leaf, mesh.cuts.get(name, NOTHING)):
            key = (tuple(axes), tuple(mesh.gathered_along(name, axes)))
            found[key] = found.get(key, 0) + x.numel() * _element_bytes(x, wide)
    return found


def used_part(params: Mapping[str, Tree], mesh: Mesh, config: DecoderConfig) -> dict[str, Tree]:
    """Weights as a rank computes with them once they are gathered: of those of a block its part
    along the axis "tensor", vectors and low-rank factors included; whole heads in any case."""
    n = mesh.n_sharing(TENSOR)
    if n == 1:
        return dict(params)
    named = dims(config)

    def size_of(name: str, i: int, size: int) -> int:
        meaning = named[name][i]
        if layer_number(name) is None or mesh.plan.get(meaning) != TENSOR:
            return size
        unit = config.d_head if meaning == "heads" and size % config.d_head == 0 else 1
        return -(-size // (unit * n)) * unit

    def part(name: str, w: Tree) -> Tree:
        sizes = [size_of(name, i, size) for i, size in enumerate(w.shape)]
        if isinstance(w, Adapted):
            whole_m = w.m.narrow(0, 0, sizes[0]) if isinstance(w.m, Tensor) else w.m
            a, b = w.a.narrow(-1, 0, sizes[-1]), w.b.narrow(-2, 0, sizes[-2])
            return w._replace(w=part(name, w.w), a=a, b=b, m=whole_m)
        if not isinstance(w, Tensor) or sizes == [*w.shape]:
            return w
        return torch.empty(sizes, dtype=w.dtype, device=w.device, requires_grad=w.requires_grad)

    return {name: part(name, w) for name, w in params.items()}


def _element_bytes(x: Tensor, wide: bool) -> int:
    return max(4, x.element_size()) if wide else x.element_size()


def _part(shape: Sequence[int], axes: Mapping[str, int], mesh: Mesh) -> list[int]:
    """Shape of the largest part of a tensor; axes: the dim that each of them cuts."""
    part = list(shape)
    for axis, dim in axes.items():
        part[dim] = -(-part[dim] // mesh.axes[axis])
    return part


def _cut_tensors(leaf: Tree, axes: Mapping[str, int]) -> list[tuple[Tensor, Mapping[str, int]]]:
    """Tensors of a leaf and the dim of each that every axis cuts, for those of the weight itself.

    Every rank has the low-rank changes whole. What a quantized weight consists of is cut as
    sharding/placements.py cuts it: a list of all blocks along its only dim, by one axis.
    """
    if not axes or isinstance(leaf, Tensor):
        return [(x, axes) for x in tree.leaves(leaf)]
    if isinstance(leaf, Delta | Adapted):
        of_weight = _cut_tensors(leaf.w, axes) if isinstance(leaf, Adapted) else []
        return [*of_weight, *((x, NOTHING) for x in tree.leaves((leaf.a, leaf.b, leaf.m)))]
    n_dims = len(leaf.shape)
    return [(x, _axes_within(x, n_dims, axes)) for x in tree.leaves(leaf)]


def _axes_within(x: Tensor, n_dims: int, axes: Mapping[str, int]) -> Mapping[str, int]:
    if x.ndim != n_dims:
        axes = dict.fromkeys([*axes][:1], 0)
    return {axis: dim for axis, dim in axes.items() if x.ndim and x.shape[dim] > 1}
