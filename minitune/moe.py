"""Mixtures of experts: routers, experts over tokens sorted by expert, and the loss that spreads tokens evenly.

Router functions see one row of logits a token and give its k experts and their weights. Letters beside those of types:
X experts, k experts a token, n tokens, m rows (a token, once for each of its experts).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minitune.grad import under_transform
from minitune.ops import linear
from minitune.types import Delta, QTensor


class Routes(NamedTuple):
    """Each token's experts and their weights."""

    experts: Int[Tensor, "n k"]
    weights: Float[Tensor, "n k"]


def softmax_then_top(logits: Float[Tensor, "n X"], k: int, renormalised: bool) -> Routes:
    """The k largest of softmax(logits), in float32; renormalised: divided by their sum
    (Jiang et al. 2024, arXiv 2401.04088, section 2.1; Muennighoff et al. 2024, arXiv 2409.02060, eq. 2)."""
    weights, experts = _wide(logits).softmax(-1).topk(k)
    return Routes(experts, weights / weights.sum(-1, keepdim=True) if renormalised else weights)


def top_then_softmax(logits: Float[Tensor, "n X"], k: int) -> Routes:
    """softmax over the k largest logits alone (OpenAI 2025, arXiv 2508.10925, section 2.2)."""
    top, experts = logits.topk(k)
    return Routes(experts, _wide(top).softmax(-1))


def top_then_sigmoid(logits: Float[Tensor, "n X"], k: int) -> Routes:
    """sigmoid of the k largest logits (Llama 4, as published with its weights)."""
    top, experts = logits.topk(k)
    return Routes(experts, _wide(top).sigmoid())


def sparsemixer(logits: Float[Tensor, "n X"], jitter: float) -> Routes:
    """The best expert and then the best of the others, each weighed by its softmax over those that come close to it:
    (max - s) / max(|s|, max) <= 2 jitter (Liu et al. 2024, arXiv 2409.12136, section 2.1; without the sampling of training)."""

    def best(among: Float[Tensor, "n X"]) -> tuple[Tensor, Tensor]:
        peak, expert = among.detach().max(-1, keepdim=True)
        far = (peak - logits.detach()) / logits.detach().abs().maximum(peak) > 2 * jitter
        return expert, among.masked_fill(far, -torch.inf).softmax(-1).gather(-1, expert)

    first, first_weight = best(logits)
    second, second_weight = best(logits.scatter(-1, first, -torch.inf))
    return Routes(torch.cat([first, second], -1), torch.cat([first_weight, second_weight], -1))


class Linears(NamedTuple):
    """One linear map of every expert, in the experts' order."""

    weights: Sequence[Tensor | QTensor]  # [out, in] each
    deltas: Sequence[Delta | None]
    biases: Sequence[Tensor | None]  # [out] each


def stacked(w: Float[Tensor, "X in out"], delta: Delta | None, bias: Float[Tensor, "X out"] | None) -> Linears:
    """The maps x W[e] + bias[e] of experts that are kept in one tensor, without copying it.

    The delta has a leading expert dimension and the layout of W: W + b @ a, with a [X R out] and b [X in R].
    """
    none = [None] * len(w)
    deltas = none if delta is None else [Delta(b.T, a.T) for a, b in zip(delta.a, delta.b, strict=True)]
    return Linears([one.T for one in w.unbind()], deltas, none if bias is None else list(bias.unbind()))


def mixture(
    x: Float[Tensor, "n D"],
    routes: Routes,
    into: Sequence[Linears],
    activation: Callable[..., Float[Tensor, "m F"]],
    out: Linears,
    *,
    weigh_input: bool = False,
) -> Float[Tensor, "n D"]:
    """Each token's sum over its experts e of weight * out_e(activation(into_e(x))); weigh_input: of out_e(activation(into_e(
    weight * x))), for experts without biases.

    Only the experts that a token goes to are computed, each on its rows of the tokens sorted by expert, so that a quantized
    weight, a delta or GPTQ's view of a weight's inputs is what it is in any linear map. Under a functorch transform, which can't
    follow how many tokens an expert has, every expert is given all tokens.
    """
    n, n_experts = len(x), len(out.weights)
    if under_transform():
        chosen = F.one_hot(routes.experts, n_experts).to(routes.weights.dtype)
        weights = (routes.weights[..., None] * chosen).sum(1).T.flatten()
        y = _experts(x.repeat(n_experts, 1), weights, [n] * n_experts, into, activation, out, weigh_input)
        return y.unflatten(0, (n_experts, n)).sum(0).to(x.dtype)
    flat = routes.experts.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=n_experts).tolist()
    # permutations and not one scatter: no row is written twice, so a GPU's result does not depend on its scheduling
    rows = x.repeat_interleave(routes.experts.shape[1], 0).index_select(0, order)
    weights = routes.weights.flatten().index_select(0, order)
    y = _experts(rows, weights, counts, into, activation, out, weigh_input).index_select(0, order.argsort())
    return y.unflatten(0, routes.experts.shape).sum(1).to(x.dtype)


def clamped_swiglu(gate: Float[Tensor, "m F"], up: Float[Tensor, "m F"], limit: float, slope: float) -> Float[Tensor, "m F"]:
    """(up + 1) gate sigmoid(slope gate), after gate is cut at limit and up at +-limit (OpenAI 2025, arXiv 2508.10925,
    section 2.2, and as published with the weights)."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(slope * gate)


def load_balance(logits: Float[Tensor, "L n X"], k: int, mask: Bool[Tensor, "n"]) -> Float[Tensor, ""]:
    """X sum_e f_e P_e over the tokens of all L layers where mask is True: f_e is how many of a token's k experts are e, P_e
    the mean of softmax(logits)_e (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6). k for an even router; X k for none but one.

    Differentiable through P alone; 0 where mask is True nowhere.
    """
    p = _wide(logits).softmax(-1)
    kept = mask[:, None].to(p.dtype)
    n_rows = (len(logits) * kept.sum()).clamp(min=1.0)
    hits = F.one_hot(p.detach().topk(k).indices, p.shape[-1]).sum(-2).to(p.dtype)
    share, mean = ((rows * kept).sum((0, 1)) / n_rows for rows in (hits, p))
    return p.shape[-1] * (share * mean).sum()


def _experts(
    rows: Tensor,
    weights: Tensor,
    counts: Sequence[int],
    into: Sequence[Linears],
    activation: Callable[..., Tensor],
    out: Linears,
    weigh_input: bool,
) -> Tensor:
    """Weighed results of rows that lie in the order of their experts, `counts` rows each."""
    rows = rows * weights[:, None].to(rows.dtype) if weigh_input else rows
    y = _grouped(activation(*(_grouped(rows, counts, maps) for maps in into)), counts, out)
    return y if weigh_input else y * weights[:, None]


def _grouped(rows: Tensor, counts: Sequence[int], maps: Linears) -> Tensor:
    groups = zip(rows.split(list(counts)), *maps, strict=True)
    return torch.cat([linear(some, w, delta, bias) for some, w, delta, bias in groups if len(some)])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
