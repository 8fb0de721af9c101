"""Norms and gated activations, which the backward recomputes."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minitune.autodiff.remat import remat, with_derivative
from minitune.autodiff.value_and_grad import under_transform
from minitune.types import wide_dtype, widen

Norm = Literal["w_after_cast", "w_before_cast", "one_plus_w"]


def rms_norm(
    x: Float[Tensor, "*rows D"], w: Float[Tensor, "D"], eps: float, kind: Norm = "w_after_cast"
) -> Float[Tensor, "*rows D"]:
    """w * x / sqrt(mean(x^2) + eps), the quotient in float32 (Zhang & Sennrich 2019, arXiv
    1910.07467, eq. 4).

    Families differ in where w comes in: after the cast back to the dtype of x, before it, or before
    it as 1 + w.
    """

    def multiplier(w: Tensor, x: Tensor) -> Tensor:
        w = w.to(x.dtype if kind == "w_after_cast" else wide_dtype(x.dtype))
        return 1.0 + w if kind == "one_plus_w" else w

    def normed(x: Tensor, w: Tensor) -> Tensor:
        wide = widen(x)
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        factor = multiplier(w, x)
        return (factor * scaled.to(factor.dtype)).to(x.dtype)

    def derivative(
        d_y: Tensor, needed: Sequence[bool], x: Tensor, w: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        # with r = 1 / sqrt(mean(x^2) + eps) and y = s x r: d_x = r (s d_y - x r^2 mean(x s d_y)),
        # d_s = sum of d_y x r
        wide = widen(x)
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        factor = multiplier(w, x)
        d_y = d_y.to(factor.dtype)
        d_x = d_w = None
        if needed[0]:
            d_scaled = (d_y * factor).to(wide.dtype)
            along = (wide * d_scaled).mean(-1, keepdim=True) * r.square()
            d_x = (torch.addcmul(d_scaled, wide, along, value=-1.0) * r).to(x.dtype)
        if needed[1]:
            scaled = (wide * r).to(factor.dtype)
            d_w = (d_y * scaled).reshape(-1, x.shape[-1]).sum(0).to(w.dtype)
        return d_x, d_w

    return _recomputed(normed, derivative)(x, w)


def swiglu(
    gate: Float[Tensor, "*rows F"], up: Float[Tensor, "*rows F"]
) -> Float[Tensor, "*rows F"]:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def derivative(
        d_y: Tensor, _: Sequence[bool], gate: Tensor, up: Tensor
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.aten.silu_backward(d_y * up, gate), d_y * F.silu(gate)

    return _recomputed(lambda gate, up: F.silu(gate) * up, derivative)(gate, up)


def geglu(gate: Float[Tensor, "*rows F"], up: Float[Tensor, "*rows F"]) -> Float[Tensor, "*rows F"]:
    """gelu(gate) * up with the tanh form of gelu (Shazeer 2020, arXiv 2002.05202, eq. 6)."""
    return _recomputed(lambda gate, up: F.gelu(gate, approximate="tanh") * up)(gate, up)


def _recomputed(
    f: Callable[..., Tensor], derivative: Callable[..., Any] | None = None
) -> Callable[..., Tensor]:
    """Function f, which the backward recomputes or takes the `derivative` of
    (remat.with_derivative).

    Element-wise work costs less than keeping its intermediate results.
    """
    if not torch.is_grad_enabled() or under_transform() or torch.compiler.is_compiling():
        return f
    return remat(f) if derivative is None else with_derivative(f, derivative)
