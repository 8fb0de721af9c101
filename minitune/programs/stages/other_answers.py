"""Sample answers of the state of training that does not go on: the last one where the best goes on,
or the best where the last does.

The report shows them beside those of the evaluations, whose model is the one that goes on.
"""

from typing import Any

import torch

from minitune.data.source import PREFERENCE_FORMATS
from minitune.errors import InputError
from minitune.programs.stages.best_state import load_best
from minitune.programs.stages.evaluate import Eval
from minitune.programs.stages.loop_state import LoopState
from minitune.programs.stages.training_stage import TrainingStage
from minitune.programs.state import PipelineState
from minitune.sharding.ranks import ALONE
from minitune.types import Trainable

KEY = "other_answers"  # of a stage's record


def other_answers(
    stage: TrainingStage, state: PipelineState, last: Trainable, loop: LoopState
) -> dict[str, Any]:
    """Entry of a stage's record with the answers of the state that does not go on.

    Nothing where that is the same state, where none was measured, and in a program whose
    evaluations show no answers. last: what trains after the last step.
    """
    if state.sharding is None:
        # the others hold the same weights, and would only write the same answers
        if not state.ranks.is_first:
            return {}
        state = state._replace(ranks=ALONE)
    asked = _evaluation(state)
    if stage.evaluate is None or asked is None or loop.best_nats[0] is None:
        return {}
    if loop.best_step[0] == loop.step:
        return {}
    keeps_best = stage.evaluate.keep == "best"
    name, step = ("last", loop.step) if keeps_best else ("best", loop.best_step[0])
    answered = state.records.get(stage.label, {}).get(KEY)
    if answered is not None and answered["step"] == step:  # before this run was stopped
        return {KEY: answered}
    try:
        trainable = last if keeps_best else load_best(stage, state, last, loop)
        samples = asked.first_samples(state.with_model(trainable=trainable), stage.label)
    except (InputError, torch.OutOfMemoryError) as error:
        state.log.say(f"{stage.label}: no sample answers of the {name} state: {error}")
        return {}
    return {KEY: {"state": name, "step": step, "samples": samples}}


def _evaluation(state: PipelineState) -> Eval | None:
    """First evaluation of the program that shows answers."""
    for stage in state.stages.values():
        if isinstance(stage, Eval) and stage.samples and _asks(state, stage.data):
            return stage
    return None


def _asks(state: PipelineState, name: str) -> bool:
    return state.data[name].format not in (*PREFERENCE_FORMATS, "text")
