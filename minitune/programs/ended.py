"""Training that a user has ended before its last step: which state goes on, kept in the run
folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from minitune.checkpoint.state import list_states, state_step
from minitune.errors import InputError
from minitune.io.json_file import read_json

FILE = "ended.json"
Chosen = Literal["newest", "best"]
REMEDY = "remove it to continue the training"


class Ended(msgspec.Struct, frozen=True):
    """End of one training stage by `minitune finish`."""

    step: int  # that the newest state has behind it
    state: Chosen  # that goes on to the stages after it


class _SavedLoop(msgspec.Struct, frozen=True):
    """Held-out losses in the file of a saved state."""

    best_nats: tuple[float | None, ...] = ()


class _SavedState(msgspec.Struct, frozen=True):
    loop: _SavedLoop = _SavedLoop()


def read_ended(folder: Path) -> dict[str, Ended]:
    """Stages that were ended in a run folder, by name; none without the file."""
    path = folder / FILE
    return read_json(path, dict[str, Ended], "runs", REMEDY) if path.exists() else {}


def end_training(
    folder: Path,
    stages: Mapping[str, Any],
    finished: Mapping[str, Any],
    chosen: Chosen,
) -> dict[str, Ended]:
    """Stage of a run that is to end where it stands, by name; none if all training is finished.

    stages: the training stages by name, in order; finished: the stages that have a record.
    InputError without a saved state, and without an evaluation where one has to choose.
    """
    label = next((name for name in stages if name not in finished), None)
    if label is None:
        return {}
    states = list_states(folder / "checkpoints" / label)
    if not states:
        found = f"{folder} has no saved state of {label}"
        raise InputError(f"runs: {found}, expected one to finish with; run its program longer")
    loop = read_json(states[-1] / "state.json", _SavedState, "checkpoint", REMEDY).loop
    is_evaluated = any(loss is not None for loss in loop.best_nats)
    if chosen == "best" and not (is_evaluated and stages[label].evaluate.keep == "best"):
        found = f"{folder} has kept no best state of {label}"
        wanted = 'expected evaluate = { keep = "best" } and an evaluation'
        raise InputError(f"runs: {found}, {wanted}; leave out --best")
    if stages[label].sweep is not None and not is_evaluated:
        found = f"{label} of {folder} has not evaluated its adapters yet"
        raise InputError(f"runs: {found}, expected their losses to choose by; run it longer")
    return {label: Ended(state_step(states[-1]), chosen)}
