"""Attention in blocks of queries for processors without a fused kernel that is worth its name.

Every query sees a contiguous run of keys that ends at itself: from the start of its document, of its window, or of the row.
Where a query sees itself alone a span begins, because no later query of its row sees past it; a packed document is a span.
Spans of similar length are padded to one length and cut into blocks of queries, and a block takes the same places of all spans
that reach them: matrix products over the heads that share keys, and torch's softmax. So no query meets a key of another
document, and many short documents fill a few large products. An operator of its own, which torch.compile calls as it is.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minitune import tree
from minitune.types import wide_dtype

BLOCK = 256  # bytes of a block's queries at one number each: so many that their scores, by keys, stay in a core's cache
PADDED = 1.5  # slots for each token that spans of one group may take together


class Table(NamedTuple):
    """Tokens, counted over all rows of a batch, in the slots of some boxes of [spans, places].

    A slot past the end of its span repeats the span's last token, so that no product meets memory that was never written.
    """

    tokens: list[Int[np.ndarray, "_ _"]]
    filled: list[Bool[np.ndarray, "_ _"]]  # False past the end of a span

    def gathered(self, x: Float[Tensor, "B H T c"], *, zeros: bool = False) -> list[Float[Tensor, "_ H _ c"]]:
        """The rows of x in each box; with `zeros` the slots past the end of a span hold zeros."""
        heads = np.arange(x.shape[1])[:, None]
        index = np.concatenate([(box[:, None] * x.shape[1] + heads).ravel() for box in self.tokens])
        # a view where the heads of a token lie side by side, as a linear map leaves them
        rows = x.transpose(1, 2).reshape(-1, x.shape[3]).index_select(0, torch.from_numpy(index))
        if zeros and not all(box.all() for box in self.filled):
            empty = np.concatenate([np.repeat(~box[:, None], x.shape[1], 1).ravel() for box in self.filled])
            rows = rows.masked_fill(torch.from_numpy(empty)[:, None], 0.0)
        parts = rows.split([box.size * x.shape[1] for box in self.tokens])
        return [part.view(len(box), x.shape[1], -1, x.shape[3]) for part, box in zip(parts, self.tokens, strict=True)]

    def scattered(self, parts: list[Float[Tensor, "_ H _ c"]], shape: torch.Size) -> Float[Tensor, "B H T c"]:
        """The inverse of gathered, for x of `shape`: the heads of a token lie side by side, as the next linear map wants them."""
        index, base = np.empty((shape[0] * shape[2], shape[1]), dtype=np.int64), 0
        for part, box, filled in zip(parts, self.tokens, self.filled, strict=True):
            slots = np.arange(base, base + box.size * shape[1]).reshape(part.shape[:3]).transpose(0, 2, 1)
            index[box[filled]] = slots[filled]
            base += box.size * shape[1]
        rows = torch.cat([part.reshape(-1, part.shape[3]) for part in parts])
        rows = rows.index_select(0, torch.from_numpy(index.ravel()))
        return rows.view(shape[0], shape[2], shape[1], -1).transpose(1, 2)


class Block(NamedTuple):
    """Queries start .. end of the n_spans longest spans of a group, counted from the beginning of each span."""

    group: int
    n_spans: int
    start: int
    end: int
    lowest: int  # the first key that any of them sees
    first: Int[np.ndarray, "#s t"] | None  # the first key of each; None: all see their span from its beginning


class Layout(NamedTuple):
    """The blocks of a batch; a box of `queries` for each of them, and a box of `keys` for each group of spans."""

    blocks: list[Block]
    queries: Table
    keys: Table


def layout(first: Int[np.ndarray, "B T"], size: int) -> Layout:
    """The layout of rows whose query t sees the keys first[t] .. t, in blocks of `size` queries."""
    # spans, the longest first
    n_tokens = first.shape[1]
    begins = np.flatnonzero(first == np.arange(n_tokens))
    lengths = np.diff(begins, append=first.size)
    reach = first.ravel() - np.repeat(begins % n_tokens, lengths)
    order = np.argsort(-lengths, kind="stable")
    begins, lengths, windows = begins[order], lengths[order], bool(reach.any())

    blocks, queries, keys, taken = [], Table([], []), Table([], []), 0
    while taken < len(lengths):
        # spans join the group while padding to its longest stays small
        padded, real = np.arange(1, len(lengths) - taken + 1) * lengths[taken], lengths[taken:].cumsum()
        n = int(np.argmax(padded > PADDED * real)) if bool((padded > PADDED * real).any()) else len(padded)
        ends, at = lengths[taken : taken + n, None], np.arange(lengths[taken])
        keys.tokens.append(begins[taken : taken + n, None] + np.minimum(at, ends - 1))
        keys.filled.append(at < ends)
        for start in range(0, int(lengths[taken]), size):
            m, here = int((ends > start).sum()), slice(start, start + size)
            box, filled = keys.tokens[-1][:m, here], keys.filled[-1][:m, here]
            lows = np.where(filled, reach[box], reach[box[:1]]) if windows else None  # the longest span fills every slot
            if lows is not None and (lows == lows[:1]).all():
                lows = lows[:1]
            lowest = 0 if lows is None else int(lows[:, 0].min())
            blocks.append(Block(len(keys.tokens) - 1, m, start, start + box.shape[1], lowest, lows))
            queries.tokens.append(box)
            queries.filled.append(filled)
        taken += n
    return Layout(blocks, queries, keys)


def attend(
    q: Float[Tensor, "B N T E"],
    k: Float[Tensor, "B K T E"],
    v: Float[Tensor, "B K T E"],
    first: Int[Tensor, "B T"] | None,
    sinks: Float[Tensor, "N"] | None,
    *,
    scale: float,
    soft_cap: float | None,
) -> Float[Tensor, "B N T E"]:
    """softmax(scale q k^T) v, query t over the keys first[t] .. t (None: 0 .. t); query head n reads key head n // (N / K), which
    is never repeated. A soft cap c turns a scaled product x into c tanh(x / c); a sink is one more score of its head, whose
    weight goes nowhere.

    The backward computes the probabilities again (Dao et al. 2022, arXiv 2205.14135, section 3.1). Differentiable once.
    """
    return _attend(q, k, v, first, sinks, scale, soft_cap)[0]


@torch.library.custom_op("minitune::attend_in_blocks", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, sinks: Tensor | None, scale: float, soft_cap: float | None
) -> tuple[Tensor, Tensor]:
    """(the result, the highest score of each query where they are needed)."""
    plan, rule = _layout(first, q), _Rule(q.shape[1] // k.shape[1], scale, soft_cap)
    keys, values = plan.keys.gathered(k), plan.keys.gathered(v)
    outs, tops = [], []
    for b, part in zip(plan.blocks, plan.queries.gathered(q), strict=True):
        rows, seen, bias = rule.folded(part, k.shape[1]), _seen(keys, b), rule.bias(b, k.shape[1], q.dtype)
        top = None
        if rule.shifts(q.dtype):
            top = torch.baddbmm(bias, rows, seen.mT, alpha=scale).amax(-1, keepdim=True)
            tops.append(rule.unfolded(top, k.shape[1]))
        outs.append(rule.unfolded(rule.weights(rows, seen, bias, top, sinks)[0] @ _seen(values, b), k.shape[1]))
    highest = plan.queries.scattered(tops, q.shape) if tops else _by_token(q, 0)
    return plan.queries.scattered(outs, q.shape), highest


@torch.library.custom_op("minitune::attend_in_blocks_backward", mutates_args=())
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
    plan, rule = _layout(first, q), _Rule(q.shape[1] // k.shape[1], scale, soft_cap)
    wide, n_kv = wide_dtype(q.dtype), k.shape[1]
    keys, values = plan.keys.gathered(k), plan.keys.gathered(v)
    d_k, d_v = ([torch.zeros(x.shape, dtype=wide) for x in boxes] for boxes in (keys, values))
    d_q, sunk = [], [] if sinks is None else [torch.zeros_like(sinks, dtype=wide)]
    highest = plan.queries.gathered(tops) if rule.shifts(q.dtype) else [None] * len(plan.blocks)
    parts = zip(plan.blocks, plan.queries.gathered(q), plan.queries.gathered(d_out, zeros=True), highest, strict=True)
    for b, part, d_part, top in parts:
        rows, d_rows, seen = rule.folded(part, n_kv), rule.folded(d_part, n_kv), _seen(keys, b)
        top = None if top is None else rule.folded(top, n_kv)
        weights, whole, slope = rule.weights(rows, seen, rule.bias(b, n_kv, q.dtype), top, sinks)
        d_whole = d_rows @ _seen(values, b).mT
        d_whole = (d_whole if sinks is None else F.pad(d_whole, (0, 1))).to(whole.dtype)
        d_scores = torch._softmax_backward_data(d_whole, whole, -1, whole.dtype)  # pyright: ignore[reportPrivateImportUsage]
        del d_whole, whole  # each as large as the block's scores
        if sunk:
            own = rule.unfolded(d_scores[..., -1:], n_kv).to(wide)
            sunk = [sunk[0] + own.sum((0, 2, 3))]
        d_scores = d_scores[..., : seen.shape[1]]
        d_scores = (d_scores if slope is None else d_scores * slope).to(q.dtype)
        d_q.append(rule.unfolded(d_scores @ seen * scale, n_kv))
        place = (slice(b.n_spans), slice(None), slice(b.lowest, b.end))
        new = (d_scores.mT @ rows * scale, weights.mT @ d_rows)
        tree.donate_sum((d_k[b.group][place], d_v[b.group][place]), tuple(x.unflatten(0, (-1, n_kv)) for x in new))
    d_keys, d_values = (plan.keys.scattered([x.to(k.dtype) for x in boxes], k.shape) for boxes in (d_k, d_v))
    return plan.queries.scattered(d_q, q.shape), d_keys, d_values, sunk[0].to(q.dtype) if sunk else q.new_empty(0)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, first: Any, sinks: Any, scale: float, soft_cap: float | None) -> tuple[Tensor, Tensor]:
    n_tops = int(_Rule(1, scale, soft_cap).shifts(q.dtype))
    return _by_token(q, q.shape[3]), _by_token(q, n_tops)


@_attend_backward.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Any, sinks: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (_by_token(x, x.shape[3]) for x in (q, k, v))
    return d_q, d_k, d_v, q.new_empty(0 if sinks is None else sinks.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.scale, ctx.soft_cap = inputs[5:]
    ctx.save_for_backward(*inputs[:5], output[1])


def _gradients(ctx: Any, d_out: Tensor, d_top: Tensor) -> tuple[Any, ...]:
    sinks = ctx.saved_tensors[4]
    d_q, d_k, d_v, d_sinks = _attend_backward(d_out, *ctx.saved_tensors, ctx.scale, ctx.soft_cap)
    return d_q, d_k, d_v, None, None if sinks is None else d_sinks, None, None


_attend.register_autograd(_gradients, setup_context=_keep)


class _Rule(NamedTuple):
    """What all blocks of a call have in common; inside, the queries of heads that share keys lie side by side: [s*K G*t ...]."""

    groups: int
    scale: float
    soft_cap: float | None

    def shifts(self, dtype: torch.dtype) -> bool:
        """Whether a query's highest score is taken off before its products are rounded: in half precision what weighs most is
        then exact. A cap is no shift, and needs the products as they are."""
        return self.soft_cap is None and dtype in (torch.bfloat16, torch.float16)

    def folded(self, x: Float[Tensor, "s N t c"], n_kv_heads: int) -> Float[Tensor, "sK Gt c"]:
        """The heads that share keys side by side."""
        return x.view(len(x) * n_kv_heads, self.groups * x.shape[2], x.shape[3])

    def unfolded(self, x: Float[Tensor, "sK Gt c"], n_kv_heads: int) -> Float[Tensor, "s N t c"]:
        """What folded came from."""
        return x.view(len(x) // n_kv_heads, n_kv_heads * self.groups, x.shape[1] // self.groups, x.shape[2])

    def bias(self, b: Block, n_kv_heads: int, dtype: torch.dtype) -> Float[Tensor, "#sK Gt n"]:
        """-inf where a query of a block does not see a key, else 0; one for all spans where they agree."""
        bias = torch.full((b.end - b.start, b.end - b.lowest), -torch.inf, dtype=dtype).triu(1 + b.start - b.lowest)
        if b.first is None:
            return bias.repeat(1, self.groups, 1)
        past = torch.from_numpy(np.arange(b.lowest, b.end) < b.first[..., None])
        bias = bias.masked_fill(past, -torch.inf).repeat(1, self.groups, 1)
        return bias if len(bias) == 1 else bias.repeat_interleave(n_kv_heads, 0)

    def weights(
        self,
        rows: Float[Tensor, "sK Gt E"],
        keys: Float[Tensor, "sK n E"],
        bias: Float[Tensor, "#sK Gt n"],
        top: Float[Tensor, "sK Gt 1"] | None,
        sinks: Float[Tensor, "N"] | None,
    ) -> tuple[Float[Tensor, "sK Gt n"], Float[Tensor, "sK Gt _"], Tensor | None]:
        """(the weight of every key, the same with the sinks' as it is computed, the derivative of the cap)."""
        slope = None
        if self.soft_cap is None:
            shift = top
            scores = torch.baddbmm(bias if shift is None else bias - shift, rows, keys.mT, alpha=self.scale)
        else:
            wide = wide_dtype(rows.dtype)
            shift, capped = None, torch.tanh((rows.to(wide) @ keys.to(wide).mT) * (self.scale / self.soft_cap))
            scores, slope = self.soft_cap * capped + bias, 1 - capped.square()
        if sinks is not None:
            n_spans, n_queries = len(rows) * self.groups // len(sinks), rows.shape[1] // self.groups
            own = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(n_spans, -1, n_queries, 1).contiguous()
            own = self.folded(own, len(sinks) // self.groups)
            scores = torch.cat([scores, own if shift is None else own - shift], dim=-1)
        whole = torch.softmax(scores, dim=-1)
        return whole[..., : keys.shape[1]].to(rows.dtype), whole, slope


def _layout(first: Int[Tensor, "B T"] | None, q: Float[Tensor, "B N T E"]) -> Layout:
    starts = np.zeros((len(q), q.shape[2]), dtype=np.int64) if first is None else first.numpy()
    return layout(starts, max(1, BLOCK // q.dtype.itemsize))


def _seen(boxes: list[Float[Tensor, "_ K _ E"]], b: Block) -> Float[Tensor, "sK n E"]:
    """The keys, or the values, from the first that any query of a block sees to the block's end: a view."""
    return boxes[b.group][: b.n_spans, :, b.lowest : b.end].flatten(0, 1)


def _by_token(x: Float[Tensor, "B H T E"], width: int) -> Float[Tensor, "B H T {width}"]:
    """Memory of x's shape in the order in which Table.scattered leaves it."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], width).transpose(1, 2)
