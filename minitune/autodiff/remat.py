"""Functions whose backward recomputes them from their inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minitune import tree
from minitune.autodiff.value_and_grad import (
    PLACEHOLDER,
    in_forward_mode,
    pullback,
    takes_gradients,
    value_of_arguments,
)
from minitune.tree import Tree


def remat(f: Callable[..., Any]) -> Callable[..., Any]:
    """Function f, whose backward recomputes f from its inputs: nothing inside f is kept (Chen et
    al. 2016, arXiv 1604.06174).

    Arguments are trees of tensors and the result is one tensor. ClosedOverError where f depends on
    a tensor that requires grad and is no argument. Works under every transform of torch.func;
    inside torch.func.grad, which keeps all that a backward computes, and in forward mode f is as it
    is.
    """

    def recomputed(*args: Tree) -> Tensor:
        if in_forward_mode() or takes_gradients():
            return f(*args)
        flat, tensors = flattened(f, args)
        return _Remat.apply(flat, *tensors)

    return recomputed


def flattened(f: Callable[..., Tensor], args: Tree) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """(f as a function of the leaves of its arguments, these leaves); the function keeps none of
    them alive.
    """
    structure = tree.map(lambda _: PLACEHOLDER, args)
    return lambda *tensors: f(*tree.rebuild(structure, tensors)), tree.leaves(args)


class _Remat(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(f: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return value_of_arguments(f, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.f = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        return None, *pullback(ctx.f, ctx.saved_tensors, grad_outputs[0], ctx.needs_input_grad[1:])


def with_derivative(
    f: Callable[..., Tensor], derivative: Callable[..., Sequence[Tensor | None]]
) -> Callable[..., Tensor]:
    """Function f of tensors alone, whose backward is derivative(cotangent, needed, *tensors):
    nothing inside f is kept.

    derivative returns the vector-Jacobian product of every tensor, None where `needed` has False.
    It must not be what is differentiated itself: for a gradient of the gradient f is computed once
    more, by autograd.
    """
    return lambda *tensors: _WithDerivative.apply(f, derivative, *tensors)


class _WithDerivative(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, f: Callable[..., Tensor], derivative: Callable[..., Any], *tensors: Tensor
    ) -> Tensor:
        ctx.f, ctx.derivative = f, derivative
        ctx.save_for_backward(*tensors)
        return f(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            return None, None, *pullback(ctx.f, ctx.saved_tensors, grad_outputs[0], needed)
        return None, None, *ctx.derivative(grad_outputs[0], needed, *ctx.saved_tensors)
