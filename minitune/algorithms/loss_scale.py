"""Loss scaling for float16 compute, whose gradients would else become zero below 6e-8.

Micikevicius et al. 2017, arXiv 1710.03740, section 3.2, with the rule of torch.amp.GradScaler: a
step with an overflow changes nothing and halves the scale; growth_interval good steps double it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minitune import tree
from minitune.structs import CheckedStruct
from minitune.tree import Tree
from minitune.types import Mean, Metrics, OpenUnitInterval, PositiveFloat, PositiveInt, TrainState


class ScaleState(NamedTuple):
    """Scale of the next step, and how many good steps there were since it last changed."""

    scale: Float[Tensor, "*adapters"]
    n_good: Int[Tensor, "*adapters"]


class StateWithScale(NamedTuple):
    """State of an optimizer with that of the scale."""

    scaling: ScaleState
    inner: Tree


class LossScale(CheckedStruct, frozen=True, forbid_unknown_fields=True):
    """Rule of the scale; the defaults are those of torch.amp.GradScaler.

    The scale is that of the mean loss of a micro-batch: its sum is multiplied by scale / tokens.
    """

    initial: PositiveFloat = 65536.0  # scale of the first step
    growth_factor: PositiveFloat = 2.0  # factor of the scale after growth_interval good steps
    backoff_factor: OpenUnitInterval = 0.5  # factor of the scale after a step with an overflow
    growth_interval: PositiveInt = 2000  # steps in a row without an overflow

    def begin(self, n_adapters: tuple[int, ...], device: torch.device) -> ScaleState:
        """Scale of the first step; n_adapters: () for one model."""
        scale = torch.full(n_adapters, self.initial, dtype=torch.float32, device=device)
        return ScaleState(scale, torch.zeros(n_adapters, dtype=torch.int64, device=device))

    def after(self, state: ScaleState, is_finite: Bool[Tensor, "*adapters"]) -> ScaleState:
        """Scale of the step after one whose gradients were finite or not."""
        n_good = torch.where(is_finite, state.n_good + 1, 0)
        grows = n_good == self.growth_interval
        grown = state.scale * self.growth_factor
        grown = torch.where(torch.isfinite(grown), grown, state.scale)
        scale = torch.where(is_finite, state.scale, state.scale * self.backoff_factor)
        return ScaleState(torch.where(grows, grown, scale), torch.where(grows, 0, n_good))


def with_scale(optimizer_state: Tree, rule: LossScale | None, trainable: Tree) -> Tree:
    """State of an optimizer, with a scale beside it if there is a rule; TypeError for float16.

    The leaves of a sweep are stacked, and its optimizer_state is a list with one for each adapter.
    """
    if rule is None:
        return optimizer_state
    for path, leaf in tree.items(trainable):
        if leaf.dtype == torch.float16:
            raise TypeError(
                f"loss_scale: {path} trains in float16, expected float32: its steps would be lost "
                "in rounding; cast it, and leave float16 to the frozen weights"
            )
    n_adapters = (len(optimizer_state),) if isinstance(optimizer_state, list) else ()
    device = tree.leaves(trainable)[0].device
    return StateWithScale(rule.begin(n_adapters, device), optimizer_state)


def inner_state(opt_state: Tree) -> Tree:
    """Optimizer's own state, which that of a scale or of a private step holds as `inner`."""
    return getattr(opt_state, "inner", opt_state)


def factor_of(opt_state: Tree, n_tokens: int) -> Float[Tensor, "*adapters"] | None:
    """Factor of a loss's sum: scale / n_tokens, those of a micro-batch; None without a scale."""
    if not isinstance(opt_state, StateWithScale):
        return None
    return opt_state.scaling.scale / n_tokens


def next_scale(
    rule: LossScale | None,
    before: Tree,
    state: TrainState,
    norms: Float[Tensor, "*adapters"],
    metrics: Metrics,
) -> tuple[TrainState, Metrics]:
    """(state, metrics) with the scale after a step, given the optimizer's state before it.

    An overflow is seen in the norm of the gradients, as GradScaler sees it.
    """
    if rule is None:
        return state, metrics
    scaling = before.scaling
    after = StateWithScale(rule.after(scaling, torch.isfinite(norms)), state.opt_state)
    return state._replace(opt_state=after), {**metrics, "loss_scale": scaling.scale}


def scaled(
    objective: Callable[..., Any],
    factor: Float[Tensor, "*adapters"] | None,
) -> Callable[..., Any]:
    """Objective whose total, and with it every gradient, is multiplied by the factor."""
    if factor is None:
        return objective

    def times(mean: Mean) -> Mean:
        return Mean(mean.total * factor, mean.weight)

    def with_factor(*args: Any) -> Any:
        value = objective(*args)
        return times(value) if isinstance(value, Mean) else (times(value[0]), value[1])

    return with_factor
