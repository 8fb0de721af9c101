"""Placements: which part of a weight each rank holds, from what the dims of the weight mean.

A plan maps the meaning of a dim to an axis of the mesh: {"d_ff": "data"} cuts every matrix along
its dim d_ff, into one part for each rank of the axis. Parts are those of torch's Shard: all have
ceil(size / ranks) rows but the last ones, which have what is left, or nothing.

Importing this takes more than half a second, for torch's DTensor: runs of one process leave it out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from typing_extensions import TypeAliasType

from minitune import tree
from minitune.errors import InputError, nearest
from minitune.sharding import experts
from minitune.sharding.mesh import PLAIN_AXES, ROW_SHARING, Mesh
from minitune.sharding.parts import Placed, cut_part
from minitune.sharding.tensor_parallel import AXIS
from minitune.tree import Tree
from minitune.types import Params

# meaning of a dim -> axis of the mesh that it is cut along
Plan = TypeAliasType("Plan", Mapping[str, str])
# weight -> meaning of each of its dims, as models.weights.dims gives it
DimsByName = TypeAliasType("DimsByName", Mapping[str, tuple[str, ...]])


def check_plan(plan: Plan, dims: DimsByName, mesh: Mesh) -> None:
    """InputError for an entry of the plan that cuts no matrix of the model, or along no axis of the
    mesh, and for a matrix with two dims on one axis.
    """
    known = sorted({dim for found in dims.values() if len(found) > 1 for dim in found})
    for dim, axis in plan.items():
        if dim not in known:
            if dim == "experts":
                raise InputError(
                    f"sharding: the plan cuts {dim!r}, which no matrix of this model has: it is no "
                    f"mixture, expected one of {', '.join(known)}; take a plan such as fsdp"
                )
            raise InputError(
                f"sharding: the plan cuts {dim!r}, which no matrix of this model has, expected one "
                f"of {', '.join(known)}{nearest(dim, known)}"
            )
        if axis not in mesh:
            raise InputError(
                f"sharding: the plan puts {dim} on axis {axis!r}, expected an axis of the mesh: "
                f"{', '.join(mesh)}{nearest(axis, [*mesh]) or _mesh_with(axis, mesh)}"
            )
    experts.check_axis(plan, mesh)
    for name, found in dims.items():
        _cut_dims(name, None, found, plan)


def placements(
    name: str, shape: Sequence[int], dims: tuple[str, ...], plan: Plan, mesh: Mesh
) -> tuple[Placement, ...]:
    """Placement of a weight along each axis of the mesh: Shard of the dim that the plan puts there,
    or Replicate. A vector stays whole on every rank: it is small, and its gather would take as long
    to begin as that of a matrix.

    InputError if two of its dims are on one axis.
    """
    if len(dims) != len(shape):
        raise TypeError(
            f"sharding: {name} {list(shape)} has dims {', '.join(dims)}, expected one for each of "
            "its shape"
        )
    cut = _cut_dims(name, shape, dims, plan)
    if len(dims) == 3 and experts.AXIS in cut and dims[cut[experts.AXIS]] == "experts":
        experts.check_experts(shape[cut[experts.AXIS]], mesh[experts.AXIS])
    return tuple(Shard(cut[axis]) if axis in cut else Replicate() for axis in mesh)


def part_shape(shape: Sequence[int], placed: Sequence[Placement], mesh: Mesh) -> tuple[int, ...]:
    """Shape of the largest part of a weight that a rank holds."""
    part = list(shape)
    for placement, n in zip(placed, mesh.values(), strict=True):
        dim = sharded_dim(placement)
        if dim is not None:
            part[dim] = -(-part[dim] // n)
    return tuple(part)


def shard(params: Params, dims: DimsByName, plan: Plan, mesh: DeviceMesh) -> dict[str, Any]:
    """Parameters of which this rank holds its part: each leaf that the plan cuts becomes a DTensor
    of its part, every other one stays as it is. Nothing is sent: each rank has the whole leaves.

    The parts share no memory with what they were cut from, and codes and scales of a quantized
    weight are cut by the same dim. dims: of the whole model. Where the whole leaves are more than a
    rank can hold, `cut_leaf` cuts one at a time.
    """
    check_plan(plan, dims, axis_sizes(mesh))
    return {name: cut_leaf(name, leaf, dims[name], plan, mesh) for name, leaf in params.items()}


def cut_leaf(name: str, leaf: Tree, dims: tuple[str, ...], plan: Plan, mesh: DeviceMesh) -> Tree:
    """Part of this rank of one weight, dense or quantized, as a plan cuts it; the leaf as it is if
    no axis does. InputError for codes that a rank could not multiply with by themselves.
    """
    sizes = axis_sizes(mesh)
    placed = placements(name, leaf.shape, dims, plan, sizes)
    check_codes(name, leaf, placed, sizes)
    return shard_leaf(leaf, placed, mesh)


def shard_leaf(leaf: Tree, placed: Sequence[Placement], mesh: DeviceMesh) -> Tree:
    """Part of this rank of a weight, dense or quantized, as DTensors; the leaf as it is if no axis
    cuts it.
    """
    shape, axes = leaf.shape, mesh.mesh_dim_names or ()
    return tree.map(lambda x: _part(x, _placed_within(x, shape, placed, axes), mesh), leaf)


def check_codes(name: str, leaf: Tree, placed: Sequence[Placement], mesh: Mesh) -> None:
    """InputError for a quantized weight whose scales the axis tensor would part from its codes."""
    dim = dict(zip(mesh, map(sharded_dim, placed), strict=True)).get(AXIS)
    if isinstance(leaf, Tensor) or dim is None:
        return
    n, scale = mesh[AXIS], leaf.scale
    is_list = scale.ndim == 1  # of groups that begin in one row and end in the next
    is_grouped = not is_list and scale.shape[dim] not in (1, leaf.shape[dim])
    if is_list or (is_grouped and scale.shape[dim] % n):
        scheme = type(leaf).__name__.removeprefix("Q").lower()
        raise InputError(
            f"sharding: {name} {list(leaf.shape)} is of {scheme}, whose scales the {n} ranks "
            "of the axis tensor can't share out, expected int8, or groups that divide by the "
            'ranks; take plan = "fsdp", or quantize to int8'
        )


def axis_sizes(mesh: DeviceMesh) -> dict[str, int]:
    """Ranks along each axis of torch's mesh, by name."""
    return dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))


def sharded_dim(placement: Placement) -> int | None:
    """Dim that a placement cuts, None for a copy."""
    return getattr(placement, "dim", None)


def _mesh_with(axis: str, mesh: Mesh) -> str:
    """Words on a mesh that has one more axis; none for an axis that only the plan knows."""
    if axis not in (*PLAIN_AXES, *ROW_SHARING):
        return ""
    sizes: dict[str, object] = {**mesh, axis: "N"}
    # where all ranks are on the axis data, as they are without a mesh, they move to the new one
    if list(mesh) == ["data"]:
        sizes = {"data": 1, axis: mesh["data"] if mesh["data"] > 1 else "N"}
    written = ", ".join(f"{one} = {n}" for one, n in sizes.items())
    return f"; write mesh = {{ {written} }} for the ranks along each axis, or take another plan"


def _cut_dims(
    name: str, shape: Sequence[int] | None, dims: tuple[str, ...], plan: Plan
) -> dict[str, int]:
    """Number of the dim that each axis cuts."""
    cut: dict[str, int] = {}
    if len(dims) < 2:
        return cut
    for i, dim in enumerate(dims):
        axis = plan.get(dim)
        if axis is None:
            continue
        if axis in cut and axis == experts.AXIS and dims[cut[axis]] == "experts":
            continue  # a tensor of all experts is cut along them alone
        if axis in cut:
            size = "" if shape is None else f" {list(shape)}"
            other = dims[cut[axis]]
            raise InputError(
                f"sharding: {name}{size} has {other} and {dim} on axis {axis!r} both, expected one "
                f"dim on an axis; leave {other} or {dim} out of the plan, or put it on another axis"
            )
        cut[axis] = i
    return cut


def _placed_within(
    x: Tensor, shape: Sequence[int], placed: Sequence[Placement], axes: Sequence[str]
) -> tuple[Placement, ...]:
    """Placements of one tensor of a leaf: those of the weight where x has its dims, but for a dim
    of size 1, such as that of scales. A list of all blocks is cut by itself, by one axis along
    which it is whole again where ranks compute.
    """
    if x.shape == torch.Size(shape):
        return tuple(placed)
    found: list[Placement] = []
    for placement, axis in zip(placed, axes, strict=True):
        dim = sharded_dim(placement)
        if dim is not None and x.ndim != len(shape):
            is_cut_already = any(sharded_dim(one) is not None for one in found)
            dim = None if is_cut_already or axis == AXIS else 0
        is_cut = dim is not None and x.ndim > 0 and x.shape[dim] > 1
        found.append(Shard(dim) if is_cut else Replicate())
    return tuple(found)


def _part(x: Tensor, placed: tuple[Placement, ...], mesh: DeviceMesh) -> Tensor:
    if all(sharded_dim(placement) is None for placement in placed):
        return x
    stride = torch.empty(x.shape, device="meta").stride()
    return cut_part(x, Placed(mesh, placed, x.shape, stride))
