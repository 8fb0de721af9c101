"""Mixtures of experts: routers, experts over tokens sorted by expert, and the loss that spreads
tokens evenly.

Router functions see one row of logits a token and give its k experts and their weights. Letters in
addition to those of types: X experts, k experts a token, n tokens, m rows (a token, once for each
of its experts).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from minitune import hardware
from minitune.autodiff.value_and_grad import under_transform
from minitune.nn.linear import linear
from minitune.quant.tensors import QTensor
from minitune.types import Adapted, widen


class Routes(NamedTuple):
    """Experts of each token, and their weights."""

    experts: Int[Tensor, "n k"]
    weights: Float[Tensor, "n k"]


def softmax_then_top(logits: Float[Tensor, "n X"], k: int, renormalised: bool) -> Routes:
    """K largest of softmax(logits), in float32; renormalised: divided by their sum
    (Jiang et al. 2024, arXiv 2401.04088, section 2.1; Muennighoff et al. 2024, arXiv 2409.02060,
    eq. 2).
    """
    weights, experts = widen(logits).softmax(-1).topk(k)
    return Routes(experts, weights / weights.sum(-1, keepdim=True) if renormalised else weights)


def top_then_softmax(logits: Float[Tensor, "n X"], k: int) -> Routes:
    """softmax over the k largest logits alone (OpenAI 2025, arXiv 2508.10925, section 2.2)."""
    top, experts = logits.topk(k)
    return Routes(experts, widen(top).softmax(-1))


def top_then_sigmoid(logits: Float[Tensor, "n X"], k: int) -> Routes:
    """sigmoid of the k largest logits (Llama 4, as published with its weights)."""
    top, experts = logits.topk(k)
    return Routes(experts, widen(top).sigmoid())


# (rows of one expert, what its linear map made of them)
ExpertTap = Callable[[Tensor, Tensor], None]


class StackedExperts(NamedTuple):
    """Linear maps x W[e] + bias[e] of all experts, in one leaf of each kind."""

    w: Float[Tensor, "X in out"] | Adapted  # adapted: W + b @ a with a [X R out] and b [X in R]
    bias: Float[Tensor, "X out"] | None


class ExpertLinear(NamedTuple):
    """One linear map of every expert, in the experts' order; stack: the same, where a checkpoint
    keeps them in one tensor.
    """

    weights: Sequence[Tensor | QTensor | Adapted]  # [out, in] each
    biases: Sequence[Tensor | None]  # [out] each
    taps: Sequence[ExpertTap | None]
    stack: StackedExperts | None = None


def stacked(
    w: Float[Tensor, "X in out"] | Adapted, bias: Float[Tensor, "X out"] | None
) -> ExpertLinear:
    """Maps x W[e] + bias[e] of experts that are kept in one tensor, without copying it."""
    if isinstance(w, Adapted):
        weights = [Adapted(one.T, b.T, a.T) for one, a, b in zip(w.w, w.a, w.b, strict=True)]
    else:
        weights = [one.T for one in w.unbind()]
    none = [None] * len(weights)
    biases = none if bias is None else list(bias.unbind())
    return ExpertLinear(weights, biases, none, StackedExperts(w, bias))


def mixture(
    x: Float[Tensor, "n D"],
    routes: Routes,
    up: Sequence[ExpertLinear],
    activation: Callable[..., Float[Tensor, "m F"]],
    down: ExpertLinear,
    *,
    scale_input: bool = False,
) -> Float[Tensor, "n D"]:
    """Sum over the experts e of each token of weight * down_e(activation(up_e(x))); scale_input: of
    down_e(activation(up_e( weight * x))), for experts without biases.

    Only the experts that a token goes to are computed, on its rows of the tokens sorted by expert:
    all of them in one kernel where torch has one for the stack that they lie in, else one by one,
    so that a quantized or adapted weight, or a tap of its inputs, is what it is in any linear map.
    One by one, the host waits for the device to learn how many rows each expert has. Under a
    functorch transform or in a graph for other programs, which can't follow how many tokens an
    expert has, every expert is given all tokens.
    """
    maps = up, activation, down, scale_input
    if torch.compiler.is_exporting():
        return _every_expert(x, routes, *maps)
    n, n_experts = len(x), len(down.weights)
    if under_transform():
        chosen = _one_hot(routes.experts, n_experts).to(routes.weights.dtype)
        weights = (routes.weights[..., None] * chosen).sum(1).T.flatten()
        y = _experts(x.repeat(n_experts, 1), weights, [n] * n_experts, *maps)
        return y.unflatten(0, (n_experts, n)).sum(0).to(x.dtype)
    flat = routes.experts.flatten()
    order = flat.argsort(stable=True)
    numbers = torch.arange(n_experts, device=flat.device)
    ends = torch.searchsorted(flat[order], numbers, right=True, out_int32=True)
    at_once = all(in_one_kernel(one.stack, x) for one in (*up, down))
    groups = ends if at_once else rows_of_each(ends, len(flat))
    # permutations and not one scatter: no row is written twice, so a GPU's result does not depend
    # on its scheduling
    rows = x.repeat_interleave(routes.experts.shape[1], 0).index_select(0, order)
    weights = routes.weights.flatten().index_select(0, order)
    y = _experts(rows, weights, groups, *maps).index_select(0, order.argsort())
    return y.unflatten(0, routes.experts.shape).sum(1).to(x.dtype)


def _every_expert(
    x: Float[Tensor, "n D"],
    routes: Routes,
    up: Sequence[ExpertLinear],
    activation: Callable[..., Tensor],
    down: ExpertLinear,
    scale_input: bool,
) -> Float[Tensor, "n D"]:
    """Result of `mixture`: each expert gets all tokens, with the weight 0 where not chosen."""

    def linear_map(maps: ExpertLinear, e: int, rows: Tensor) -> Tensor:
        return linear(rows, maps.weights[e], maps.biases[e])

    parts = []
    for e in range(len(down.weights)):
        chosen = (routes.experts == e).to(routes.weights.dtype)
        weight = (routes.weights * chosen).sum(-1, keepdim=True)
        rows = x * weight.to(x.dtype) if scale_input else x
        y = linear_map(down, e, activation(*(linear_map(maps, e, rows) for maps in up)))
        parts.append(y if scale_input else y * weight)
    return sum(parts[1:], parts[0]).to(x.dtype)


def clamped_swiglu(
    gate: Float[Tensor, "m F"], up: Float[Tensor, "m F"], limit: float, slope: float
) -> Float[Tensor, "m F"]:
    """(up + 1) gate sigmoid(slope gate), after gate is cut at limit and up at +-limit (OpenAI 2025,
    arXiv 2508.10925, section 2.2, and as published with the weights).
    """
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(slope * gate)


def load_balance(
    logits: Float[Tensor, "L n X"], k: int, mask: Bool[Tensor, "n"]
) -> Float[Tensor, ""]:
    """X sum_e f_e P_e over the tokens of all L layers where mask is True: f_e is how many of a
    token's k experts are e, P_e the mean of softmax(logits)_e (Fedus et al. 2021, arXiv 2101.03961,
    eq. 4-6). k for an even router; X k for none but one.

    Differentiable through P alone; 0 where mask is True nowhere.
    """
    p = widen(logits).softmax(-1)
    kept = mask[:, None].to(p.dtype)
    n_rows = (len(logits) * kept.sum()).clamp(min=1.0)
    hits = _one_hot(p.detach().topk(k).indices, p.shape[-1]).sum(-2).to(p.dtype)
    share, mean = ((rows * kept).sum((0, 1)) / n_rows for rows in (hits, p))
    return p.shape[-1] * (share * mean).sum()


def _one_hot(experts: Int[Tensor, "*n k"], n_experts: int) -> Bool[Tensor, "*n k X"]:
    """True at the number of each expert; torch's own has no rule for a vmap of a gradient."""
    return experts[..., None] == torch.arange(n_experts, device=experts.device)


def _experts(
    rows: Tensor,
    weights: Tensor,
    groups: Tensor | Sequence[int],
    up: Sequence[ExpertLinear],
    activation: Callable[..., Tensor],
    down: ExpertLinear,
    scale_input: bool,
) -> Tensor:
    """Results, times their weights, of rows that lie in the order of their experts.

    groups: where each expert's rows end, for all experts at once, or how many rows it has, for one
    by one.
    """
    rows = rows * weights[:, None].to(rows.dtype) if scale_input else rows
    y = grouped(activation(*(grouped(rows, groups, maps) for maps in up)), groups, down)
    return y if scale_input else y * weights[:, None]


def grouped(rows: Tensor, groups: Tensor | Sequence[int], maps: ExpertLinear) -> Tensor:
    """Result of one linear map of every expert on rows in the experts' order; groups as in
    _experts.
    """
    if isinstance(groups, Tensor):
        assert maps.stack is not None, "only a stack is multiplied at once"
        return _at_once(rows, groups, *maps.stack)
    results = []
    for some, w, bias, tap in zip(
        rows.split(list(groups)), maps.weights, maps.biases, maps.taps, strict=True
    ):
        if len(some):
            results.append(linear(some, w, bias))
            if tap is not None:
                tap(some, results[-1])
    # what no row has come to gives none, and takes part in the backward
    return torch.cat(results or [linear(rows, maps.weights[0], maps.biases[0])])


def _at_once(rows: Tensor, ends: Tensor, w: Tensor | Adapted, bias: Tensor | None) -> Tensor:
    def times(x: Tensor, w: Tensor) -> Tensor:
        return F.grouped_mm(x, w.to(x.dtype), offs=ends)

    if isinstance(w, Adapted):
        y = times(rows, w.w) + times(times(rows, w.b), w.a)
    else:
        y = times(rows, w)
    # by a product and not by an index, whose gradient a GPU would sum in any order
    if bias is not None:
        expert = torch.searchsorted(ends, torch.arange(len(rows), device=ends.device), right=True)
        y = y + (expert[:, None] == torch.arange(len(ends), device=ends.device)).to(
            y.dtype
        ) @ bias.to(y.dtype)
    return y


def rows_of_each(ends: Tensor, n_rows: int) -> list[int]:
    """Number of rows of each expert, as even as can be where tensors have no values
    (planning/memory.py).
    """
    if isinstance(ends, FakeTensor):
        return [(i + 1) * n_rows // len(ends) - i * n_rows // len(ends) for i in range(len(ends))]
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def in_one_kernel(stack: StackedExperts | None, x: Tensor) -> bool:
    """True if torch multiplies the rows of all experts at once: it wants rows of whole 16 bytes."""
    if stack is None or not _has_kernel(x):
        return False
    rank = stack.w.a.shape[1:2] if isinstance(stack.w, Adapted) else ()
    sizes = [*stack.w.shape[1:], *rank]
    return all(n * x.element_size() % 16 == 0 for n in sizes)


def _has_kernel(x: Tensor) -> bool:
    """True on a GPU with the kernel; on a CPU the experts one by one are as fast (bench/moe.py)."""
    return x.dtype == torch.bfloat16 and hardware.cuda_capability(x.device) >= (8, 0)
