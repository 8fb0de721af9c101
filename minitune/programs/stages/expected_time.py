"""Time that a run will still take, told once its first steps have been measured.

A step's time is that of the steps after the first one, which looks at every weight and compiles. An
estimate before any step, from FLOPs and the rate of a matrix product, was far off on small models,
see docs/decisions/0009-expected-time.md.
"""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from torch import Tensor

from minitune.programs.stages.batches import tokenized_table
from minitune.programs.stages.training_stage import TrainingStage
from minitune.programs.state import PipelineState
from minitune.types import Trainable

SKIPPED_STEPS, LEAST_STEPS = 1, 3  # that are not measured, and that are
LEAST_MEASURED_S = 2.0  # short steps vary: more of them are measured
LEAST_TOLD_S = 20.0  # what takes less needs no telling


class ExpectedTime:
    """Measurement of the first steps of a process, which ends with one line."""

    def __init__(
        self,
        stage: TrainingStage,
        heldout_tokens: Callable[[], int],
        forward_share: float,
        later: Callable[[], str],
    ) -> None:
        """heldout_tokens(): that an evaluation takes through the model; forward_share: of a step's
        time for each of them; later(): words on the stages that follow."""
        self._stage, self._heldout_tokens, self._later = stage, heldout_tokens, later
        self._forward_share = forward_share
        self._n_seen, self._time_s, self._n_tokens = 0, 0.0, 0
        self._is_told = False

    def after_step(self, step: int, time_s: float, n_tokens: int) -> str | None:
        """Line on the time that is left after a step that took time_s, once it is known."""
        self._n_seen += 1
        if self._is_told or self._n_seen <= SKIPPED_STEPS:
            return None
        self._time_s, self._n_tokens = self._time_s + time_s, self._n_tokens + n_tokens
        n_measured = self._n_seen - SKIPPED_STEPS
        if n_measured < LEAST_STEPS or self._time_s < LEAST_MEASURED_S or not self._n_tokens:
            return None
        self._is_told = True
        return self._line(step, self._time_s / n_measured)

    def _line(self, step: int, step_s: float) -> str | None:
        n_left = self._stage.steps - step
        n_evaluations = evaluations_left(self._stage, step)
        evaluation_s = self._evaluation_s() if n_evaluations else 0.0
        left_s = n_left * step_s + n_evaluations * evaluation_s
        if left_s < LEAST_TOLD_S:
            return None
        counted = f"{n_left:,} steps of {_short(step_s)}"
        if n_evaluations:
            counted += f" and {n_evaluations:,} evaluations of {_short(evaluation_s)}"
        return f"{self._stage.label}: {duration(left_s)} left for {counted}{self._later()}"

    def _evaluation_s(self) -> float:
        return self._heldout_tokens() * self._forward_share * self._time_s / self._n_tokens


def expected_time(stage: TrainingStage, state: PipelineState, n_models: int) -> ExpectedTime:
    """Measurement of the steps of a stage that trains, and evaluates, n_models at once."""
    loaded = state.loaded

    def heldout_tokens() -> int:
        assert stage.evaluate is not None, "there is nothing to evaluate on"
        name, text = stage.evaluate.data, (loaded.tokenizer, loaded.template)
        table = tokenized_table(name, state.data[name], *text, state.seed)
        return n_models * table.n_tokens

    def later() -> str:
        return later_stages(stage.label, state.stages, state.records)

    return ExpectedTime(stage, heldout_tokens, forward_share(loaded.trainable), later)


def forward_share(trainable: Trainable) -> float:
    """Part of a step that its forward takes: half where a frozen model has adapters, which spares
    the gradients of its weights, and a third where weights train whole."""
    trains_whole = any(isinstance(leaf, Tensor) for leaf in trainable.values())
    return 1 / 3 if trains_whole else 1 / 2


def evaluations_left(stage: TrainingStage, step: int) -> int:
    """Number of evaluations after a step, the one at the end included."""
    if stage.evaluate is None:
        return 0
    rest = range(step + 1, stage.steps + 1)
    return sum(stage.evaluate.is_due(one, stage.steps) for one in rest)


def later_stages(
    label: str,
    stages: Mapping[str, Any],
    records: Mapping[str, Mapping[str, Any]],
) -> str:
    """End of a line: the stages after one, and the time of those whose like has been run."""
    labels = list(stages)
    later = labels[labels.index(label) + 1 :] if label in labels else []
    told = []
    for one in later:
        time_s = _time_of_like(stages, records, one)
        told.append(one if time_s is None else f"{one} ({duration(time_s)}, as before)")
    return f"; then {', '.join(told)}" if told else ""


def _time_of_like(
    stages: Mapping[str, Any],
    records: Mapping[str, Mapping[str, Any]],
    label: str,
) -> float | None:
    """Time of a finished stage that differs from a later one by its name alone."""
    wanted = msgspec.structs.replace(stages[label], name=None)
    for other, record in records.items():
        is_like = other in stages and msgspec.structs.replace(stages[other], name=None) == wanted
        if is_like and "time_s" in record:
            return float(record["time_s"])
    return None


def duration(seconds: float) -> str:
    """Time as people say it: "about 40 s", "about 12 min", "about 3.5 h"."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} min"
    hours = seconds / 3600
    return f"about {hours:.1f} h" if hours < 48 else f"about {hours / 24:.1f} days"


def _short(seconds: float) -> str:
    """Time of one step or evaluation: "0.35 s", "12 s"."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return duration(seconds).removeprefix("about ")
