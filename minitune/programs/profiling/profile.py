"""Table [profile] of a program: the optimizer steps that are recorded."""

import msgspec

from minitune.errors import InputError
from minitune.types import PositiveInt


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Record of where time and memory go in some steps of each training stage."""

    # first and last optimizer step to record, from 1 on: [10, 12] records three. The first steps of
    # a run are slower than those that follow.
    steps: tuple[PositiveInt, PositiveInt]

    def __post_init__(self) -> None:
        first, last = self.steps
        if first > last:
            raise InputError(
                f"steps is [{first}, {last}], expected the first step before the "
                f"last; write [{last}, {first}]"
            )
