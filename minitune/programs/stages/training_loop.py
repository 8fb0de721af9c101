"""Training loop of every training stage: data, steps, rows of the log, evaluations, saves, and when to stop.

A stage trains one model, or many adapters at once; what is counted for each of them is a tuple with an
entry for each. docs/stages.md walks through one step.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from minitune import hardware
from minitune.checkpoint.state import list_states, load_state, save_state
from minitune.data.cursor import Cursor
from minitune.errors import InputError
from minitune.programs.log import Log, Progress
from minitune.programs.stages.base import peak_mem_bytes
from minitune.programs.stages.training_stage import TrainingStage
from minitune.programs.state import PipelineState, Stopped
from minitune.tree import Tree, device_of
from minitune.types import Metrics

MAX_SKIPPED = 20  # steps in a row without a finite gradient after which a run stops

Row = dict[str, float | int]
MetricValues = Mapping[str, Sequence[float]]  # by name of the metric: a value for each model


class LoopState(msgspec.Struct, frozen=True):
    """Position of a training stage: it is saved with what trains, and enough to go on from there."""

    cursors: tuple[tuple[int, int], ...]  # of each order of the data
    nats: tuple[float | None, ...]  # at the last evaluation; None if it was not finite
    best_nats: tuple[float | None, ...]
    best_step: tuple[int, ...]
    n_skipped: tuple[int, ...]
    step: int = 0
    time_s: float = 0.0
    n_tokens: int = 0
    peak_mem_bytes: int = 0
    n_worse: int = 0  # evaluations in a row without a new best

    def after_queueing(self, cursors: Sequence[Cursor]) -> "LoopState":
        """State once one more step is queued, behind which the data goes on at `cursors`."""
        positions = tuple((cursor.epoch, cursor.row) for cursor in cursors)
        return msgspec.structs.replace(self, step=self.step + 1, cursors=positions)

    def after_reading(self, time_s: float, n_tokens: int, rows: Sequence[Row], mem_bytes: int) -> "LoopState":
        """State once the metrics of a step that took time_s are read."""
        return msgspec.structs.replace(
            self,
            time_s=self.time_s + time_s,
            n_tokens=self.n_tokens + n_tokens,
            n_skipped=tuple(n + int(row["skipped"]) for n, row in zip(self.n_skipped, rows, strict=True)),
            peak_mem_bytes=max(self.peak_mem_bytes, mem_bytes),
        )

    def after_evaluation(self, nats: Sequence[float]) -> tuple["LoopState", list[bool]]:
        """(state after an evaluation, for each of its losses whether it is a new best)."""
        improved = []
        best_nats, best_step = list(self.best_nats), list(self.best_step)
        for i, loss in enumerate(nats):
            best = best_nats[i]
            improved.append(math.isfinite(loss) and (best is None or loss < best))
            if improved[i]:
                best_nats[i], best_step[i] = loss, self.step
        loop = msgspec.structs.replace(
            self,
            nats=tuple(loss if math.isfinite(loss) else None for loss in nats),
            best_nats=tuple(best_nats),
            best_step=tuple(best_step),
            n_worse=0 if any(improved) else self.n_worse + 1,
        )
        return loop, improved

    def is_finished(self, stage: TrainingStage) -> bool:
        """True once all steps are taken, or the held-out loss has not improved for `patience` evaluations."""
        patience = stage.evaluate.patience if stage.evaluate else None
        return self.step >= stage.steps or (patience is not None and self.n_worse >= patience)

    def throughput(self) -> dict[str, float]:
        """First entries of a stage's record, which summary.json has at its top level."""
        return {
            "tokens_per_s": self.n_tokens / self.time_s,
            "peak_mem_bytes": self.peak_mem_bytes,
            "steps": self.step,
        }


class TrainingTask(NamedTuple):
    """Functions by which one training stage differs from another.

    train_state is a tree that holds what is trained under "trainable".
    """

    # cursors -> (a batch, where the next one begins)
    next_batch: Callable[[Sequence[Cursor]], tuple[Tree, list[Cursor]]]
    n_tokens: Callable[[Tree], int]
    # (train_state, batch) -> (train_state, metrics of the step, not yet read)
    step: Callable[[Tree, Tree], tuple[Tree, Metrics]]
    # (steps done, metrics that were read) -> rows of the log
    rows: Callable[[int, MetricValues], list[Row]]
    # train_state -> held-out losses
    evaluate: Callable[[Tree], list[float]]
    # (train_state, state of the loop, which losses are new bests) -> train_state
    keep_best: Callable[[Tree, LoopState, list[bool]], Tree]


class QueuedStep(NamedTuple):
    """Step that is queued on the device, and the function that waits for its metrics."""

    step: int
    n_tokens: int
    read: Callable[[], MetricValues]


class Due(NamedTuple):
    """Work that is due after a step, besides the next one."""

    evaluation: bool
    save: bool
    stop: bool  # a signal has come
    end: bool  # no step follows


def begin(n_models: int, n_orders: int = 1) -> LoopState:
    """State of n_models before the first step, which read the data in n_orders orders."""
    none, zeros = (None,) * n_models, (0,) * n_models
    return LoopState(((0, 0),) * n_orders, nats=none, best_nats=none, best_step=zeros, n_skipped=zeros)


def reading(metrics: Metrics) -> Callable[[], MetricValues]:
    """Begin to copy a step's metrics to the host, all at once; the function that is returned waits for them."""
    names, values = list(metrics), metrics.values()
    wide = reduce(torch.promote_types, (x.dtype for x in values), torch.float32)
    read = hardware.reading(torch.stack([x.reshape(-1).to(wide) for x in values]))
    return lambda: dict(zip(names, read().tolist(), strict=True))


def row(stage: TrainingStage, done: int, metrics: Mapping[str, float]) -> Row:
    """Row of the log for one step, under the names that dashboards expect."""
    lr = stage.optimizer.lr * float(stage.schedule.factor(torch.tensor(done - 1), stage.steps))
    rest = {name: value for name, value in metrics.items() if name != "loss_nats"}
    return {"loss": metrics["loss_nats"], "lr": lr, **rest}


def train(
    stage: TrainingStage,
    state: PipelineState,
    train_state: Tree,
    loop: LoopState,
    prepare: Callable[[], TrainingTask],
) -> tuple[Tree, LoopState]:
    """(train_state, loop) when the stage is finished; it goes on from the newest state in the run folder.

    prepare() is skipped if the run had already finished the stage. Raises Stopped after a signal, when the
    state is saved, and InputError after MAX_SKIPPED steps in a row that changed nothing.
    """
    saved = list_states(_state_folder(stage, state))
    if saved:
        train_state, meta = load_state(saved[-1], train_state)
        loop = msgspec.convert(meta["loop"], LoopState)
        state.log.say(f"{stage.label}: continuing from step {loop.step} of {stage.steps}")
    state.log.rewind(loop.step)
    if loop.is_finished(stage):
        return train_state, loop
    task = prepare()
    with state.log.progress(stage.label, stage.steps, loop.step) as progress:
        return _take_steps(stage, state, task, train_state, loop, progress)


def _state_folder(stage: TrainingStage, state: PipelineState) -> Path:
    return state.folder / "checkpoints" / stage.label


def _take_steps(
    stage: TrainingStage,
    state: PipelineState,
    task: TrainingTask,
    train_state: Tree,
    loop: LoopState,
    progress: Progress,
) -> tuple[Tree, LoopState]:
    device = device_of(state.loaded.params, train_state["trainable"])
    # An accelerator gets its next step before the metrics of the last one are read, so that it never waits.
    n_ahead = 1 if hardware.is_accelerator(device) else 0
    queue: deque[QueuedStep] = deque()
    n_skipped, last_read = 0, 0.0
    while not loop.is_finished(stage):
        if not queue:
            last_read = time.perf_counter()
        train_state, loop, queued = _queue_step(task, train_state, loop)
        queue.append(queued)
        due = _due(stage, state, loop)

        # Nothing is evaluated or saved before every step is read: a saved state counts all that was measured.
        while len(queue) > (0 if any(due) or n_skipped >= MAX_SKIPPED else n_ahead):
            queued = queue.popleft()
            rows = task.rows(queued.step, queued.read())
            now = time.perf_counter()
            loop = loop.after_reading(now - last_read, queued.n_tokens, rows, peak_mem_bytes(device))
            rates = {"tokens_per_second": queued.n_tokens / (now - last_read), "mem_bytes": loop.peak_mem_bytes}
            last_read = now
            _show(progress, queued.step, rows, rates)

            # The last row that is read waits for the evaluation, because it carries the held-out loss.
            nats = None
            if due.evaluation and not queue:
                train_state, loop, nats = _evaluate(task, train_state, loop)
            _log(state.log, queued.step, rows, rates, nats)
            n_skipped = _skipped_in_a_row(n_skipped, rows)

        is_stopping = due.stop or (not queue and state.stopping())
        _save_or_stop(stage, state, train_state, loop, due.save, is_stopping, n_skipped)
    return train_state, loop


def _queue_step(task: TrainingTask, train_state: Tree, loop: LoopState) -> tuple[Tree, LoopState, QueuedStep]:
    batch, cursors = task.next_batch([Cursor(*cursor) for cursor in loop.cursors])
    train_state, metrics = task.step(train_state, batch)
    loop = loop.after_queueing(cursors)
    return train_state, loop, QueuedStep(loop.step, task.n_tokens(batch), reading(metrics))


def _due(stage: TrainingStage, state: PipelineState, loop: LoopState) -> Due:
    is_last = loop.step == stage.steps
    evaluates = stage.evaluate is not None and (is_last or loop.step % stage.evaluate.every == 0)
    return Due(evaluates, save=loop.step % stage.save_every == 0, stop=state.stopping(), end=is_last)


def _evaluate(task: TrainingTask, train_state: Tree, loop: LoopState) -> tuple[Tree, LoopState, list[float]]:
    nats = task.evaluate(train_state)
    loop, improved = loop.after_evaluation(nats)
    return task.keep_best(train_state, loop, improved), loop, nats


def _show(progress: Progress, step: int, rows: Sequence[Row], rates: Row) -> None:
    best = min(rows, key=lambda row: row["loss"])
    progress.update(step, {"loss": best["loss"], "lr": best["lr"], **rates})


def _log(log: Log, step: int, rows: Sequence[Row], rates: Row, nats: Sequence[float] | None) -> None:
    for i, values in enumerate(rows):
        heldout = {"heldout_loss": nats[i]} if nats is not None else {}
        log.metrics(step, {**values, **rates, **heldout})


def _skipped_in_a_row(n_skipped: int, rows: Sequence[Row]) -> int:
    """Steps in a row that changed no model; once there are too many, a good one that was queued before does not reset it."""
    if n_skipped >= MAX_SKIPPED or all(values["skipped"] for values in rows):
        return n_skipped + 1
    return 0


def _save_or_stop(
    stage: TrainingStage,
    state: PipelineState,
    train_state: Tree,
    loop: LoopState,
    is_save_due: bool,
    is_stopping: bool,
    n_skipped: int,
) -> None:
    """Save the state if it is time for it; Stopped after a signal, InputError if too many steps changed nothing."""
    folder = _state_folder(stage, state)
    is_finished = loop.is_finished(stage)
    if is_save_due or is_stopping or is_finished or n_skipped >= MAX_SKIPPED:
        save_state(folder, loop.step, train_state, {"loop": msgspec.to_builtins(loop)})
    if is_stopping and not is_finished:
        raise Stopped(loop.step, folder)
    if n_skipped >= MAX_SKIPPED:
        raise InputError(
            f"stages: {stage.label} had {MAX_SKIPPED} steps in a row without a finite gradient or a target token, "
            f"up to step {loop.step}; they changed nothing. Lower the learning rate, or look at the data"
        )
