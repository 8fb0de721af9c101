"""Training loop of every training stage: data, steps, rows of the log, evaluations, saves, and when to stop.

A stage trains one model, or many adapters at once; what is counted for each of them is a tuple with an
entry for each. docs/stages.md walks through one step.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from minitune import hardware
from minitune.checkpoint.state import list_states, save_state
from minitune.data.cursor import Cursor
from minitune.errors import InputError
from minitune.programs.log import Log
from minitune.programs.progress import Progress
from minitune.programs.signals import Stopped
from minitune.programs.stages.base import peak_mem_bytes
from minitune.programs.stages.continued import continued
from minitune.programs.stages.loop_state import (
    MAX_SKIPPED,
    SKIPPED_AT_END,
    LoopState,
    MetricValues,
    Row,
)
from minitune.programs.stages.step_lines import say_heldout, show_step
from minitune.programs.stages.training_stage import TrainingStage
from minitune.programs.state import PipelineState
from minitune.tree import Tree, device_of
from minitune.types import Metrics


class TrainingTask(NamedTuple):
    """Functions by which one training stage differs from another.

    train_state is a tree that holds what is trained under "trainable".
    """

    # (steps done, cursors) -> (a batch, where the next one begins)
    next_batch: Callable[[int, Sequence[Cursor]], tuple[Tree, list[Cursor]]]
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
    folder = _state_folder(stage, state)
    train_state, loop = continued(stage, state, folder, train_state, loop)
    if stage.label in state.ended:
        return train_state, loop
    if loop.is_finished(stage) and not loop.unlogged_rows:
        return train_state, loop
    with state.stopping.at_once(loop.step, folder):
        task = prepare()
    # From here on a signal waits until the state can be saved.
    shown = state.log.progress(stage.label, stage.steps, loop.step)
    with state.stopping.after_step(), shown as progress:
        if loop.unlogged_rows:
            train_state, loop = _finish_evaluation(stage, state, task, train_state, loop)
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
    last_read, owes_save = 0.0, False
    while not loop.is_finished(stage):
        if not queue:
            last_read = time.perf_counter()
        train_state, loop, queued = _queue_step(task, train_state, loop)
        queue.append(queued)
        due = _due(stage, state, loop)

        # Nothing is evaluated or saved before every step is read: a saved state counts all that was measured.
        while len(queue) > (0 if any(due) or loop.n_skipped_in_a_row >= MAX_SKIPPED else n_ahead):
            queued = queue.popleft()
            rows = task.rows(queued.step, queued.read())
            now = time.perf_counter()
            loop = loop.after_reading(now - last_read, queued.n_tokens, rows, peak_mem_bytes(device))
            rates = {"tokens_per_second": queued.n_tokens / (now - last_read), "mem_bytes": loop.peak_mem_bytes}
            last_read = now
            show_step(progress, queued.step, rows, rates, loop)

            # The last row that is read waits for the evaluation, because it carries the held-out loss.
            rows = [{**values, **rates} for values in rows]
            if due.evaluation and not queue:
                train_state, loop, rows = _evaluate(stage, state, task, train_state, loop, rows)
            _log(state.log, queued.step, rows)

        is_stopping = due.stop or (not queue and state.stopping())
        is_save_due = due.save or owes_save
        owes_save = _save_or_stop(stage, state, train_state, loop, is_save_due, is_stopping)
    return train_state, loop


def _queue_step(task: TrainingTask, train_state: Tree, loop: LoopState) -> tuple[Tree, LoopState, QueuedStep]:
    batch, cursors = task.next_batch(loop.step, [Cursor(*cursor) for cursor in loop.cursors])
    train_state, metrics = task.step(train_state, batch)
    loop = loop.after_queueing(cursors)
    return train_state, loop, QueuedStep(loop.step, task.n_tokens(batch), reading(metrics))


def _due(stage: TrainingStage, state: PipelineState, loop: LoopState) -> Due:
    is_last = loop.step == stage.steps
    evaluates = stage.evaluate is not None and (is_last or loop.step % stage.evaluate.every == 0)
    return Due(evaluates, save=loop.step % stage.save_every == 0, stop=state.stopping(), end=is_last)


def _evaluate(
    stage: TrainingStage,
    state: PipelineState,
    task: TrainingTask,
    train_state: Tree,
    loop: LoopState,
    rows: Sequence[Row],
) -> tuple[Tree, LoopState, list[Row]]:
    """(train_state, loop, rows with their held-out losses); Stopped after a signal, when the state
    is saved."""
    folder = _state_folder(stage, state)
    try:
        with state.stopping.at_once(loop.step, folder):
            nats = task.evaluate(train_state)
    except Stopped:
        # The rows are saved with the state, so that a resumed run measures the loss first and then
        # logs them.
        unlogged = msgspec.structs.replace(loop, unlogged_rows=json.dumps(rows))
        _save(stage, state, train_state, unlogged)
        raise Stopped(loop.step, folder) from None
    loop, improved = loop.after_evaluation(nats)
    say_heldout(state.log, stage.label, loop, nats)
    train_state = task.keep_best(train_state, loop, improved)
    rows = [{**values, "heldout_loss": loss} for values, loss in zip(rows, nats, strict=True)]
    return train_state, loop, rows


def _finish_evaluation(
    stage: TrainingStage,
    state: PipelineState,
    task: TrainingTask,
    train_state: Tree,
    loop: LoopState,
) -> tuple[Tree, LoopState]:
    """(train_state, loop) after the evaluation that a signal broke off, with its rows logged."""
    rows = json.loads(loop.unlogged_rows)
    loop = msgspec.structs.replace(loop, unlogged_rows="")
    train_state, loop, rows = _evaluate(stage, state, task, train_state, loop, rows)
    _log(state.log, loop.step, rows)
    _save_or_stop(stage, state, train_state, loop, is_save_due=True, is_stopping=state.stopping())
    return train_state, loop


def _log(log: Log, step: int, rows: Sequence[Row]) -> None:
    for values in rows:
        log.metrics(step, values)


def _save_or_stop(
    stage: TrainingStage,
    state: PipelineState,
    train_state: Tree,
    loop: LoopState,
    is_save_due: bool,
    is_stopping: bool,
) -> bool:
    """Save the state if it is time for it; True if that has to wait for a step that is not skipped.

    Raises Stopped after a signal, when the state is saved, and InputError if too many steps changed
    nothing.
    """
    is_finished = loop.is_finished(stage)
    _require_progress(stage, state, loop, is_finished)
    is_skipping = loop.n_skipped_in_a_row > 0
    if is_stopping or is_finished or (is_save_due and not is_skipping):
        _save(stage, state, train_state, loop)
    if is_stopping and not is_finished:
        raise Stopped(loop.step, _state_folder(stage, state))
    return is_save_due and is_skipping


def _save(stage: TrainingStage, state: PipelineState, train_state: Tree, loop: LoopState) -> None:
    """Commit a state whose rows are on disk; drop older ones unless the last step was skipped."""
    # A state that is counted from skipped steps must not push out the last one that still learned.
    keep = None if loop.n_skipped_in_a_row else stage.keep
    meta = {"loop": msgspec.to_builtins(loop)}
    state.log.sync()
    save_state(_state_folder(stage, state), loop.step, train_state, meta, keep)


def _require_progress(
    stage: TrainingStage,
    state: PipelineState,
    loop: LoopState,
    is_finished: bool,
) -> None:
    """InputError if too many steps in a row changed nothing, or if a finished stage ends with such
    steps."""
    n_in_a_row, n_skipped = loop.n_skipped_in_a_row, min(loop.n_skipped)
    is_failure = n_in_a_row >= SKIPPED_AT_END or 2 * n_skipped > loop.step
    if n_in_a_row < MAX_SKIPPED and not (is_finished and is_failure):
        return
    states = list_states(_state_folder(stage, state))
    kept = f"; {states[-1]} is the newest state that was saved" if states else ""
    raise InputError(
        f"stages: {stage.label} had {n_in_a_row} steps in a row without a finite gradient or a "
        "target token, "
        f"up to step {loop.step}, and {n_skipped} in all; they changed nothing{kept}. "
        "Lower the learning rate, or look at the data"
    )
