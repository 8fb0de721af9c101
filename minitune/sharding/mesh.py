"""Mesh of ranks: how many stand along each named axis."""

import math
from collections.abc import Collection, Mapping

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from typing_extensions import TypeAliasType

from minitune.errors import InputError, nearest
from minitune.types import PositiveInt

# axis -> ranks along it, the outermost axis first: neighbours along the last one are neighbours in
# the order of ranks, and so in one machine
Mesh = TypeAliasType("Mesh", Mapping[str, PositiveInt])

# axes whose ranks have rows of their own
PLAIN_AXES = ("replica", "data", "expert")
# axes whose ranks work on the same rows, each on some of the tokens. They exchange activations in
# every block, so they are the last axes of a mesh, whose ranks are neighbours.
ROW_SHARING = ("context", "tensor")


def n_ranks(mesh: Mesh) -> int:
    """Number of ranks of a mesh."""
    return math.prod(mesh.values())


def n_sharers(mesh: Mesh) -> int:
    """Number of neighbouring ranks that work on the same rows; InputError for a mesh in which they
    are no neighbours.
    """
    shared = [axis in ROW_SHARING for axis in mesh]
    if shared != sorted(shared):
        axes = ", ".join(mesh)
        last = [axis for axis in mesh if axis in ROW_SHARING]
        raise InputError(
            f"sharding: the mesh has the axes {axes}, expected {' and '.join(last)} last: ranks "
            "that work on the same rows are neighbours; change the order of the axes"
        )
    return math.prod(n for axis, n in mesh.items() if axis in ROW_SHARING)


def check_mesh(mesh: Mesh, cut_along: Collection[str], n: int) -> None:
    """InputError for an axis that means nothing, since no plan cuts along it, and for a mesh of
    another number of ranks than n.
    """
    known = [*PLAIN_AXES, *ROW_SHARING]
    for axis in mesh:
        if axis not in known and axis not in cut_along:
            raise InputError(
                f"sharding: the mesh has the axis {axis!r}, along which the plan cuts nothing, "
                f"expected one of {', '.join(known)}{nearest(axis, known)}"
            )
    if n_ranks(mesh) != n:
        axes = " x ".join(f"{axis} {along}" for axis, along in mesh.items())
        raise InputError(
            f"sharding: the mesh has {n_ranks(mesh)} ranks ({axes}), expected the {n} that "
            f"were started; start {n_ranks(mesh)}, or change an axis"
        )


def check_dealt_out(axis: str, n: int, things: str, n_things: int) -> None:
    """InputError if the n ranks of an axis can't have as many of n_things each; things: their words
    in the message.
    """
    fits = [i for i in range(1, n_things + 1) if n_things % i == 0]
    if n not in fits:
        raise InputError(
            f"sharding: the axis {axis} has {n} ranks, among which {things} are dealt out, "
            f"expected one of {', '.join(map(str, fits))}; put the other ranks on the axis data"
        )


def device_mesh(mesh: Mesh, device_type: str) -> DeviceMesh:
    """Process groups of a mesh over all ranks of the default group; InputError if that has another
    number of ranks. Every rank calls it.
    """
    check_mesh(mesh, mesh, dist.get_world_size())
    return init_device_mesh(device_type, tuple(mesh.values()), mesh_dim_names=tuple(mesh))
