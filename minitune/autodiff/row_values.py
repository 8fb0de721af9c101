"""Checks of what a loss of one's own returns, and of the weights of its rows."""

from typing import Any

import torch
from torch import Tensor

from minitune.autodiff.value_and_grad import FUNCTORCH, under_transform
from minitune.hardware import is_accelerator


def checked_losses(values: Any, of: Tensor, n_values: int = 1) -> Tensor:
    """Losses of the n rows of a tensor: checked_rows, in the graph of `of` where that has one.

    TypeError for anything else: what is no longer in the graph would train nothing.
    """
    checked_rows(values, of.shape[0], "the loss", n_values)
    # torch.compile can't say which tensors of a transform require grad
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return values
    if _requires_grad(of) and not _requires_grad(values):
        raise TypeError(
            "loss: the loss returned values without a gradient, expected ones that depend on its "
            "inputs; detach nothing, and take what is only reported under torch.no_grad()"
        )
    return values


def checked_rows(values: Any, n: int, what: str, n_values: int = 1) -> Tensor:
    """Values [n] or [n, n_values], floating point; TypeError for anything else, such as [n, 1],
    which would broadcast with [B, T] to another sum.

    Only shape and dtype are read, so no device is waited for. what: who returned the values.
    """
    expected = [n] if n_values == 1 else [n, n_values]
    if not isinstance(values, Tensor) or list(values.shape) != expected:
        is_tensor = isinstance(values, Tensor)
        found = list(values.shape) if is_tensor else f"a {type(values).__name__}"
        amount = "one value" if n_values == 1 else f"{n_values} values"
        raise TypeError(
            f"loss: {what} returned {found}, expected {amount} a row, {expected}; keep no "
            "dimension, and leave sums and means to the step"
        )
    if not values.is_floating_point():
        raise TypeError(
            f"loss: {what} returned {values.dtype}, expected floating-point values in nats"
        )
    return values


def checked_weights(weights: Tensor) -> Tensor:
    """Weights of rows in a loss, all finite and none negative; TypeError where the host can see
    that one is.

    It can't on an accelerator, which would be waited for, nor under a transform and torch.compile:
    there such a weight becomes NaN, so that the step is skipped and says so.
    """
    is_good = (weights >= 0) & torch.isfinite(weights)
    if under_transform() or torch.compiler.is_compiling() or is_accelerator(weights.device):
        return torch.where(is_good, weights, torch.nan)
    if is_good.all():
        return weights
    if not torch.isfinite(weights).all():
        raise TypeError(
            "loss: weights of the loss_mask are not finite, expected numbers from 0 to 1; mask out "
            "what is not to count by 0"
        )
    raise TypeError(
        f"loss: the least weight of the loss_mask is {float(weights.min()):g}, expected numbers "
        "from 0 to 1; mask out what is not to count by 0"
    )


def _requires_grad(x: Tensor) -> bool:
    """True if x has a gradient, at any level of the transforms around it."""
    while not x.requires_grad and FUNCTORCH.is_functorch_wrapped_tensor(x):
        x = FUNCTORCH.get_unwrapped(x)
    return x.requires_grad
