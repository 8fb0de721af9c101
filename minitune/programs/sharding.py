"""Weights of a run that its ranks share by a plan: which part each holds, and whole ones for what
the first rank writes.

Without a plan every rank holds the whole model. torch's DTensor takes half a second to import, so
it is imported where weights are cut.
"""

from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

import torch

from minitune import tree
from minitune.models.config import DecoderConfig
from minitune.models.model import Model
from minitune.models.weights import dims
from minitune.sharding.gather import gather
from minitune.sharding.parts import is_sharded
from minitune.sharding.ranks import Ranks
from minitune.tree import Tree

CutWeight = Callable[
    [str, Tree], Tree
]  # (name, a weight on the host) -> what this rank holds of it


class Sharding(NamedTuple):
    """Plan of a run on the mesh of its ranks."""

    plan: Mapping[str, str]
    mesh: Any  # torch's DeviceMesh

    def cut(self, config: DecoderConfig) -> CutWeight:
        """Function that gives the part of this rank, on its device, of a weight of a model, dense
        or quantized; one that is cut already stays. InputError for a plan that does not fit it.
        """
        from minitune.sharding.placements import axis_sizes, check_plan, placements, shard_leaf

        named, sizes = dims(config), axis_sizes(self.mesh)
        check_plan(self.plan, named, sizes)

        def part(name: str, leaf: Tree) -> Tree:
            if any(map(is_sharded, tree.leaves(leaf))):
                return leaf
            placed = placements(name, leaf.shape, named[name], self.plan, sizes)
            return shard_leaf(leaf, placed, self.mesh)

        return part

    def fitted(self, model: Model) -> Model:
        """Model that knows which ranks share the tokens of its rows."""
        from minitune.sharding.context import context_of

        return model._replace(context=context_of(self.mesh))


def sharding_of(
    plan: str | Mapping[str, str],
    mesh: Mapping[str, int],
    ranks: Ranks,
    model: Model,
    device_type: str,
) -> Sharding | None:
    """Plan of a program on the ranks of its run; None where every rank holds the whole model and
    has rows of its own.

    mesh: ranks along each axis; without any, all stand on the axis "data". InputError for a plan
    that does not fit the model or the mesh, in a single process too, and for a mesh of another
    number of ranks. Every rank calls it.
    """
    if plan == "dp" and not mesh:
        return None
    from minitune.sharding.context import check_heads
    from minitune.sharding.experts import check_experts
    from minitune.sharding.mesh import check_mesh, device_mesh, n_ranks, n_sharers
    from minitune.sharding.placements import check_plan
    from minitune.sharding.plans import named_plan

    sizes = dict(mesh) or {"data": ranks.size}
    shares_rows = n_sharers(sizes) > 1
    named = named_plan(plan) if isinstance(plan, str) else plan
    check_plan(named, dims(model.config), sizes)
    if model.config.experts is not None:
        check_experts(model.config.experts.n_experts, sizes.get("expert", 1))
    check_heads(model.config.n_heads, sizes.get("context", 1))
    check_mesh(sizes, named.values(), n_ranks(sizes) if ranks.size == 1 else ranks.size)
    if ranks.size == 1 or not (named or shares_rows):
        return None
    return Sharding(named, device_mesh(sizes, device_type))


def placed(
    stored: Mapping[str, Any],
    names: Set[str],
    cut: CutWeight | None,
    device: torch.device,
    dtype: torch.dtype,
    count: Callable[[], object],
) -> dict[str, Any]:
    """Weights of these names on their device, in the dtype of compute; with `cut`, the part of this
    rank of each. count: called for each stored weight.
    """
    params = {}
    for name, w in stored.items():
        if name in names:
            own = w if cut is None else cut(name, w)
            params[name] = own.to(device, dtype)
        count()
    return params


def whole_on_host(leaves: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Leaves with whole tensors in the host's memory in place of parts, one gathered at a time.

    Every rank calls it; the first one alone keeps them, and the others what they had.
    """

    def whole(leaf: Tree) -> Tree:
        if not any(map(is_sharded, tree.leaves(leaf))):
            return leaf
        found = tree.map(lambda x: x.detach().cpu(), gather(leaf))
        return found if ranks.is_first else leaf

    return {name: whole(leaf) for name, leaf in leaves.items()}
