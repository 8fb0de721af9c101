"""Check of the steps to record against those that the training stages take."""

from collections.abc import Sequence
from typing import Any

from minitune.errors import InputError
from minitune.programs.profiling.profile import Profile
from minitune.programs.stages.batches import tokenized
from minitune.programs.stages.train import Train
from minitune.programs.stages.training_notes import n_steps
from minitune.programs.state import AbstractState


def check_steps(
    profile: Profile | None, stages: Sequence[Any], abstract: AbstractState
) -> list[str]:
    """Lines on training stages that end before the last step to record.

    abstract: the state before the first stage. InputError where no stage takes all of the steps.
    """
    if profile is None:
        return []
    taken = {stage.label: _n_steps(stage, abstract) for stage in stages if isinstance(stage, Train)}
    keys = f"profile.steps = [{profile.steps[0]}, {profile.steps[1]}]"
    if not taken:
        raise InputError(
            f"program: {keys}, but no stage trains, expected a train stage; drop profile"
        )
    short = {label: n for label, n in taken.items() if n < profile.steps[1]}
    if len(short) == len(taken):
        counts = ", ".join(f"{label} takes {n:,} steps" for label, n in short.items())
        raise InputError(
            f"program: {keys}, but {counts}, expected steps that are taken; choose earlier ones"
        )
    return [
        f"note: {label} takes {n:,} steps, so that {keys} records none of it"
        for label, n in short.items()
    ]


def _n_steps(stage: Train, abstract: AbstractState) -> int:
    """Optimizer steps of a stage; its table is counted where it gives epochs."""
    if stage.epochs is None:
        return stage.steps
    return n_steps(stage, stage.epochs, tokenized(abstract, stage.data).n_rows)
