"""Ranks that a plan is made for: among how many a weight is divided, and how many copies there are.

The fully sharded data parallelism of Zhao et al. 2023, arXiv 2304.11277, and its hybrid form.
"""

import re
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from minitune import tree
from minitune.errors import InputError, cut
from minitune.tree import Tree

# dp: every rank has all; fsdp: all is divided among all ranks; hsdp: among those of one axis, and
# copied along the other
PlanName = Literal["dp", "fsdp", "hsdp"]
AXIS = re.compile(r"(data|replica)=([1-9][0-9]{0,6})")


class Mesh(NamedTuple):
    """Ranks of a training: those that divide weights, times the copies of such a group."""

    n_shards: int = 1
    n_replicas: int = 1

    @property
    def n_ranks(self) -> int:
        """Number of ranks."""
        return self.n_shards * self.n_replicas


ALONE = Mesh()


def mesh_of(written: str, plan: str | None = None) -> Mesh:
    """Mesh of axes such as "data=8,replica=16" under a plan; without one, weights are divided along
    the axis data. InputError for what is no mesh, and for a plan that does not go with it."""
    axes: dict[str, int] = {}
    for part in written.split(","):
        found = AXIS.fullmatch(part.strip())
        if found is None or found[1] in axes:
            raise InputError(
                f"plan: the mesh {cut(written)} has {cut(part)!r}, expected axes once each as in "
                "data=8,replica=16; correct it"
            )
        axes[found[1]] = int(found[2])
    data, replica = axes.get("data", 1), axes.get("replica", 1)
    if plan is not None and plan not in get_args(PlanName):
        known = ", ".join(get_args(PlanName))
        raise InputError(f"plan: {cut(plan)!r} is no plan, expected one of {known}; correct it")
    if plan == "dp":
        return Mesh(1, data * replica)
    if plan == "fsdp":
        return Mesh(data * replica, 1)
    if plan == "hsdp" and 1 in (data, replica):
        raise InputError(
            f"plan: hsdp on the mesh {written} has one axis, expected two as in data=8,replica=16; "
            "give both, or take fsdp"
        )
    return Mesh(data, replica)


def local_part(leaves: Tree, n_shards: int) -> Tree:
    """Largest parts of tensors whose first dimension is divided among n_shards, as torch.chunk
    divides it, on the meta device; those of no dimension stay whole."""

    def part(x: Tensor) -> Tensor:
        shape = (-(-x.shape[0] // n_shards), *x.shape[1:]) if x.ndim else x.shape
        return torch.empty(shape, dtype=x.dtype, device="meta")

    return tree.map(part, leaves)


def local_bytes(leaves: Tree, n_shards: int) -> int:
    """Bytes of these parts."""
    return sum(
        x.numel() // x.shape[0] * -(-x.shape[0] // n_shards) * x.element_size()
        if x.ndim and x.shape[0]
        else x.numel() * x.element_size()
        for x in tree.leaves(leaves)
    )
