"""Position of a training stage: counters and cursors that are saved with what trains."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from minitune.data.cursor import Cursor
from minitune.errors import InputError
from minitune.programs.stages.training_stage import TrainingStage

MAX_SKIPPED = 20  # steps in a row without a finite gradient after which a run stops
SKIPPED_AT_END = 2  # steps in a row at the end of a stage after which it is no success

RECENT = 50  # steps: few enough to show where training ends, many enough to smooth
SUMMARIZED = ("loss", "reward_accuracy", "reward_margin")

Row = dict[str, float | int]
MetricValues = Mapping[str, Sequence[float]]  # by name of the metric: a value for each model


class LoopState(msgspec.Struct, frozen=True):
    """Position of a training stage: it is saved with what trains, and enough to go on from
    there."""

    cursors: tuple[tuple[int, int], ...]  # of each order of the data
    nats: tuple[float | None, ...]  # at the last evaluation; None if it was not finite
    best_nats: tuple[float | None, ...]
    best_step: tuple[int, ...]
    n_skipped: tuple[int, ...]
    step: int = 0
    time_s: float = 0.0
    n_tokens: int = 0
    peak_mem_bytes: int = 0
    n_worse: int = 0  # evaluations in a row without a new best (by more than min_delta)
    n_skipped_in_a_row: int = 0  # steps that changed no model, up to this one
    # of the last RECENT steps that changed a model, for each model: what summary.json has means of
    recent: tuple[tuple[Row, ...], ...] = ()
    heldout: str = ""  # hash of the table that the losses were measured on
    culprit: str = ""  # the first leaf whose gradient was not finite in the last step that had one
    unlogged_rows: str = ""  # rows as JSON that wait for an evaluation that a signal broke off

    def after_queueing(self, cursors: Sequence[Cursor]) -> "LoopState":
        """State once one more step is queued, behind which the data goes on at `cursors`."""
        positions = tuple((cursor.epoch, cursor.row) for cursor in cursors)
        return msgspec.structs.replace(self, step=self.step + 1, cursors=positions)

    def after_reading(
        self,
        time_s: float,
        n_tokens: int,
        rows: Sequence[Row],
        mem_bytes: int,
    ) -> "LoopState":
        """State once the metrics of a step that took time_s are read."""
        skipped = [int(values["skipped"]) for values in rows]
        return msgspec.structs.replace(
            self,
            time_s=self.time_s + time_s,
            n_tokens=self.n_tokens + n_tokens,
            n_skipped=tuple(n + one for n, one in zip(self.n_skipped, skipped, strict=True)),
            n_skipped_in_a_row=self._skipped_in_a_row(rows),
            recent=self._with_recent(rows),
            peak_mem_bytes=max(self.peak_mem_bytes, mem_bytes),
        )

    def _with_recent(self, rows: Sequence[Row]) -> tuple[tuple[Row, ...], ...]:
        before = self.recent or ((),) * len(rows)
        pairs = zip(before, rows, strict=True)
        return tuple(_with_row(kept, row) for kept, row in pairs)

    def training_record(self, model: int = 0) -> dict[str, float]:
        """Entries of a record on the last steps of a model: the loss of the last one, and means
        over the last RECENT of the loss and of the accuracy of rewards."""
        rows = self.recent[model] if self.recent else ()
        if not rows:
            return {}
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        record = {"last_loss": rows[-1]["loss"], "mean_loss": means.pop("loss")}
        return {**record, **means, "n_mean_steps": len(rows)}

    def _skipped_in_a_row(self, rows: Sequence[Row]) -> int:
        # Once there are too many, a good step that was queued before does not reset the count.
        is_over = self.n_skipped_in_a_row >= MAX_SKIPPED
        if is_over or all(values["skipped"] for values in rows):
            return self.n_skipped_in_a_row + 1
        return 0

    @property
    def is_measured(self) -> bool:
        """True once there was an evaluation."""
        return self.n_worse > 0 or any(loss is not None for loss in self.best_nats)

    def after_evaluation(
        self,
        nats: Sequence[float],
        min_delta: float = 0.0,
    ) -> tuple["LoopState", list[bool]]:
        """(state after an evaluation, for each of its losses whether it is a new best).

        A new best resets n_worse if it is lower than the one before it by more than min_delta.
        """
        improved = []
        is_better = False
        best_nats, best_step = list(self.best_nats), list(self.best_step)
        for i, loss in enumerate(nats):
            best = best_nats[i]
            improved.append(math.isfinite(loss) and (best is None or loss < best))
            if improved[i]:
                is_better = is_better or best is None or best - loss > min_delta
                best_nats[i], best_step[i] = loss, self.step
        loop = msgspec.structs.replace(
            self,
            nats=tuple(loss if math.isfinite(loss) else None for loss in nats),
            best_nats=tuple(best_nats),
            best_step=tuple(best_step),
            n_worse=0 if is_better else self.n_worse + 1,
        )
        return loop, improved

    def measured_on(self, heldout: str) -> "LoopState":
        """State for evaluations on a table: losses that were measured on another one are dropped,
        because they can't be compared."""
        if not heldout or self.heldout in ("", heldout):
            return msgspec.structs.replace(self, heldout=heldout or self.heldout)
        none = (None,) * len(self.nats)
        return msgspec.structs.replace(
            self,
            nats=none,
            best_nats=none,
            best_step=(0,) * len(self.nats),
            n_worse=0,
            heldout=heldout,
        )

    def is_finished(self, stage: TrainingStage) -> bool:
        """True once all steps are taken, or the held-out loss has not improved for `patience`
        evaluations."""
        patience = stage.evaluate.patience if stage.evaluate else None
        return self.step >= stage.steps or (patience is not None and self.n_worse >= patience)

    def end_record(self, stage: TrainingStage) -> dict[str, int]:
        """Entries of the record of a stage that was ended before its last step; none of another."""
        if self.is_finished(stage):
            return {}
        return {"ended_at_step": self.step, "planned_steps": stage.steps}

    def stage_record(self, stage: TrainingStage) -> dict[str, Any]:
        """Record of a stage that trained one model."""
        best = {}
        if stage.evaluate is not None:
            best = {"best_step": self.best_step[0], "best_heldout_nats": self.best_nats[0]}
        return {
            "top": self.throughput(),
            "time_s": self.time_s,
            "n_skipped": self.n_skipped[0],
            "steps": self.step,
            **best,
            **self.training_record(),
            **self.end_record(stage),
        }

    def throughput(self) -> dict[str, float]:
        """First entries of a stage's record, which summary.json has at its top level."""
        return {
            "tokens_per_s": self.n_tokens / self.time_s,
            "peak_mem_bytes": self.peak_mem_bytes,
            "steps": self.step,
        }


def _with_row(kept: tuple[Row, ...], row: Row) -> tuple[Row, ...]:
    """Last RECENT rows, of each the part that a record has means of."""
    if row["skipped"]:
        return kept
    summarized = {name: row[name] for name in SUMMARIZED if name in row}
    return (*kept, summarized)[-RECENT:]


def begin(n_models: int, n_orders: int = 1) -> LoopState:
    """State of n_models before the first step, which read the data in n_orders orders."""
    none, zeros = (None,) * n_models, (0,) * n_models
    cursors = ((0, 0),) * n_orders
    return LoopState(cursors, nats=none, best_nats=none, best_step=zeros, n_skipped=zeros)


def decode(meta: Mapping[str, Any], begin: LoopState, path: Path) -> LoopState:
    """State of the loop that was saved in `path`; begin: that of the same stage before its first
    step.

    InputError for one that is of another shape, or of another number of models or orders of the
    data.
    """
    try:
        loop = msgspec.convert(meta.get("loop"), LoopState)
    except (ValueError, msgspec.ValidationError) as error:
        raise _unfit(path, str(error)) from None
    for name in ("cursors", "nats", "best_nats", "best_step", "n_skipped"):
        n_saved, n_wanted = len(getattr(loop, name)), len(getattr(begin, name))
        if n_saved != n_wanted:
            raise _unfit(path, f"{n_saved} {name} in place of {n_wanted}")
    return loop


def _unfit(path: Path, found: str) -> InputError:
    return InputError(
        f"checkpoint: {path / 'state.json'} is of another program ({found}), expected the counters "
        f"of this stage; remove {path} to continue from the step before"
    )
