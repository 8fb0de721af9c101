"""Pure, stateless step functions: (params, trainable, opt_state, batch) -> (trainable, opt_state, metrics)."""

from collections.abc import Callable
from typing import Any

import torch

from minitune import tree
from minitune.grad import accumulate, value_and_grad
from minitune.lora import Lora
from minitune.losses import CrossEntropy, DistillationLoss
from minitune.models import Model
from minitune.objectives import Objective, PreferenceLoss, Teacher, distillation, preference, sft
from minitune.optim.apply import apply_gradients
from minitune.optim.transforms import GradientTransformation
from minitune.tree import Tree
from minitune.types import Batch, Mean, Metrics, Pairs, Params, Trainable, over_ranks

Step = Callable[[Params, Trainable, Tree, Any], tuple[Trainable, Tree, Metrics]]


def train_step(objective: Objective, optimizer: GradientTransformation, *, micro_batch: int, donate: bool = False) -> Step:
    """The step of an objective under an optimizer, in micro-batches of `micro_batch` rows whose sums are divided once.

    A step whose loss or gradient is not finite, or that has no target token at all, changes nothing and says so in
    metrics["skipped"]. With donate=True the trainable and optimizer tensors that are passed in are overwritten by the new ones.
    """

    def step(params: Params, trainable: Trainable, opt_state: Tree, batch: Any) -> tuple[Trainable, Tree, Metrics]:
        def evaluate(rows: Any) -> tuple[Any, Tree]:
            return value_and_grad(lambda leaves: objective(leaves, params, rows), has_aux=True)(trainable)

        starts = range(0, len(tree.leaves(batch)[0]), micro_batch)
        micro_batches = (tree.map(lambda x, i=i: x[i : i + micro_batch], batch) for i in starts)
        (loss, extras), grads = accumulate(evaluate, micro_batches)

        loss = loss.over_ranks()
        grads = tree.map(over_ranks, grads)
        divisor = torch.where(loss.weight > 0, loss.weight, 1.0)  # the one division, for all ranks and micro-batches
        norm = tree.norm(grads) / divisor
        is_finite = torch.isfinite(loss.total) & torch.isfinite(norm) & (loss.weight > 0)
        new, new_state = apply_gradients(
            optimizer, grads, opt_state, trainable, divisor=divisor, norm=norm, is_finite=is_finite, donate=donate
        )
        metrics = {name: mean.over_ranks().value() for name, mean in extras.items()}
        metrics |= {"loss_nats": loss.value(), "grad_norm": norm, batch.counts: loss.weight, "skipped": (~is_finite).float()}
        return new, new_state, metrics

    return step


def sft_step(
    params: Params,
    trainable: Trainable,
    opt_state: Tree,
    batch: Batch,
    *,
    model: Model,
    lora: Lora | None,
    optimizer: GradientTransformation,
) -> tuple[Trainable, Tree, Metrics]:
    """One supervised step on the whole batch: cross-entropy of its labelled tokens. No argument is written."""
    step = train_step(sft(model, CrossEntropy(), lora), optimizer, micro_batch=batch.tokens.shape[0])
    return step(params, trainable, opt_state, batch)


def dpo_step(
    params: Params,
    trainable: Trainable,
    opt_state: Tree,
    pairs: Pairs,
    *,
    model: Model,
    loss: PreferenceLoss,
    lora: Lora | None,
    reference: Trainable | None,
    optimizer: GradientTransformation,
) -> tuple[Trainable, Tree, Metrics]:
    """One preference step on the whole batch of pairs: DPO or any of its kin; reference as objectives.preference takes it."""
    step = train_step(preference(model, loss, lora, reference), optimizer, micro_batch=len(pairs.chosen.tokens))
    return step(params, trainable, opt_state, pairs)


def kd_step(
    params: Params,
    trainable: Trainable,
    opt_state: Tree,
    batch: Batch,
    *,
    model: Model,
    loss: DistillationLoss,
    lora: Lora | None,
    teacher: Teacher,
    optimizer: GradientTransformation,
) -> tuple[Trainable, Tree, Metrics]:
    """One distillation step on the whole batch: the divergence from the teacher on its labelled tokens."""
    step = train_step(distillation(model, loss, lora, teacher), optimizer, micro_batch=len(batch.tokens))
    return step(params, trainable, opt_state, batch)


def eval_step(objective: Objective) -> Callable[[Trainable, Params, Any], tuple[Mean, dict[str, Mean]]]:
    """The objective's value without its gradient."""

    def step(trainable: Trainable, params: Params, batch: Any) -> tuple[Mean, dict[str, Mean]]:
        with torch.no_grad():
            return objective(trainable, params, batch)

    return step
