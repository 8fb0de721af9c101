"""Optimizer of a training stage: its rule, with a clip before it and factors behind it."""

import torch

from minitune import tree
from minitune.algorithms.loss_scale import LossScale
from minitune.errors import InputError
from minitune.optim.decay_groups import decay_groups
from minitune.optim.rounding import RoundStochastically
from minitune.optim.schedules import ScaleBySchedule
from minitune.optim.transforms import Chain, ClipByGlobalNorm, ScaleByGlob, chain
from minitune.programs.stages.training_stage import TrainingStage
from minitune.types import Params, Trainable


def optimizer_for(stage: TrainingStage, trainable: Trainable, seed: int) -> Chain:
    """Optimizer of a stage; what trains in bfloat16 is rounded at random."""
    narrow = any(leaf.dtype == torch.bfloat16 for leaf in tree.leaves(trainable))
    rounding = [RoundStochastically(seed)] if narrow else []
    return chain(*adapter_optimizer(stage, trainable).parts, *rounding)


def adapter_optimizer(stage: TrainingStage, trainable: Trainable) -> Chain:
    """Optimizer of a stage between its clip and its schedule."""
    clip = [ClipByGlobalNorm(stage.clip_norm)] if stage.clip_norm else []
    paths = [path for path, _ in tree.items(trainable)]
    rule = decay_groups(stage.optimizer, stage.decay_factors, paths)
    factors = [ScaleByGlob(dict(stage.lr_factors))] if stage.lr_factors else []
    return chain(*clip, rule, *factors, ScaleBySchedule(stage.schedule, max(1, stage.steps)))


def loss_scale_for(stage: TrainingStage, params: Params) -> LossScale | None:
    """Rule of the loss's scale where a model computes in float16; None where it does not."""
    if params["model.embed_tokens.weight"].dtype != torch.float16:
        return None
    return stage.loss_scale or LossScale()


def check_factors(stage: TrainingStage) -> None:
    """InputError for factors of no decay; globs are matched where the state is made."""
    if stage.decay_factors and not stage.optimizer.weight_decay:
        raise InputError(
            f"stages: {stage.label} has decay_factors and optimizer.weight_decay = 0, expected a "
            "decay that they are factors of; set it, or drop them"
        )
