"""Work that is due after a step of a training stage, besides the next one."""

from typing import NamedTuple

import torch

from minitune.programs.profiling.recording import Recording
from minitune.programs.stages.loop_state import MAX_SKIPPED, LoopState
from minitune.programs.stages.queued_step import n_ahead
from minitune.programs.stages.training_stage import TrainingStage
from minitune.programs.state import PipelineState


class Due(NamedTuple):
    """Work that is due after a step, besides the next one."""

    evaluation: bool
    save: bool
    stop: bool  # a signal has come
    end: bool  # no step follows
    profile: bool  # recording begins or ends


def due_after(
    stage: TrainingStage, state: PipelineState, loop: LoopState, recording: Recording
) -> Due:
    """Work that is due after the step that was queued last."""
    is_last = loop.step == stage.steps
    evaluates = stage.evaluate is not None and stage.evaluate.is_due(loop.step, stage.steps)
    is_save_due, is_edge = loop.step % stage.save_every == 0, recording.is_edge(loop.step)
    return Due(evaluates, is_save_due, stop=state.is_stopping(), end=is_last, profile=is_edge)


def n_waiting(due: Due, loop: LoopState, device: torch.device) -> int:
    """Number of queued steps that need not be read yet.

    Nothing is evaluated or saved before every step is read: a saved state counts all that was
    measured.
    """
    if any(due) or loop.n_skipped_in_a_row >= MAX_SKIPPED:
        return 0
    return n_ahead(device)
