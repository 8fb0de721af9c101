"""Ranks to which the weights of a block go: all of them, but for the weights of experts, which go
to the rank that computes with them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitune.sharding.collectives import Gathering, begin_sending, end_gather, parts_from_owners
from minitune.sharding.experts import AXIS, EACH_ITS_PART, ExpertRanks
from minitune.sharding.parts import Cut, Placed, cuts_of
from minitune.types import widen


class WeightRoutes(NamedTuple):
    """Destinations of the leaves of one block."""

    in_part: tuple[str, ...] = ()  # axes along which blocks compute with parts
    expert_ranks: ExpertRanks | None = None
    owners: tuple[int | None, ...] = ()  # of each leaf, as experts.OwnerOf says; none: no experts

    def stays(self, leaf: int, axis: str) -> bool:
        """True for a leaf that is not gathered along an axis: this rank does not compute with it,
        or has its part of it.
        """
        if axis in self.in_part:
            return True
        owner = self.owners[leaf] if self.owners else None
        if owner is None or self.expert_ranks is None:
            return False
        return axis == AXIS or owner not in (EACH_ITS_PART, self.expert_ranks.place)

    def of(self, leaves: Sequence[int]) -> "WeightRoutes":
        """WeightRoutes of some of the leaves."""
        return self._replace(owners=tuple(self.owners[i] for i in leaves) if self.owners else ())

    def owned(self) -> dict[int, int]:
        """Owner of each leaf that one rank computes with."""
        owners = enumerate(self.owners)
        return {i: owner for i, owner in owners if owner not in (None, EACH_ITS_PART)}  # pyright: ignore[reportReturnType]


class _Sent(NamedTuple):
    """Leaves that are cut along the axis expert and go to one rank each."""

    group: Any
    cuts: dict[int, Cut]  # by the leaf's number
    owners: list[int]


def begin_to_owners(
    parts: Sequence[Tensor], placed: Sequence[Placed], routes: WeightRoutes
) -> Gathering | None:
    """Parts of experts' weights on their way to the ranks that compute with them; None if no leaf
    is sent so.
    """
    sent = _sent(placed, routes)
    if sent is None:
        return None
    cuts = [*sent.cuts.values()]
    return begin_sending([parts[i] for i in sent.cuts], cuts, sent.owners, sent.group)


def at_owners(
    parts: Sequence[Tensor], placed: Sequence[Placed], begun: Any, routes: WeightRoutes
) -> tuple[list[Tensor], Any]:
    """(parts that are whole along the axis expert where this rank computes with them, and empty
    where another one does; what else has begun to come).
    """
    sent = _sent(placed, routes)
    own = iter(() if sent is None else end_gather(begun))
    found = list(parts)
    for i, owner in routes.owned().items():
        if routes.expert_ranks is None or owner != routes.expert_ranks.place:
            found[i] = found[i].new_empty(0)
        elif sent is not None and i in sent.cuts:
            found[i] = next(own)
    return found, begun if sent is None else None


def from_owners(
    grads: Sequence[Tensor],
    shapes: Sequence[torch.Size],
    placed: Sequence[Placed],
    routes: WeightRoutes,
) -> list[Tensor]:
    """Gradients of this rank's parts, of these shapes, from those that are whole along the axis
    expert on the ranks that computed with the experts.
    """
    found = list(grads)
    for i, owner in routes.owned().items():
        if routes.expert_ranks is None or owner != routes.expert_ranks.place:
            # of a leaf that every rank has whole, only its owner has found a gradient
            found[i] = widen(grads[i]).new_zeros(shapes[i])
    sent = _sent(placed, routes)
    if sent is not None:
        wholes, of_parts = [grads[i] for i in sent.cuts], [shapes[i] for i in sent.cuts]
        cuts = [*sent.cuts.values()]
        parts = parts_from_owners(wholes, of_parts, cuts, sent.owners, sent.group)
        for i, part in zip(sent.cuts, parts, strict=True):
            found[i] = part
    return found


def _sent(placed: Sequence[Placed], routes: WeightRoutes) -> _Sent | None:
    owned = routes.owned()
    if not owned:
        return None
    numbers = [*owned]
    along = cuts_of([placed[i] for i in numbers], lambda leaf, axis: axis != AXIS)
    for group, cuts in along:
        leaves = [numbers[i] for i in cuts]
        return _Sent(
            group, dict(zip(leaves, cuts.values(), strict=True)), [owned[i] for i in leaves]
        )
    return None
