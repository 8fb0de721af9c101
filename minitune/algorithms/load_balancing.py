"""Keeping routers even: the load-balancing loss of a mixture of experts as a term of any objective
with one forward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minitune.algorithms.objective import Objective
from minitune.errors import InputError
from minitune.hardware import to_device
from minitune.models.experts import router_weight
from minitune.models.model import Model
from minitune.models.probe import Probe
from minitune.nn import moe
from minitune.types import Mean, Params, SeededBatch, TeacherBatch, Trainable


def balanced(
    objective: Callable[[Model], Objective], model: Model, coefficient: float
) -> Objective:
    """Objective of a model plus coefficient * moe.load_balance of its routers, in nats a token.

    The term is taken over the tokens that are no padding, and load_balance is among the metrics
    (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6). The share of tokens that each expert has is that
    of a micro-batch. E.g. balanced(lambda model: sft(model, lora), model, 0.001). InputError for a
    model without experts.
    """
    experts = model.config.experts
    if experts is None:
        raise InputError(
            "load_balancing: the model has no experts, expected a family such as mixtral; leave "
            "the term out"
        )

    def with_term(trainable: Trainable, params: Params, batch: Any) -> tuple[Mean, dict[str, Mean]]:
        # the objective's one forward, with a probe that collects the logits of every layer's router
        logits: list[Tensor] = []
        probe = Probe((router_weight(experts),), lambda name, y: logits.append(y))
        mean, metrics = objective(model._replace(probe=probe))(trainable, params, batch)

        rows = batch.rows if isinstance(batch, SeededBatch) else batch
        rows = rows.rows if isinstance(rows, TeacherBatch) else rows
        is_token = to_device((rows.segment_ids > 0).flatten(), mean.total.device)
        by_layer = torch.stack(logits).flatten(1, 2)
        term = moe.load_balance(by_layer, experts.n_active, is_token)

        # the term counts once for each target, as the mean that it is added to does
        total = mean.total + coefficient * term * mean.weight
        return Mean(total, mean.weight), {
            **metrics,
            "load_balance": Mean(term * mean.weight, mean.weight),
        }

    return with_term
