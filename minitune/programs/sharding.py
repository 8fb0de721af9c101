"""Weights of a run that its ranks share by a plan: which part each holds, and whole ones for what
the first rank writes.

Without a plan every rank holds the whole model. torch's DTensor takes half a second to import, so
it is imported where weights are cut.
"""

from collections.abc import Callable, Collection, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minitune import tree
from minitune.checkpoint.hf_weights import load_base
from minitune.io.json_file import read_json_object
from minitune.models.config import DecoderConfig
from minitune.models.hf_quantized import is_quantized
from minitune.models.model import Model
from minitune.models.weights import dims
from minitune.sharding.gather import gather
from minitune.sharding.parts import is_sharded
from minitune.sharding.ranks import Ranks
from minitune.tree import Tree
from minitune.types import Params

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
        from minitune.sharding.placements import axis_sizes, check_plan, cut_leaf

        named = dims(config)
        check_plan(self.plan, named, axis_sizes(self.mesh))

        def part(name: str, leaf: Tree) -> Tree:
            if any(map(is_sharded, tree.leaves(leaf))):
                return leaf
            return cut_leaf(name, leaf, named[name], self.plan, self.mesh)

        return part

    def fitted(self, model: Model) -> Model:
        """Model that knows which ranks share the tokens of its rows."""
        from minitune.sharding.tokens import shares_of

        return model._replace(shares=shares_of(self.mesh))


def cutting(sharding: Sharding | None, config: DecoderConfig) -> CutWeight:
    """Function that gives what this rank holds of a weight on the host, by its name: all of it
    without a sharding."""
    return (lambda name, leaf: leaf) if sharding is None else sharding.cut(config)


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
    from minitune.models.parallel import check_sharing
    from minitune.sharding.mesh import check_mesh, device_mesh, n_ranks, n_sharers
    from minitune.sharding.placements import check_plan
    from minitune.sharding.plans import named_plan

    sizes = dict(mesh) or {"data": ranks.size}
    shares_rows = n_sharers(sizes) > 1
    named = named_plan(plan) if isinstance(plan, str) else plan
    check_plan(named, dims(model.config), sizes)
    check_sharing(model.config, named, sizes)
    check_mesh(sizes, named.values(), n_ranks(sizes) if ranks.size == 1 else ranks.size)
    if ranks.size == 1 or not (named or shares_rows):
        return None
    return Sharding(named, device_mesh(sizes, device_type))


def stored_weights(
    path: Path | None, model: Model, kept: Collection[str], seed: int, cut: CutWeight
) -> Params:
    """Weights of a folder, mapped from its files, those of `kept` as codes where it has them; or
    random ones, which take memory: of them this rank keeps its part alone.
    """
    if path is not None:
        return load_base(path, model.shapes(), kept)
    return {name: cut(name, w) for name, w in model.init_each(seed)}


def placed(
    stored: Mapping[str, Any],
    names: Set[str],
    cut: CutWeight,
    device: torch.device,
    dtype: torch.dtype,
    count: Callable[[], object],
) -> dict[str, Any]:
    """Weights of these names as this rank holds them, on its device and in the dtype of compute.
    count: called for each stored weight.
    """
    params = {}
    for name, w in stored.items():
        if name in names:
            params[name] = cut(name, w).to(device, dtype)
        count()
    return params


def unread(
    stored: Params, here: Mapping[str, Any], path: Path | None, model: Model
) -> tuple[Params, dict[str, Any]]:
    """(stored weights, placed ones) that hold none of the pages which placing has read from the
    files, where any placed weight is a copy: the system would count them as memory of this process,
    in addition to the copies. What a folder holds as codes is not mapped from it, and stays.
    """
    of_file = {name for name, w in here.items() if w is stored[name]}
    if path is None or len(of_file) == len(here):
        return stored, dict(here)
    if is_quantized(read_json_object(path / "config.json", "loading")):
        return stored, dict(here)
    # one weight that is used as it is mapped would hold the whole file
    apart = {name: w.clone() if name in of_file else w for name, w in here.items()}
    return load_base(path, model.shapes(), ()), apart


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
