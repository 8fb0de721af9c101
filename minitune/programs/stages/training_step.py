"""Objective, step and first state of a training stage: plain, with a loss scale, or private."""

from functools import partial
from typing import Any

from torch import Tensor

from minitune.algorithms.distillation import Teacher
from minitune.algorithms.dp_sgd import private_state, private_step
from minitune.algorithms.loss_scale import with_scale
from minitune.algorithms.objective import Objective
from minitune.algorithms.quantization_aware import fake_quantized, quantization_aware
from minitune.algorithms.registry import Frozen, objective_of
from minitune.algorithms.shared_state import begin_state
from minitune.errors import InputError
from minitune.losses.registry import Loss
from minitune.models.model import Model
from minitune.optim.transforms import Chain
from minitune.programs.stages import private_training
from minitune.programs.stages.training_optimizer import loss_scale_for
from minitune.programs.stages.training_stage import TrainingStage
from minitune.programs.state import AbstractState, PipelineState
from minitune.steps import train_step
from minitune.types import Step, Trainable


def initial_state(
    stage: TrainingStage,
    state: PipelineState,
    optimizer: Chain,
    trainable: Trainable,
) -> dict[str, Any]:
    """State of a stage before its first step; InputError for a private one in float16."""
    loss_scale = loss_scale_for(stage, state.loaded.params)
    if stage.privacy is None:
        opt_state = with_scale(begin_state(optimizer, trainable), loss_scale, trainable)
        return {"trainable": trainable, "opt_state": opt_state}
    if loss_scale is not None:
        raise InputError(
            f"stages: {stage.label} has privacy and computes in float16, expected float32 or "
            "bfloat16: rows whose gradient overflows would be left out; set model.dtype"
        )
    return {"trainable": trainable, "opt_state": private_state(optimizer, trainable)}


def objective_for(
    model: Model,
    state: PipelineState,
    loss: Loss,
    teacher: Teacher | None,
    *,
    from_base: bool,
) -> Objective:
    """Objective of a stage; from_base: the reference is the base without the deltas."""
    loaded = state.loaded
    # A reference without deltas is the base alone, which costs no memory of its own.
    if not _changes_model(loaded.trainable):
        from_base = True
    frozen = Frozen({} if from_base else loaded.trainable, teacher)
    objective = objective_of(model, loaded.lora, loss, frozen)
    if state.fake is not None:
        objective = quantization_aware(objective, partial(fake_quantized, state.fake))
    return objective


def _changes_model(trainable: Trainable) -> bool:
    """True if the tree changes the model at all, which fresh deltas do not."""
    return any(isinstance(leaf, Tensor) or bool(leaf.b.any()) for leaf in trainable.values())


def step_for(
    stage: TrainingStage,
    state: PipelineState,
    objective: Objective,
    optimizer: Chain,
    n_rows: int,
) -> Step:
    """Step of a stage over a table of n_rows rows.

    It is donated: the trees are the stage's own, and those before a step are not needed after it.
    """
    if stage.privacy is not None:
        privacy = private_training.rule(stage, n_rows, state.seed)
        state.log.say(f"{stage.label}: noise {privacy.noise:.4g} times max_norm on each sum")
        return private_step(objective, optimizer, privacy, donate=True)
    loss_scale = loss_scale_for(stage, state.loaded.params)
    micro_batch = stage.micro_batch_size or stage.batch_size
    how: dict[str, Any] = {"micro_batch": micro_batch, "loss_scale": loss_scale, "donate": True}
    return train_step(objective, optimizer, ranks=state.ranks, **how)


def rows_of_rank(stage: TrainingStage, n_ranks: int) -> int:
    """Rows of a micro-batch, so few that each rank has one; InputError with privacy, whose noise is
    drawn for one process.
    """
    if stage.privacy is not None and n_ranks > 1:
        raise InputError(
            f"stages: {stage.label} has privacy and the run {n_ranks} processes, expected one: "
            "gradients are clipped and noise is added in a single process; start it alone"
        )
    share = max(stage.loss.min_samples, -(-stage.batch_size // n_ranks))
    return min(stage.micro_batch_size or stage.batch_size, share)


def check_samples(stage: TrainingStage) -> None:
    """InputError for fewer samples in a micro-batch than the loss compares."""
    if min(stage.batch_size, stage.micro_batch_size or stage.batch_size) < stage.loss.min_samples:
        raise InputError(
            f"stages: {stage.label} has a batch of one answer, expected two: kto compares the "
            "answers of a micro-batch"
        )


def check_load_balance(stage: TrainingStage, abstract: AbstractState) -> None:
    """InputError for load_balance of what has no experts, or more than one loss at a time."""
    found = ""
    if abstract.model.config.experts is None:
        found = "a model without experts"
    elif stage.sweep is not None or stage.privacy is not None:
        found = "a sweep" if stage.sweep is not None else "privacy"
    elif stage.loss.compares_answers:
        found = f"loss {stage.loss.__struct_config__.tag!r}"
    if stage.load_balance and found:
        raise InputError(
            f"stages: {stage.label} has load_balance and {found}, expected a mixture of experts "
            "and a loss of tokens; drop load_balance"
        )
