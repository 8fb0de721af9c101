"""Pure, stateless step functions: (params, trainable, opt_state, batch) -> (trainable, opt_state, metrics)."""

from collections.abc import Callable
from typing import Any

import torch

from minitune import tree
from minitune.grad import accumulate, value_and_grad
from minitune.lora import Lora
from minitune.losses import CrossEntropy
from minitune.models import Model
from minitune.objectives import Objective, sft
from minitune.tree import Tree
from minitune.types import Batch, Mean, Metrics, Params, Trainable, over_ranks

Step = Callable[[Params, Trainable, Tree, Batch], tuple[Trainable, Tree, Metrics]]


def train_step(objective: Objective, optimizer: Any, *, micro_batch: int, donate: bool = False) -> Step:
    """The step of an objective under an optimizer, in micro-batches of `micro_batch` rows whose sums are divided once.

    A step whose loss or gradient is not finite, or that has no target token at all, changes nothing and says so in
    metrics["skipped"]. With donate=True the trainable and optimizer tensors that are passed in are overwritten by the new ones.
    """

    def step(params: Params, trainable: Trainable, opt_state: Tree, batch: Batch) -> tuple[Trainable, Tree, Metrics]:
        def evaluate(rows: Batch) -> tuple[Any, Tree]:
            return value_and_grad(lambda leaves: objective(leaves, params, rows), has_aux=True)(trainable)

        splits = (x.split(micro_batch) for x in batch)
        micro_batches = (Batch(*rows) for rows in zip(*splits, strict=True))
        (loss, extras), grads = accumulate(evaluate, micro_batches)

        loss = loss.over_ranks()
        divisor = torch.where(loss.weight > 0, loss.weight, 1.0)  # the one division, for all ranks and micro-batches
        grads = tree.map(lambda g: over_ranks(g) / divisor.to(g.dtype), grads)
        grad_norm = tree.norm(grads)
        sound = torch.isfinite(loss.total) & torch.isfinite(grad_norm) & (loss.weight > 0)

        updates, new_state = optimizer.update(grads, opt_state, trainable)
        new = tree.map(lambda p, u: torch.where(sound, p + u, p), trainable, updates)
        new_state = tree.map(lambda old, new: torch.where(sound, new, old), opt_state, new_state)
        if donate:
            new, new_state = tree.donate(trainable, new), tree.donate(opt_state, new_state)
        metrics = {name: mean.over_ranks().value() for name, mean in extras.items()}
        metrics |= {"loss_nats": loss.value(), "grad_norm": grad_norm, "target_tokens": loss.weight, "skipped": (~sound).float()}
        return new, new_state, metrics

    return step


def sft_step(
    params: Params, trainable: Trainable, opt_state: Tree, batch: Batch, *, model: Model, lora: Lora | None, optimizer: Any
) -> tuple[Trainable, Tree, Metrics]:
    """One supervised step on the whole batch: cross-entropy of its labelled tokens. No argument is written."""
    step = train_step(sft(model, CrossEntropy(), lora), optimizer, micro_batch=batch.tokens.shape[0])
    return step(params, trainable, opt_state, batch)


def eval_step(objective: Objective) -> Callable[[Trainable, Params, Batch], tuple[Mean, dict[str, Mean]]]:
    """The objective's value without its gradient."""

    def step(trainable: Trainable, params: Params, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        with torch.no_grad():
            return objective(trainable, params, batch)

    return step
