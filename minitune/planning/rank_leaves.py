"""Leaves of a model on a rank: parts that it holds, and what it has of them where it computes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minitune import tree
from minitune.planning.mesh import NOTHING, TENSOR, Mesh, Route
from minitune.tree import Tree
from minitune.types import Adapted, Delta


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
    """Bytes that the leaves whose parts come together have on a rank that computes with them."""
    return sum(
        math.prod(used_shape(x, axes, route, mesh)) * x.element_size()
        for x, axes, route in _routed(leaves, mesh)
        if route.along
    )


def gathering_bytes(leaves: Mapping[str, Tree], mesh: Mesh) -> int:
    """Bytes on a rank at the moment when the last parts of these leaves have come: the buffer of
    all parts, this rank's own in it, twice where another axis made that, and the wholes, which are
    the buffer itself where it holds the rows of one tensor.
    """
    routed, n_bytes = [*_routed(leaves, mesh)], 0
    for x, axes, route in routed:
        along = [axis for axis in route.along if axis in axes and mesh.axes[axis] > 1]
        if along:
            whole = math.prod(used_shape(x, axes, route, mesh)) * x.element_size()
            own = -(-whole // mesh.axes[along[-1]])
            is_buffer = len(routed) == 1 and axes[along[-1]] == 0
            n_bytes += (1 if is_buffer else 2) * whole + (1 if len(along) == 1 else 2) * own
    return n_bytes


def late_bytes(block: Mapping[str, Tree], mesh: Mesh) -> int:
    """Bytes, in float32 or wider, of the gradients of a block that are summed while the backward
    goes on: none where the weights of experts go to their owners (sharding/later.py)."""
    routed = [*_routed(block, mesh)]
    if any(route.owner is not None for _, _, route in routed):
        return 0
    return sum(
        math.prod(used_shape(x, axes, route, mesh)) * _element_bytes(x, wide=True)
        for x, axes, route in routed
        if route.along
    )


def used_bytes(leaves: Mapping[str, Tree], mesh: Mesh) -> int:
    """Bytes of the leaves that a rank computes with, as it does so."""
    return sum(
        math.prod(used_shape(x, axes, route, mesh)) * x.element_size()
        for x, axes, route in _routed(leaves, mesh)
    )


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


def bytes_by_route(
    leaves: Mapping[str, Tree], mesh: Mesh, *, wide: bool = False
) -> dict[tuple[tuple[str, ...], Route], int]:
    """Bytes, whole, of leaves by (axes that cut them, their route); wide: in float32 or wider, as
    gradients are summed."""
    found: dict[tuple[tuple[str, ...], Route], int] = {}
    for x, axes, route in _routed(leaves, mesh):
        key = (tuple(axes), route)
        found[key] = found.get(key, 0) + x.numel() * _element_bytes(x, wide)
    return found


def used_leaf(name: str, leaf: Tree, mesh: Mesh) -> Tree:
    """Leaf as a rank has it where its block computes: whole, or its part along axes on which blocks
    compute with parts, or nothing where another rank computes with it. Low-rank changes are whole.
    """
    if isinstance(leaf, Adapted):
        return leaf._replace(w=used_leaf(name, leaf.w, mesh))

    def like(x: Tensor, axes: Mapping[str, int]) -> Tensor:
        shape = used_shape(x, axes, mesh.route(name, axes), mesh)
        if shape == [*x.shape]:
            return x
        how: dict[str, Any] = {"device": x.device, "requires_grad": x.requires_grad}
        return torch.empty(shape, dtype=x.dtype, **how)

    found = _cut_tensors(leaf, mesh.cuts.get(name, NOTHING))
    return tree.rebuild(leaf, [like(x, axes) for x, axes in found])


def used_shape(x: Tensor, axes: Mapping[str, int], route: Route, mesh: Mesh) -> list[int]:
    """Shape of a tensor of a leaf where a rank computes; axes: the dim that each of them cuts."""
    if axes and route.is_elsewhere:
        return [0]
    return _part(x.shape, {axis: axes[axis] for axis in axes if axis not in route.along}, mesh)


def _routed(
    leaves: Mapping[str, Tree], mesh: Mesh
) -> Iterator[tuple[Tensor, Mapping[str, int], Route]]:
    """Tensors of leaves, the dim of each that every axis cuts, and its route."""
    for name, leaf in leaves.items():
        for x, axes in _cut_tensors(leaf, mesh.cuts.get(name, NOTHING)):
            yield x, axes, mesh.route(name, axes)


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
    sharding/placements.py cuts it: a list of all blocks along its only dim, by one axis, which is
    not tensor.
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
        axes = dict.fromkeys([axis for axis in axes if axis != TENSOR][:1], 0)
    return {axis: dim for axis, dim in axes.items() if x.ndim and x.shape[dim] > 1}
