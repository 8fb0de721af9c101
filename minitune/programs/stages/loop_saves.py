"""Saved states of a training stage, and when its steps make no progress."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch

from minitune.checkpoint.state import list_states
from minitune.checkpoint.state_writer import state_writer
from minitune.errors import InputError
from minitune.hardware import is_accelerator, profiled
from minitune.programs.profiling import kinds
from minitune.programs.signals import Stopped
from minitune.programs.stages.loop_state import MAX_SKIPPED, SKIPPED_AT_END, LoopState
from minitune.programs.stages.training_stage import TrainingStage
from minitune.programs.state import PipelineState
from minitune.tree import Tree


def state_folder(stage: TrainingStage, state: PipelineState) -> Path:
    """Folder of the states that a stage saves."""
    return state.folder / "checkpoints" / stage.label


@contextmanager
def writing_states(
    stage: TrainingStage, state: PipelineState, device: torch.device
) -> Iterator[PipelineState]:
    """State with a writer of what a stage saves, which has committed it all when the block ends.

    device: that the model lies on.
    """
    chosen = stage.save_in_background
    in_background = is_accelerator(device) if chosen is None else chosen
    with state_writer(state.savers, in_background=in_background) as writer:
        yield state._replace(state_writer=writer)


def save_or_stop(
    stage: TrainingStage,
    state: PipelineState,
    train_state: Tree,
    loop: LoopState,
    is_save_due: bool,
    is_stopping: bool,
) -> bool:
    """Save the state if it is time for it; True if that has to wait for a step that is not skipped.

    Raises Stopped after a signal, when the state is saved, and InputError if too many steps changed
    nothing. Raises the error of an earlier save that has failed meanwhile.
    """
    if state.state_writer is not None:
        state.state_writer.settle()
    is_finished = loop.is_finished(stage)
    _require_progress(stage, state, loop, is_finished)
    is_skipping = loop.n_skipped_in_a_row > 0
    if is_stopping or is_finished or (is_save_due and not is_skipping):
        save(stage, state, train_state, loop)
    if is_stopping or is_finished:
        committed(state)
    if is_stopping and not is_finished:
        state.ranks.barrier()  # a launcher may end the first rank as soon as another one has ended
        raise Stopped(loop.step, state_folder(stage, state))
    return is_save_due and is_skipping


@profiled(kinds.SAVING)
def save(stage: TrainingStage, state: PipelineState, train_state: Tree, loop: LoopState) -> None:
    """Commit a state once its rows are on disk, now or in the background; drop older ones unless
    the last step was skipped."""
    if state.state_writer is None:
        return
    # A state that is counted from skipped steps must not push out the last one that still learned.
    keep = None if loop.n_skipped_in_a_row else stage.keep
    meta = {"loop": msgspec.to_builtins(loop)}
    folder, rows_first = state_folder(stage, state), state.log.sync
    state.state_writer.save(folder, loop.step, train_state, meta, keep, rows_first)


def committed(state: PipelineState) -> None:
    """Wait until all that is being saved is committed."""
    if state.state_writer is not None:
        state.state_writer.wait()


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
    committed(state)
    states = list_states(state_folder(stage, state))
    leaf = f", the first without a finite gradient being {loop.culprit}" if loop.culprit else ""
    kept = f"; {states[-1]} is the newest state that was saved" if states else ""
    raise InputError(
        f"stages: {stage.label} had {n_in_a_row} steps in a row without a finite gradient or a "
        f"target token, up to step {loop.step}, and {n_skipped} in all{leaf}; they changed "
        f"nothing{kept}. Lower the learning rate, or look at the data"
    )
