"""Training loop of every training stage: data, steps, rows of the log, evaluations, saves, and when
to stop.

A stage trains one model, or many adapters at once; what is counted for each of them is a tuple with
an entry for each. docs/stages.md walks through one step.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import torch

from minitune import tree
from minitune.data.cursor import Cursor
from minitune.hardware import profiled
from minitune.programs.log import Log
from minitune.programs.profiling import kinds
from minitune.programs.profiling.recording import Recording
from minitune.programs.progress import Progress
from minitune.programs.signals import Stopped
from minitune.programs.stages.base import peak_mem_bytes
from minitune.programs.stages.continued import continued
from minitune.programs.stages.due import due_after, n_waiting
from minitune.programs.stages.expected_time import expected_time
from minitune.programs.stages.loop_saves import (
    committed,
    save,
    save_or_stop,
    state_folder,
    writing_states,
)
from minitune.programs.stages.loop_state import LoopState, MetricValues, Row
from minitune.programs.stages.queued_step import QueuedStep, reading
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
    # (step, what is trained, its batch), before the step is taken
    watch: Callable[[int, Tree, Tree], None]


def row(stage: TrainingStage, done: int, metrics: Mapping[str, float]) -> Row:
    """Row of the log for one step, under the names that dashboards expect."""
    lr = stage.optimizer.lr * float(stage.schedule.factor(torch.tensor(done - 1), stage.steps))
    others = metrics.keys() - {"loss_nats", "not_finite"}
    rest = {name: value for name, value in metrics.items() if name in others}
    return {"loss": metrics["loss_nats"], "lr": lr, **rest}


def train(
    stage: TrainingStage,
    state: PipelineState,
    train_state: Tree,
    loop: LoopState,
    prepare: Callable[[PipelineState], TrainingTask],
) -> tuple[Tree, LoopState]:
    """(train_state, loop) when the stage is finished; it goes on from the newest state in the run
    folder.

    prepare(state), of the state with its writer, is skipped if the run had already finished the
    stage. Raises Stopped after a signal, when the state is saved, and InputError after MAX_SKIPPED
    steps in a row that changed nothing.
    """
    folder = state_folder(stage, state)
    train_state, loop = continued(stage, state, folder, train_state, loop)
    if stage.label in state.ended:
        return train_state, loop
    if loop.is_finished(stage) and not loop.unlogged_rows:
        return train_state, loop
    if _measures_at_start(stage, loop):
        state.log.rewind(-1)  # the row of an evaluation that was not saved
    device = device_of(state.loaded.params, train_state["trainable"])
    with writing_states(stage, state, device) as state:
        with state.stopping.at_once(loop.step, folder):
            task = _with_ranges(prepare(state))
        # From here on a signal waits until the state can be saved.
        shown = state.log.progress(stage.label, stage.steps, loop.step)
        recording = Recording(stage, state, device)
        with state.stopping.after_step(), shown as progress, recording:
            if _measures_at_start(stage, loop):
                train_state, loop = _evaluate_at_start(stage, state, task, train_state, loop)
            if loop.unlogged_rows:
                train_state, loop = _finish_evaluation(stage, state, task, train_state, loop)
            return _take_steps(stage, state, task, train_state, loop, progress, recording)


def _take_steps(
    stage: TrainingStage,
    state: PipelineState,
    task: TrainingTask,
    train_state: Tree,
    loop: LoopState,
    progress: Progress,
    recording: Recording,
) -> tuple[Tree, LoopState]:
    queue: deque[QueuedStep] = deque()
    last_read, owes_save = 0.0, False
    expected = expected_time(stage, state, len(loop.nats))
    while not loop.is_finished(stage):
        if not queue:
            recording.begin(loop.step + 1)
            last_read = time.perf_counter()
        train_state, loop, queued = _queue_step(task, train_state, loop)
        queue.append(queued)
        due = due_after(stage, state, loop, recording)

        while len(queue) > n_waiting(due, loop, recording.device):
            queued = queue.popleft()
            rows, loop = _read(stage, state, task, train_state, queued, loop)
            now = time.perf_counter()
            time_s, last_read = now - last_read, now
            line = expected.after_step(queued.step, time_s, queued.n_tokens)
            if line is not None:
                state.log.say(line)
            rows, loop = _timed(progress, recording, queued, rows, loop, time_s)

            # The last row that is read waits for the evaluation, because it carries the held-out
            # loss.
            if due.evaluation and not queue:
                train_state, loop, rows = _evaluate(stage, state, task, train_state, loop, rows)
            _log(state.log, queued.step, rows)

        is_stopping = due.stop or (not queue and state.is_stopping())
        is_save_due = due.save or owes_save
        owes_save = save_or_stop(stage, state, train_state, loop, is_save_due, is_stopping)
    return train_state, loop


def _timed(
    progress: Progress,
    recording: Recording,
    queued: QueuedStep,
    rows: Sequence[Row],
    loop: LoopState,
    time_s: float,
) -> tuple[list[Row], LoopState]:
    """(rows with the speed of a step that took time_s, loop after it); both are shown.

    A profile whose last step this is ends here.
    """
    mem_bytes = peak_mem_bytes(recording.device)
    loop = loop.after_reading(time_s, queued.n_tokens, rows, mem_bytes)
    rates = {
        "tokens_per_second": queued.n_tokens / time_s,
        "mem_bytes": loop.peak_mem_bytes,
        "current_epoch": queued.epoch,
    }
    show_step(progress, queued.step, rows, rates, loop)
    recording.end(queued.step)
    return [{**values, **rates} for values in rows], loop


def _read(
    stage: TrainingStage,
    state: PipelineState,
    task: TrainingTask,
    train_state: Tree,
    queued: QueuedStep,
    loop: LoopState,
) -> tuple[list[Row], LoopState]:
    """(rows of a step, loop with the leaf that it was skipped for); waits for its metrics.

    The first of several skipped steps in a row is said.
    """
    metrics = queued.read()
    rows = task.rows(queued.step, metrics)
    numbers = [int(number) for number in metrics.get("not_finite", ()) if number >= 0]
    culprit = ""
    if numbers:
        culprit = [path for path, _ in tree.items(train_state["trainable"])][min(numbers)]
        loop = msgspec.structs.replace(loop, culprit=culprit)
    if not loop.n_skipped_in_a_row and all(values["skipped"] for values in rows):
        why = f"gradient of {culprit} is not finite" if culprit else "no target, or no finite loss"
        state.log.say(f"{stage.label}: step {queued.step} changed nothing: {why}")
    return rows, loop


def _queue_step(
    task: TrainingTask, train_state: Tree, loop: LoopState
) -> tuple[Tree, LoopState, QueuedStep]:
    epoch = loop.cursors[0][0]
    batch, cursors = task.next_batch(loop.step, [Cursor(*cursor) for cursor in loop.cursors])
    task.watch(loop.step + 1, train_state["trainable"], batch)
    train_state, metrics = task.step(train_state, batch)
    loop = loop.after_queueing(cursors)
    return train_state, loop, QueuedStep(loop.step, epoch, task.n_tokens(batch), reading(metrics))


def _with_ranges(task: TrainingTask) -> TrainingTask:
    """Task whose functions are named ranges of a profile."""
    return task._replace(
        next_batch=profiled(kinds.DATA)(task.next_batch),
        step=profiled(kinds.STEP)(task.step),
        evaluate=profiled(kinds.EVALUATING)(task.evaluate),
    )


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
    folder = state_folder(stage, state)
    try:
        with state.stoppable(loop.step, folder):
            nats = task.evaluate(train_state)
    except Stopped:
        # The rows are saved with the state, so that a resumed run measures the loss first and then
        # logs them.
        unlogged = msgspec.structs.replace(loop, unlogged_rows=json.dumps(rows))
        save(stage, state, train_state, unlogged)
        committed(state)
        raise Stopped(loop.step, folder) from None
    assert stage.evaluate is not None, "an evaluation has its table"
    loop, improved = loop.after_evaluation(nats, stage.evaluate.min_delta)
    say_heldout(state.log, stage.label, loop, nats)
    train_state = task.keep_best(train_state, loop, improved)
    rows = [{**values, "heldout_loss": loss} for values, loss in zip(rows, nats, strict=True)]
    return train_state, loop, rows


def _measures_at_start(stage: TrainingStage, loop: LoopState) -> bool:
    """True if the stage evaluates before its first step and has not done so."""
    at_start = stage.evaluate is not None and stage.evaluate.at_start
    return at_start and loop.step == 0 and not loop.unlogged_rows and not loop.is_measured


def _evaluate_at_start(
    stage: TrainingStage,
    state: PipelineState,
    task: TrainingTask,
    train_state: Tree,
    loop: LoopState,
) -> tuple[Tree, LoopState]:
    """(train_state, loop) with the held-out loss of step 0, which counts as any other."""
    n_models = len(loop.nats)
    rows: list[Row] = [{"adapter": i} for i in range(n_models)] if n_models > 1 else [{}]
    train_state, loop, rows = _evaluate(stage, state, task, train_state, loop, rows)
    _log(state.log, loop.step, rows)
    return train_state, loop


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
    save_or_stop(stage, state, train_state, loop, is_save_due=True, is_stopping=state.is_stopping())
    return train_state, loop


def _log(log: Log, step: int, rows: Sequence[Row]) -> None:
    for values in rows:
        log.metrics(step, values)
