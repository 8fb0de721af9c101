"""Attention in blocks of queries for processors without a fused kernel that is worth its name.

Every query sees a contiguous run of keys that ends at itself: from the start of its document, of
its window, or of the row. Spans of similar length (span_layout) are padded to one length and cut
into blocks of queries, and a block takes the same places of all spans that reach them: matrix
products over the heads that share keys, and torch's softmax. So no query meets a key of another
document, and many short documents fill a few large products. torch.compile calls the operator as
it is.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minitune import tree
from minitune.autodiff.operator import operator
from minitune.autodiff.value_and_grad import in_forward_mode
from minitune.nn.attention.span_layout import Layout, QueryBlock, layout
from minitune.types import wide_dtype, widen

# bytes of a block's queries at one number each: so many that their scores, by keys, stay in a
# core's cache
BLOCK = 256


def attend(
    q: Float[Tensor, "B N T E"],
    k: Float[Tensor, "B K T E"],
    v: Float[Tensor, "B K T Ev"],
    first: Int[Tensor, "B T"] | None,
    sinks: Float[Tensor, "N"] | None,
    *,
    scale: float,
    soft_cap: float | None,
) -> Float[Tensor, "B N T Ev"]:
    """Attention as `attention.attention` defines it, query t over the keys first[t] .. t (None: 0
    .. t).

    Keys and values are never repeated for the query heads that share them. The backward computes
    the probabilities a second time (Dao et al. 2022, arXiv 2205.14135, section 3.1).
    Differentiable once. RuntimeError in forward mode, for which the operator has no rule.
    """
    if in_forward_mode():
        raise RuntimeError("attention: blocks have no rule for forward mode; use nn.attention")
    return _attend(q, k, v, first, sinks, scale, soft_cap)[0]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.scale, ctx.soft_cap = inputs[5:]
    ctx.save_for_backward(*inputs[:5], output[1])


def _gradients(ctx: Any, d_out: Tensor, d_top: Tensor) -> tuple[Any, ...]:
    sinks = ctx.saved_tensors[4]
    d_q, d_k, d_v, d_sinks = _attend_backward(d_out, *ctx.saved_tensors, ctx.scale, ctx.soft_cap)
    return d_q, d_k, d_v, None, None if sinks is None else d_sinks, None, None


@operator("minitune::attend_in_blocks", _gradients, _keep)
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    soft_cap: float | None,
) -> tuple[Tensor, Tensor]:
    """(the result, the highest score of each query where they are needed)."""
    plan = _layout(first, q)
    rule = _Rule(k.shape[1], q.shape[1] // k.shape[1], scale, soft_cap)
    keys, values = plan.keys.gathered(k), plan.keys.gathered(v)
    outs: list[Tensor] = []
    tops: list[Tensor] = []
    for b, q_box in zip(plan.blocks, plan.queries.gathered(q), strict=True):
        rows, k_box = rule.folded(q_box), _visible(keys, b)
        bias = rule.bias(b, q.dtype)
        top = None
        if rule.shifts(q.dtype):
            top = torch.baddbmm(bias, rows, k_box.mT, alpha=scale).amax(-1, keepdim=True)
            tops.append(rule.unfolded(top))
        weights, _, _ = rule.weights(rows, k_box, bias, top, sinks)
        outs.append(rule.unfolded(weights @ _visible(values, b)))
    highest = plan.queries.scattered(tops, q.shape) if tops else _by_token(q, 0)
    return plan.queries.scattered(outs, q.shape), highest


@operator("minitune::attend_in_blocks_backward")
def _attend_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    sinks: Tensor | None,
    tops: Tensor,
    scale: float,
    soft_cap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sinks (of no element where there are none)."""
    plan = _layout(first, q)
    rule = _Rule(k.shape[1], q.shape[1] // k.shape[1], scale, soft_cap)
    keys, values = plan.keys.gathered(k), plan.keys.gathered(v)
    # every block adds to the gradients of the keys and values that it sees
    wide = wide_dtype(q.dtype)
    d_k, d_v = ([torch.zeros(x.shape, dtype=wide) for x in boxes] for boxes in (keys, values))
    d_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=wide)
    d_q: list[Tensor] = []

    q_boxes, d_boxes = plan.queries.gathered(q), plan.queries.gathered(d_out, zeros=True)
    highest = plan.queries.gathered(tops) if rule.shifts(q.dtype) else [None] * len(plan.blocks)
    for b, q_box, d_box, top_box in zip(plan.blocks, q_boxes, d_boxes, highest, strict=True):
        rows, d_rows = rule.folded(q_box), rule.folded(d_box)
        k_box, v_box = _visible(keys, b), _visible(values, b)
        top = None if top_box is None else rule.folded(top_box)
        arguments = rows, d_rows, k_box, v_box, top, sinks
        weights, d_scores, d_sink_scores = _score_gradients(rule, b, *arguments)
        d_q.append(rule.unfolded(d_scores @ k_box * scale))
        if d_sinks is not None and d_sink_scores is not None:
            d_sinks = d_sinks + rule.unfolded(d_sink_scores).to(wide).sum((0, 2, 3))
        new = d_scores.mT @ rows * scale, weights.mT @ d_rows
        tree.donate_sum((_visible(d_k, b), _visible(d_v, b)), new)

    d_keys = plan.keys.scattered([box.to(k.dtype) for box in d_k], k.shape)
    d_values = plan.keys.scattered([box.to(k.dtype) for box in d_v], v.shape)
    d_sinks = q.new_empty(0) if d_sinks is None else d_sinks.to(q.dtype)
    return plan.queries.scattered(d_q, q.shape), d_keys, d_values, d_sinks


@torch.library.register_fake("minitune::attend_in_blocks")
def _(
    q: Tensor, k: Tensor, v: Tensor, first: Any, sinks: Any, scale: float, soft_cap: float | None
) -> tuple[Tensor, Tensor]:
    n_tops = int(_Rule(1, 1, scale, soft_cap).shifts(q.dtype))
    return _by_token(q, v.shape[3]), _by_token(q, n_tops)


@torch.library.register_fake("minitune::attend_in_blocks_backward")
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Any, sinks: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (_by_token(x, x.shape[3]) for x in (q, k, v))
    return d_q, d_k, d_v, q.new_empty(0 if sinks is None else sinks.shape)


class _Rule(NamedTuple):
    """Settings that all blocks of a call share.

    Inside a block the queries of heads that share keys lie side by side: [s*K G*t ...].
    """

    n_kv_heads: int
    groups: int  # heads that share keys
    scale: float
    soft_cap: float | None

    def shifts(self, dtype: torch.dtype) -> bool:
        """True if a query's highest score is taken off before its products are rounded.

        In half precision what weighs most is then exact. A cap is no shift, and needs the products
        as they are.
        """
        return self.soft_cap is None and dtype in (torch.bfloat16, torch.float16)

    def folded(self, x: Float[Tensor, "s N t c"]) -> Float[Tensor, "sK Gt c"]:
        """Heads that share keys side by side."""
        return x.view(len(x) * self.n_kv_heads, self.groups * x.shape[2], x.shape[3])

    def unfolded(self, x: Float[Tensor, "sK Gt c"]) -> Float[Tensor, "s N t c"]:
        """Inverse of folded."""
        n_spans, n_queries = len(x) // self.n_kv_heads, x.shape[1] // self.groups
        return x.view(n_spans, self.n_kv_heads * self.groups, n_queries, x.shape[2])

    def bias(self, b: QueryBlock, dtype: torch.dtype) -> Float[Tensor, "#sK Gt n"]:
        """-inf where a query of a block does not see a key, else 0; one for all spans where they
        agree.
        """
        bias = torch.full((b.end - b.start, b.end - b.lowest), -torch.inf, dtype=dtype).triu(
            1 + b.start - b.lowest
        )
        if b.first is None:
            return bias.repeat(1, self.groups, 1)
        past = torch.from_numpy(np.arange(b.lowest, b.end) < b.first[..., None])
        bias = bias.masked_fill(past, -torch.inf).repeat(1, self.groups, 1)
        return bias if len(bias) == 1 else bias.repeat_interleave(self.n_kv_heads, 0)

    def weights(
        self,
        rows: Float[Tensor, "sK Gt E"],
        keys: Float[Tensor, "sK n E"],
        bias: Float[Tensor, "#sK Gt n"],
        top: Float[Tensor, "sK Gt 1"] | None,
        sinks: Float[Tensor, "N"] | None,
    ) -> tuple[Float[Tensor, "sK Gt n"], Float[Tensor, "sK Gt _"], Tensor | None]:
        """(the weight of every key, the same with the sinks' as it is computed, the derivative of
        the cap).
        """
        slope = None
        if self.soft_cap is None:
            shift = top
            scores = torch.baddbmm(
                bias if shift is None else bias - shift, rows, keys.mT, alpha=self.scale
            )
        else:
            shift = None
            capped = torch.tanh((widen(rows) @ widen(keys).mT) * (self.scale / self.soft_cap))
            scores, slope = self.soft_cap * capped + bias, 1 - capped.square()

        # a sink is one more score of every query of its head
        if sinks is not None:
            n_spans, n_queries = len(rows) // self.n_kv_heads, rows.shape[1] // self.groups
            by_head = sinks.to(scores.dtype).view(1, -1, 1, 1)
            by_query = by_head.expand(n_spans, -1, n_queries, 1).contiguous()
            sink_scores = self.folded(by_query)
            if shift is not None:
                sink_scores = sink_scores - shift
            scores = torch.cat([scores, sink_scores], dim=-1)
        whole = torch.softmax(scores, dim=-1)
        return whole[..., : keys.shape[1]].to(rows.dtype), whole, slope


def _score_gradients(
    rule: _Rule,
    b: QueryBlock,
    rows: Float[Tensor, "sK Gt E"],
    d_rows: Float[Tensor, "sK Gt Ev"],
    keys: Float[Tensor, "sK n E"],
    values: Float[Tensor, "sK n Ev"],
    top: Float[Tensor, "sK Gt 1"] | None,
    sinks: Float[Tensor, "N"] | None,
) -> tuple[Float[Tensor, "sK Gt n"], Float[Tensor, "sK Gt n"], Float[Tensor, "sK Gt 1"] | None]:
    """(weights of the keys, gradients of the scaled products of queries and keys, those of the
    sinks' scores).
    """
    bias = rule.bias(b, rows.dtype)
    weights, whole, slope = rule.weights(rows, keys, bias, top, sinks)
    d_whole = d_rows @ values.mT
    d_whole = (d_whole if sinks is None else F.pad(d_whole, (0, 1))).to(whole.dtype)
    d_scores = torch._softmax_backward_data(d_whole, whole, -1, whole.dtype)  # pyright: ignore[reportPrivateImportUsage]
    del d_whole, whole  # each as large as the block's scores

    d_sink_scores = None if sinks is None else d_scores[..., -1:]
    d_scores = d_scores[..., : keys.shape[1]]
    d_scores = d_scores if slope is None else d_scores * slope
    return weights, d_scores.to(rows.dtype), d_sink_scores


def _layout(first: Int[Tensor, "B T"] | None, q: Float[Tensor, "B N T E"]) -> Layout:
    starts = np.zeros((len(q), q.shape[2]), dtype=np.int64) if first is None else first.numpy()
    return layout(starts, max(1, BLOCK // q.dtype.itemsize))


def _visible(boxes: list[Float[Tensor, "_ K _ c"]], b: QueryBlock) -> Float[Tensor, "sK n c"]:
    """Keys, or values, from the first that any query of a block sees to the block's end: a view."""
    return boxes[b.group][: b.n_spans, :, b.lowest : b.end].flatten(0, 1)


def _by_token(x: Float[Tensor, "B H T _"], width: int) -> Float[Tensor, "B H T {width}"]:
    """Memory of x's shape, but for its last size, in the order that Table.scattered leaves."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], width).transpose(1, 2)
