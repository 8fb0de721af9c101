"""Operators of our own, which torch.compile calls as they are, and functions outside of graphs."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Never

import torch


def operator(
    name: str,
    gradients: Callable[..., Any] | None = None,
    keep: Callable[..., None] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that makes a function of tensors the operator of that name, "minitune::...".

    gradients and keep are the backward and the setup_context of torch.library.register_autograd;
    without them a gradient of the operator is a RuntimeError. The function writes to none of its
    arguments and returns no view of one. torch.library.custom_op does the same, and at the first
    call imports torch's compiler, of which a step that is not compiled uses nothing.
    """

    def refused(*_: Any) -> Never:
        raise RuntimeError(f"{name}: no autograd formula was registered; it is differentiable once")

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(name, "default", function)
        torch.library.register_autograd(name, gradients or refused, setup_context=keep)
        namespace, _, short = name.partition("::")
        return getattr(getattr(torch.ops, namespace), short).default

    return register


def outside_graphs(f: Callable[..., Any]) -> Callable[..., Any]:
    """Function whose path depends on the values of its tensors, such as how many
    rows go to each rank: torch.compile makes graphs before and after it, and none of it.
    """

    @wraps(f)
    def run(*args: Any, **kwargs: Any) -> Any:
        # within, because it imports torch's compiler, which a step may do without
        if torch.compiler.is_compiling():
            return torch.compiler.disable(f)(*args, **kwargs)
        return f(*args, **kwargs)

    return run
