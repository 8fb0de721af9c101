"""Keeping routers even: the load-balancing loss of a mixture of experts as a term of any objective with one forward."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minitune import moe
from minitune.hardware import to_device
from minitune.models import Model, decoder
from minitune.models.experts import is_routed
from minitune.objectives import Objective
from minitune.types import InputError, Mean, Params, Taught, Trainable


def balanced(objective: Callable[[Model], Objective], model: Model, coefficient: float) -> Objective:
    """The objective of a model plus coefficient * moe.load_balance of its routers over the tokens that are no padding, in nats a
    token; load_balance is among its readings. E.g. balanced(partial(objectives.sft, loss=..., lora=...), model, 0.001).

    The share of tokens that each expert has is that of a micro-batch. InputError for a model without experts.
    """
    experts = model.config.experts
    if experts is None:
        raise InputError("balance: the model has no experts, expected a family such as mixtral; leave the term out")

    def with_term(trainable: Trainable, params: Params, batch: Any) -> tuple[Mean, dict[str, Mean]]:
        found: list[Tensor] = []
        mean, readings = objective(model._replace(wrap=_noting(model, found), n_remat=0))(trainable, params, batch)
        rows = batch.rows if isinstance(batch, Taught) else batch
        real = to_device((rows.segment_ids > 0).flatten(), mean.total.device)
        uneven = moe.load_balance(torch.stack(found).flatten(1, 2), experts.n_active, real)
        total = mean.total + coefficient * uneven * mean.weight
        return Mean(total, mean.weight), {**readings, "load_balance": Mean(uneven * mean.weight, mean.weight)}

    return with_term


def _noting(model: Model, found: list[Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """The model's wrap for blocks that note down what their routers say, once each: so what is computed again lies inside."""

    def wrap(block: Callable[..., Tensor]) -> Callable[..., Tensor]:
        kept = model.wrap(block), model.wrap(partial(decoder.routed_block, model.config))
        lean = [model.again(one) for one in kept]
        layers: list[Params] = []  # that have run

        def noted(w: Params, deltas: Any, x: Tensor, *rest: Any) -> Tensor:
            plain, routed = lean if len(layers) < model.n_remat else kept
            layers.append(w)
            if not is_routed(model.config.experts, w):
                return plain(w, deltas, x, *rest)
            both = routed(w, deltas, x, *rest)
            found.append(both[..., x.shape[-1] :])
            return both[..., : x.shape[-1]]

        return noted

    return wrap
