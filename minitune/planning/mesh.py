"""Ranks that a plan is made for: among how many a weight is divided, and how many copies there are.

The fully sharded data parallelism of Zhao et al. 2023, arXiv 2304.11277, and its hybrid form.
"""

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from minitune import tree
from minitune.errors import InputError, cut
from minitune.models.config import DecoderConfig
from minitune.models.weights import dims, shapes
from minitune.tree import Tree
from minitune.types import Adapted, Delta

# dp: every rank has all; fsdp: all is divided among all ranks; hsdp: among those of one axis, and
# copied along the other
PlanName = Literal["dp", "fsdp", "hsdp"]
AXIS = re.compile(r"(data|replica)=([1-9][0-9]{0,6})")


class Mesh(NamedTuple):
    """Ranks of a training: those that divide weights, times the copies of such a group."""

    n_shards: int = 1
    n_replicas: int = 1
    # number of the dim that is divided, by the names of the weights that are; others lie whole on
    # every rank
    cuts: Mapping[str, int] = MappingProxyType({})

    @property
    def n_ranks(self) -> int:
        """Number of ranks."""
        return self.n_shards * self.n_replicas

    def for_model(self, config: DecoderConfig) -> "Mesh":
        """Mesh with the dims that the plan fsdp of configs/plans cuts of a model's weights."""
        if self.n_shards == 1:
            return self
        # torch's DTensor takes more than half a second to import
        from minitune.sharding.placements import placements, sharded_dim
        from minitune.sharding.plans import named_plan

        plan, axes, named = named_plan("fsdp"), {"data": self.n_shards}, dims(config)
        cuts = {}
        for name, shape in shapes(config).items():
            (placed,) = placements(name, shape, named[name], plan, axes)
            dim = sharded_dim(placed)
            if dim is not None:
                cuts[name] = dim
        return self._replace(cuts=cuts)


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


def local_part(leaves: Mapping[str, Tree], mesh: Mesh) -> dict[str, Tree]:
    """Largest parts of leaves that a rank holds, by the names of their weights and on the meta
    device: those of torch's Shard."""
    return {
        name: tree.rebuild(
            leaf,
            [
                torch.empty(_local_shape(x.shape, dim, mesh.n_shards), dtype=x.dtype, device="meta")
                for x, dim in _divided(leaf, mesh.cuts.get(name))
            ],
        )
        for name, leaf in leaves.items()
    }


def local_bytes(leaves: Mapping[str, Tree], mesh: Mesh) -> int:
    """Bytes of these parts."""
    return sum(
        math.prod(_local_shape(x.shape, dim, mesh.n_shards)) * x.element_size()
        for name, leaf in leaves.items()
        for x, dim in _divided(leaf, mesh.cuts.get(name))
    )


def divided_bytes(leaves: Mapping[str, Tree], mesh: Mesh) -> int:
    """Bytes, whole, of those leaves that are divided."""
    return sum(
        x.numel() * x.element_size()
        for name, leaf in leaves.items()
        for x, dim in _divided(leaf, mesh.cuts.get(name))
        if dim is not None
    )


def _local_shape(shape: Sequence[int], dim: int | None, n: int) -> tuple[int, ...]:
    return tuple(-(-size // n) if i == dim else size for i, size in enumerate(shape))


def _divided(leaf: Tree, dim: int | None) -> list[tuple[Tensor, int | None]]:
    """Tensors of a leaf and the dim of each that is divided, where the weight is along dim.

    Every rank has the low-rank changes whole. Lists of blocks of a quantized weight are cut along
    their only dim.
    """
    if dim is None or isinstance(leaf, Tensor):
        return [(x, dim) for x in tree.leaves(leaf)]
    if isinstance(leaf, Delta | Adapted):
        of_weight = _divided(leaf.w, dim) if isinstance(leaf, Adapted) else []
        return [*of_weight, *((x, None) for x in tree.leaves((leaf.a, leaf.b, leaf.m)))]
    n_dims = len(leaf.shape)
    return [(x, _dim_within(x, n_dims, dim)) for x in tree.leaves(leaf)]


def _dim_within(x: Tensor, n_dims: int, dim: int) -> int | None:
    dim = dim if x.ndim == n_dims else 0
    return dim if x.ndim and x.shape[dim] > 1 else None
