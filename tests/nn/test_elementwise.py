"""Gradients of the element-wise operations equal autograd's of the formula that they stand for, and nothing is kept for them."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.nn.elementwise import geglu, rms_norm, swiglu
from minitune.planning.activations import kept_bytes


def norm(x: Tensor, w: Tensor, *, plus: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (plus + w)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[int, ...]]] = {  # ours, the formula, the second shape
    "w_after_cast": (partial(rms_norm, eps=1e-5, kind="w_after_cast"), partial(norm, plus=0.0), (7,)),
    "w_before_cast": (partial(rms_norm, eps=1e-5, kind="w_before_cast"), partial(norm, plus=0.0), (7,)),
    "one_plus_w": (partial(rms_norm, eps=1e-5, kind="one_plus_w"), partial(norm, plus=1.0), (7,)),
    "swiglu": (swiglu, lambda gate, up: gate * torch.sigmoid(gate) * up, (3, 5, 7)),
    "geglu": (geglu, lambda gate, up: F.gelu(gate, approximate="tanh") * up, (3, 5, 7)),
}


def leaves(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y, cotangent = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 5, 7), shape, (3, 5, 7)))
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_(), cotangent.to(dtype)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_the_formula(name: str) -> None:
    ours, formula, shape = CASES[name]
    x, y, cotangent = leaves(shape, torch.float64)
    actual, wanted = ours(x, y), formula(x, y)
    torch.testing.assert_close(actual, wanted)
    for needed in ((x, y), (x,), (y,)):
        grads = (torch.autograd.grad(value, needed, cotangent, retain_graph=True) for value in (actual, wanted))
        for ours_, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours_, theirs)
    assert torch.autograd.gradgradcheck(ours, (x, y))


@pytest.mark.parametrize("name", CASES)
def test_what_is_frozen_gets_no_gradient(name: str) -> None:
    ours, formula, shape = CASES[name]
    x, y, cotangent = leaves(shape, torch.float64)
    (grad,), (wanted,) = (torch.autograd.grad(f(x, y.detach()), [x], cotangent) for f in (ours, formula))
    torch.testing.assert_close(grad, wanted)
    (grad,), (wanted,) = (torch.autograd.grad(f(x.detach(), y), [y], cotangent) for f in (ours, formula))
    torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("name", CASES)
def test_nothing_but_the_arguments_is_kept(name: str) -> None:
    ours, _, shape = CASES[name]
    x, y, _ = leaves(shape, torch.float32)
    assert kept_bytes(ours, x, y) == 0


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_gradients_are_near_the_truth(name: str) -> None:
    """As near as one rounding of the terms that add up, each at most twice the largest gradient."""
    ours, formula, shape = CASES[name]
    x, y, cotangent = leaves(shape, torch.bfloat16)
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, y)]
    grads = torch.autograd.grad(ours(x, y), (x, y), cotangent)
    wanted = torch.autograd.grad(formula(*exact), exact, cotangent.double())
    for ours_, truth in zip(grads, wanted, strict=True):
        assert ours_.dtype == torch.bfloat16
        torch.testing.assert_close(ours_.double(), truth, rtol=0.0, atol=float(4 * 2**-8 * truth.abs().max()))
