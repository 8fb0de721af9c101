"""Keeping routers even: the load-balancing loss of a mixture of experts as a term of any objective with one forward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minitune.algorithms.objective import Objective
from minitune.errors import InputError
from minitune.hardware import to_device
from minitune.models.experts import router_weight
from minitune.models.model import Model, Probe
from minitune.nn import moe
from minitune.types import Mean, Params, TeacherBatch, Trainable


def balanced(objective: Callable[[Model], Objective], model: Model, coefficient: float) -> Objective:
    """The objective of a model plus coefficient * moe.load_balance of its routers over the tokens that are no padding, in nats a
    token; load_balance is among its readings. E.g. balanced(partial(supervised.sft, loss=..., lora=...), model, 0.001).

    The share of tokens that each expert has is that of a micro-batch. InputError for a model without experts.
    """
    experts = model.config.experts
    if experts is None:
        raise InputError("balance: the model has no experts, expected a family such as mixtral; leave the term out")

    def with_term(trainable: Trainable, params: Params, batch: Any) -> tuple[Mean, dict[str, Mean]]:
        logits: list[Tensor] = []
        probe = Probe((router_weight(experts),), lambda name, y: logits.append(y))
        mean, readings = objective(model._replace(probe=probe))(trainable, params, batch)
        rows = batch.rows if isinstance(batch, TeacherBatch) else batch
        is_token = to_device((rows.segment_ids > 0).flatten(), mean.total.device)
        uneven = moe.load_balance(torch.stack(logits).flatten(1, 2), experts.n_active, is_token)
        total = mean.total + coefficient * uneven * mean.weight
        return Mean(total, mean.weight), {**readings, "load_balance": Mean(uneven * mean.weight, mean.weight)}

    return with_term
