"""Ranks that a plan is made for: what is cut among them, and which rows they work on.

Who holds what is what sharding/placements.py says of a mesh and a plan. What is cut is gathered for
the block that computes with it, but where a rank computes with a part of a weight (along the axis
"tensor") or with some of the experts (along "expert"). All is said for the first rank: the others
have as much, or a little less where a dim does not divide.
"""

import math
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

from minitune.errors import InputError, cut
from minitune.models.config import DecoderConfig
from minitune.models.experts import owners
from minitune.models.parallel import check_sharing
from minitune.models.weights import dims, shapes
from minitune.planning.alike import layer_number
from minitune.sharding.experts import AXIS as EXPERT
from minitune.sharding.experts import EACH_ITS_PART, OwnerOf
from minitune.sharding.mesh import ROW_SHARING, check_mesh, n_ranks, n_sharers
from minitune.sharding.tensor_parallel import AXIS as TENSOR

AXIS = re.compile(r"([a-z][a-z_]*)=([1-9][0-9]{0,6})")
NOTHING: Mapping[str, int] = MappingProxyType({})


class Route(NamedTuple):
    """Way of a weight from where it lies to the blocks that compute with it."""

    along: tuple[str, ...] = ()  # axes along which its parts come together, in this order
    # rank along "expert" to which the parts of one expert's weight are sent; None: all need it
    owner: int | None = None

    @property
    def is_elsewhere(self) -> bool:
        """True for a weight that another rank than the first computes with."""
        return self.owner not in (None, 0)


WHOLE = Route()  # of what every rank has


def needed_everywhere(name: str) -> None:
    """No owner: every rank computes with the weight of this name."""


class Mesh(NamedTuple):
    """Ranks of a training along named axes, and the plan by which they hold weights."""

    axes: Mapping[str, int] = NOTHING  # axis -> ranks along it, the outermost first
    plan: Mapping[str, str] = MappingProxyType({})  # meaning of a dim -> axis that cuts it
    # number of the dim that each axis cuts, by the names of the weights that are cut; others lie
    # whole on every rank
    cuts: Mapping[str, Mapping[str, int]] = MappingProxyType({})
    # rank along "expert" that computes with a weight, by its name within a layer
    owner_of: OwnerOf = needed_everywhere
    shares_rows: bool = True  # False: ranks that share rows in training have whole ones

    @property
    def n_ranks(self) -> int:
        """Number of ranks."""
        return n_ranks(self.axes)

    @property
    def n_sharers(self) -> int:
        """Number of ranks that work on the same rows."""
        return math.prod(self.n_sharing(axis) for axis in ROW_SHARING)

    @property
    def n_shares(self) -> int:
        """Number of parts that the rows of a batch are dealt out in."""
        return self.n_ranks // self.n_sharers

    def n_sharing(self, axis: str) -> int:
        """Number of ranks along an axis that share rows or experts; shared rows are whole on each
        rank where they do not in this forward."""
        return self.axes.get(axis, 1) if self.shares_rows or axis not in ROW_SHARING else 1

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
        check_sharing(config, self.plan, self.axes)
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
        n_experts = self.axes.get(EXPERT, 1)
        owner_of = self.owner_of
        if config.experts is not None and n_experts > 1:
            owner_of = owners(config.experts, n_experts)
        return self._replace(cuts=cuts, owner_of=owner_of)

    def route(self, name: str, axes: Collection[str]) -> Route:
        """Route of a weight that these axes cut."""
        if not axes:
            return WHOLE
        along = [axis for axis in self.axes if axis in axes]
        if layer_number(name) is None:
            return Route(tuple(along))
        owner = self.owner_of(name.split(".", 3)[3])
        in_part = {TENSOR} if self.shares_rows else set[str]()
        if owner == EACH_ITS_PART:
            owner, in_part = None, {*in_part, EXPERT}
        along = [axis for axis in along if axis not in in_part]
        if owner is not None:
            # parts go to the owner first, and only there are they gathered along other axes
            to_owner = [axis for axis in along if axis == EXPERT]
            others = [axis for axis in along if axis != EXPERT]
            along = to_owner if owner else to_owner + others
        return Route(tuple(along), owner)


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


def ranks_in_words(axes: Mapping[str, int], plan: str | Mapping[str, str]) -> str:
    """Number of ranks, their plan and their mesh, as a reader meets them in lines of a run."""
    written = ",".join(f"{axis}={n}" for axis, n in axes.items())
    named = plan if isinstance(plan, str) else "of the program's own"
    return f"{n_ranks(axes)} ranks, plan {named}, mesh {written}"


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
