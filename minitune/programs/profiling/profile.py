"""Table [profile] of a program: the optimizer steps that are recorded, and their check."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from minitune.errors import InputError
from minitune.types import PositiveInt


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Record of where time and memory go in some steps of each training stage."""

    # first and last optimizer step to record, from 1 on: [10, 12] records three. The first steps of
    # a run are slower than those that follow.
    steps: tuple[PositiveInt, PositiveInt]

    def __str__(self) -> str:
        return f"profile.steps = [{self.steps[0]}, {self.steps[1]}]"


def check(profile: Profile | None, stages: Sequence[Any], n_steps: Mapping[str, int]) -> list[str]:
    """Lines on training stages that end before the last step to record.

    n_steps: optimizer steps by training stage. InputError for steps in the wrong order, and where
    every stage ends before the last of them.
    """
    if profile is None:
        return []
    first, last = profile.steps
    if first > last:
        raise InputError(
            f"program: {profile}, expected the first step before the last; write "
            f"profile.steps = [{last}, {first}]"
        )
    if not n_steps:
        ops = ", ".join(stage.label for stage in stages)
        raise InputError(
            f"program: {profile}, but no stage of {ops} trains, expected a train stage; drop "
            "profile"
        )
    short = {label: n for label, n in n_steps.items() if n < last}
    if len(short) == len(n_steps):
        counts = ", ".join(f"{label} takes {n:,} steps" for label, n in short.items())
        raise InputError(
            f"program: {profile}, but {counts}, expected steps that are taken; choose earlier ones"
        )
    return [
        f"note: {label} takes {n:,} steps, so {profile} records none of it"
        for label, n in short.items()
    ]
