"""Attention in blocks of queries for processors without a fused kernel that is worth its name.

Every query sees a contiguous run of keys that ends at itself: from the start of its document, of its window, or of the row. So a
block of queries needs the keys between the earliest start and its own end, and no more; what lies outside is never computed, and
what lies inside is matrix products over the heads that share keys, and torch's softmax. An operator of its own, which
torch.compile calls as it is.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minitune import tree

BLOCK = 256  # bytes of a block's queries at one number each: so many that their scores, by keys, stay in a core's cache
APART = 2**16  # scores that take as long as starting the work on one more block


class Block(NamedTuple):
    """Queries start .. end of some rows, and the first key that any of them sees."""

    rows: slice
    lowest: int
    start: int
    end: int


def blocks(first: Int[Tensor, "b T"] | None, n_queries: int, n_heads: int, dtype: torch.dtype) -> list[Block]:
    """The blocks that make up a batch whose scores are of dtype; first None: all see from key 0. Rows go together, from the first
    key that any of them sees, unless going apart saves more than it costs."""
    found, size = [], max(1, BLOCK // dtype.itemsize)
    for start in range(0, n_queries, size):
        end = min(start + size, n_queries)
        lows = [0] if first is None else first[:, start:end].amin(1).tolist()
        saved = sum(low - min(lows) for low in lows) * (end - start) * n_heads
        if first is None or saved < APART * len(lows):
            found.append(Block(slice(None), min(lows), start, end))
        else:
            found += [Block(slice(b, b + 1), low, start, end) for b, low in enumerate(lows)]
    return found


def attend(
    q: Float[Tensor, "B N T E"],
    k: Float[Tensor, "B K T E"],
    v: Float[Tensor, "B K T E"],
    first: Int[Tensor, "b T"] | None,
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
    """(the result, the highest score of each query)."""
    k, v, plan = k.contiguous(), v.contiguous(), blocks(first, q.shape[2], q.shape[1], q.dtype)  # a block's keys are views
    rule = _Rule(q.shape[1] // k.shape[1], scale, soft_cap)
    outs, tops = [], []
    for b in plan:
        rows, keys, values, bias = _part(q, k, v, first, b, rule)
        top = torch.baddbmm(bias, rows, keys.mT, alpha=scale).amax(-1, keepdim=True) if rule.shifts(q) else rows[..., :1]
        outs.append(rule.unfolded(rule.weights(rows, keys, bias, top, sinks)[0] @ values, k.shape[1]))
        tops.append(rule.unfolded(top, k.shape[1]))
    return _joined(outs, plan), _joined(tops, plan)


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
    k, v, plan = k.contiguous(), v.contiguous(), blocks(first, q.shape[2], q.shape[1], q.dtype)  # a block's keys are views
    rule = _Rule(q.shape[1] // k.shape[1], scale, soft_cap)
    wide = torch.promote_types(q.dtype, torch.float32)
    d_k, d_v = (torch.zeros(x.shape, dtype=wide) for x in (k, v))
    d_q, sunk = [], [] if sinks is None else [torch.zeros_like(sinks, dtype=wide)]
    for b in plan:
        rows, keys, values, bias = _part(q, k, v, first, b, rule)
        here = (b.rows, slice(None), slice(b.start, b.end))
        d_rows, top = (rule.folded(x[here], k.shape[1]) for x in (d_out, tops))
        weights, whole, slope = rule.weights(rows, keys, bias, top, sinks)
        d_whole = F.pad(d_rows @ values.mT, (0, whole.shape[-1] - weights.shape[-1])).to(whole.dtype)
        d_scores = torch._softmax_backward_data(d_whole, whole, -1, whole.dtype)  # pyright: ignore[reportPrivateImportUsage]
        del d_whole, whole  # each as large as the block's scores
        if sunk:
            own = rule.unfolded(d_scores[..., -1:], k.shape[1]).to(wide)
            sunk = [sunk[0] + own.sum((0, 2, 3))]
        d_scores = d_scores[..., : keys.shape[1]]
        d_scores = (d_scores if slope is None else d_scores * slope).to(q.dtype)
        d_q.append(rule.unfolded(d_scores @ keys * scale, k.shape[1]))
        parts = (d_scores.mT @ rows * scale, weights.mT @ d_rows)
        place = (b.rows, slice(None), slice(b.lowest, b.end))
        tree.donate_sum((d_k[place], d_v[place]), tuple(x.unflatten(0, (-1, k.shape[1])) for x in parts))
    return _joined(d_q, plan), d_k.to(k.dtype), d_v.to(v.dtype), sunk[0].to(q.dtype) if sunk else q.new_empty(0)


@_attend.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(*q.shape[:3], 1)


@_attend_backward.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Any, sinks: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
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
    """What all blocks of a call have in common; inside, the queries of heads that share keys lie side by side: [r*K G*t ...]."""

    groups: int
    scale: float
    soft_cap: float | None

    def shifts(self, q: Tensor) -> bool:
        """Whether a query's highest score is taken off before its products are rounded: in half precision what weighs most is
        then exact. A cap is no shift, and needs the products as they are."""
        return self.soft_cap is None and q.dtype in (torch.bfloat16, torch.float16)

    def folded(self, x: Float[Tensor, "r N t c"], n_kv_heads: int) -> Float[Tensor, "rK Gt c"]:
        """The heads that share keys side by side."""
        return x.reshape(len(x) * n_kv_heads, -1, x.shape[3])

    def unfolded(self, x: Float[Tensor, "rK Gt c"], n_kv_heads: int) -> Float[Tensor, "r N t c"]:
        """What folded came from."""
        return x.view(-1, n_kv_heads, self.groups, x.shape[1] // self.groups, x.shape[2]).flatten(1, 2)

    def weights(
        self,
        rows: Float[Tensor, "rK Gt E"],
        keys: Float[Tensor, "rK s E"],
        bias: Float[Tensor, "#rK Gt s"],
        top: Float[Tensor, "rK Gt 1"],
        sinks: Float[Tensor, "N"] | None,
    ) -> tuple[Float[Tensor, "rK Gt s"], Float[Tensor, "rK Gt _"], Tensor | None]:
        """(the weight of every key, the same with the sinks' as it is computed, the derivative of the cap)."""
        slope = None
        if self.soft_cap is None:
            shift = top if self.shifts(rows) else None
            scores = torch.baddbmm(bias if shift is None else bias - shift, rows, keys.mT, alpha=self.scale)
        else:
            wide = torch.promote_types(rows.dtype, torch.float32)
            shift, capped = None, torch.tanh((rows.to(wide) @ keys.to(wide).mT) * (self.scale / self.soft_cap))
            scores, slope = self.soft_cap * capped + bias, 1 - capped.square()
        if sinks is not None:
            n_rows, n_queries = len(rows) * self.groups // len(sinks), rows.shape[1] // self.groups
            own = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(n_rows, -1, n_queries, 1)
            own = self.folded(own, len(sinks) // self.groups)
            scores = torch.cat([scores, own if shift is None else own - shift], dim=-1)
        whole = torch.softmax(scores, dim=-1)
        return whole[..., : keys.shape[1]].to(rows.dtype), whole, slope


def _part(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, b: Block, rule: _Rule
) -> tuple[Tensor, Tensor, Tensor, Float[Tensor, "#rK Gt s"]]:
    """A block's queries, keys and values, and -inf where a query does not see a key, else 0 (for all rows where they agree)."""
    keys, queries = torch.arange(b.lowest, b.end), torch.arange(b.start, b.end)[:, None]
    here = torch.zeros(1, 1, dtype=torch.long) if first is None else first[b.rows, b.start : b.end]
    here = here if len(here) == 1 or bool((here != here[:1]).any()) else here[:1]
    seen = (keys <= queries) & (keys >= here[..., None])
    bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -torch.inf).repeat(1, rule.groups, 1)
    bias = bias if len(bias) == 1 else bias.repeat_interleave(k.shape[1], 0)
    keys, values = (x[b.rows, :, b.lowest : b.end].flatten(0, 1) for x in (k, v))
    return rule.folded(q[b.rows, :, b.start : b.end], k.shape[1]), keys, values, bias


def _joined(parts: list[Tensor], plan: list[Block]) -> Tensor:
    """The blocks' results in their places: rows under rows, queries beside queries."""
    columns: dict[int, list[Tensor]] = {}
    for part, b in zip(parts, plan, strict=True):
        columns.setdefault(b.start, []).append(part)
    return torch.cat([torch.cat(column) if len(column) > 1 else column[0] for column in columns.values()], dim=2)
