"""Objectives: how a forward and a loss make a number to differentiate: (trainable, params, batch) -> (Mean, extras)."""

from collections.abc import Callable

import torch

from minitune import tree
from minitune.lora import Lora
from minitune.losses import Loss
from minitune.models import Model
from minitune.types import Batch, Delta, Deltas, InputError, Mean, Params, Trainable

Objective = Callable[[Trainable, Params, Batch], tuple[Mean, dict[str, Mean]]]


def attach(params: Params, trainable: Trainable, lora: Lora | None) -> tuple[Params, Deltas]:
    """(params, deltas) as a forward takes them: a trainable tensor replaces the weight of its name, cast to that weight's dtype,
    and a Delta is scaled by its rule. TypeError for deltas without a rule."""
    deltas = {name: leaf for name, leaf in trainable.items() if isinstance(leaf, Delta)}
    replaced = {name: leaf.to(params[name].dtype) for name, leaf in trainable.items() if isinstance(leaf, torch.Tensor)}
    if deltas and lora is None:
        raise TypeError(f"objectives: {next(iter(deltas))} is a Delta, expected a Lora rule beside it")
    return {**params, **replaced}, lora.scaled(deltas) if lora is not None else {}


def sft(model: Model, loss: Loss, lora: Lora | None) -> Objective:
    """Supervised fine-tuning: the loss of every labelled token given those before it."""

    def objective(trainable: Trainable, params: Params, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        nats = model.token_losses(*_forward_args(params, trainable, lora, batch), loss)
        return Mean.of(nats, batch.labelled()), {}

    return objective


def full(params: Params, globs: tuple[str, ...]) -> tuple[Params, Trainable]:
    """(params, trainable) for training chosen weights whole: float32 copies to train, and the originals freed.

    A trained weight stays in params as dtype and shape alone (on the meta device): it says what to cast to and holds no memory.
    """
    names = tree.select(params, globs, "full: weights")
    trainable = {name: params[name].to(torch.float32, copy=True) for name in names}
    return {**params, **{name: params[name].to("meta") for name in names}}, trainable


def _forward_args(params: Params, trainable: Trainable, lora: Lora | None, batch: Batch) -> tuple[Params, Batch, Deltas]:
    params, deltas = attach(params, trainable, lora)
    missing = next((name for name, w in params.items() if w.is_meta), None)
    if missing is not None:
        raise InputError(f"objectives: {missing} is trained whole, but the trainable tree does not hold it")
    return params, batch, deltas
