"""Start of a training stage where an earlier process left it: at the newest state in the run
folder."""

import hashlib
from pathlib import Path

import msgspec

from minitune.checkpoint.state import drop_old_states, list_states, load_state
from minitune.errors import InputError
from minitune.programs.stages.loop_state import LoopState, decode
from minitune.programs.stages.training_stage import Evaluation, TrainingStage
from minitune.programs.state import PipelineState
from minitune.sharding.ranks import Ranks
from minitune.tree import Tree


def continued(
    stage: TrainingStage,
    state: PipelineState,
    folder: Path,
    train_state: Tree,
    loop: LoopState,
) -> tuple[Tree, LoopState]:
    """(train_state, loop) of the newest state in a folder, or as they are given if it has none.

    InputError if the stage is to take fewer steps than that state has behind it.
    """
    if state.savers is not None:
        train_state, loop = _newest(stage, state, folder, train_state, loop, state.savers)
    if state.sharding is None:
        train_state = state.ranks.from_first(train_state)
    position = state.ranks.text_from_first(msgspec.json.encode(loop).decode())
    return train_state, msgspec.json.decode(position, type=LoopState)


def _newest(
    stage: TrainingStage,
    state: PipelineState,
    folder: Path,
    train_state: Tree,
    loop: LoopState,
    savers: Ranks,
) -> tuple[Tree, LoopState]:
    saved = _states(folder, savers)
    if not saved and stage.label in state.ended:
        found = f"{folder} holds no state, though {stage.label} was ended with one"
        raise InputError(f"stages: {found}; put it back, or set resume = false to begin afresh")
    if saved:
        train_state, meta = load_state(saved[-1], train_state, savers)
        loop = decode(meta, loop, saved[-1])
    loop = loop.measured_on(_heldout_hash(stage, state))
    if saved:
        is_ended = stage.label in state.ended and not loop.is_finished(stage)
        doing = "ended at" if is_ended else "continuing from"
        state.log.say(f"{stage.label}: {doing} step {loop.step} of {stage.steps}")
        if not is_ended:
            _require_steps(stage, loop)
        if state.ranks.is_first and not loop.n_skipped_in_a_row:
            drop_old_states(folder, stage.keep)  # those that a kill left behind
    state.log.rewind(loop.step)
    return train_state, loop


def _states(folder: Path, savers: Ranks) -> list[Path]:
    """Saved states, oldest first; the first rank looks before the others, because what a crash left
    half replaced takes its place again then.
    """
    if not savers.is_first:
        savers.barrier()
    states = list_states(folder)
    if savers.is_first:
        savers.barrier()
    return states


def evaluation(stage: TrainingStage, state: PipelineState) -> Evaluation | None:
    """Evaluation of a stage, which keeps what the user chose where the stage was ended early."""
    end = state.ended.get(stage.label)
    if end is None or stage.evaluate is None:
        return stage.evaluate
    return msgspec.structs.replace(stage.evaluate, keep="best" if end.state == "best" else "last")


def _heldout_hash(stage: TrainingStage, state: PipelineState) -> str:
    """Hash of the table that a stage evaluates on; nothing if it evaluates on none."""
    if stage.evaluate is None:
        return ""
    table = msgspec.json.encode(state.data.get(stage.evaluate.data))
    return hashlib.sha256(table).hexdigest()


def _require_steps(stage: TrainingStage, loop: LoopState) -> None:
    if loop.step > stage.steps:
        found = f"{stage.label} has taken {loop.step} steps"
        wanted = f"expected at most the {stage.steps} of its program"
        remedy = "give more steps or epochs, or set resume = false to begin afresh"
        raise InputError(f"stages: {found}, {wanted}; {remedy}")
