"""Best trainable tree of a stage by its held-out loss, on the disk beside its saved states."""

from pathlib import Path

from minitune.checkpoint.state import load_state
from minitune.errors import InputError
from minitune.programs.stages.loop_state import LoopState
from minitune.programs.stages.training_stage import TrainingStage
from minitune.programs.state import PipelineState
from minitune.types import Trainable


def save_best(
    stage: TrainingStage,
    state: PipelineState,
    trainable: Trainable,
    loop: LoopState,
) -> None:
    """Save a tree as the best so far."""
    if state.state_writer is not None:
        tensors, meta = {"trainable": trainable}, {"loss_nats": loop.nats[0]}
        state.state_writer.save(_folder(stage, state), loop.step, tensors, meta, keep=2)


def load_best(
    stage: TrainingStage,
    state: PipelineState,
    trainable: Trainable,
    loop: LoopState,
) -> Trainable:
    """Best tree that was saved, or the given one if no loss was measured.

    InputError if none was finite.
    """
    (nats,), (step,) = loop.best_nats, loop.best_step
    if nats is None and loop.n_worse == 0:
        # evaluate was added to training that is over
        state.log.say(f"{stage.label}: no held-out loss was measured, the last step goes on")
        return trainable
    if nats is None:
        found = f"{stage.label} had no finite held-out loss in {loop.step} steps"
        raise InputError(f"stages: {found}; lower the learning rate")
    if state.savers is not None:
        path = _folder(stage, state) / f"step-{step:08d}"
        saved, _ = load_state(path, {"trainable": trainable}, state.savers)
        trainable = saved["trainable"]
    state.log.say(f"{stage.label}: step {step} was the best, held-out loss {nats:.4f}")
    return trainable if state.sharding is not None else state.ranks.from_first(trainable)


def _folder(stage: TrainingStage, state: PipelineState) -> Path:
    return state.folder / "checkpoints" / stage.label / "best"
