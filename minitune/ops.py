"""The few operations that a decoder is made of; every one a pure function of tensors."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minitune import hardware, quant, tree, widened
from minitune.grad import in_chunks, remat, under_transform, with_derivative, with_row_gradients
from minitune.hardware import to_device
from minitune.tree import Tree
from minitune.types import Adapted, Delta, QTensor

Norm = Literal["w_after_cast", "w_before_cast", "one_plus_w"]
HEAD_CHUNK = 2**22  # logits alive at a time: 16 MiB in float32, which stay near a core
HEAD_ROWS = 128  # but at least so many rows of them, or a matmul takes its time to read the head of a large vocabulary
ON_GPU = 64  # times as many on a GPU, which has no such caches: the head is read once a chunk
TRAINED = 4  # times as many where the head trains: each chunk then adds to a gradient as large as the head
PIECE = 2**19  # logits that a loss is given at a time on a CPU: what it makes of them then stays near a core


def linear(
    x: Float[Tensor, "*rows in"],
    w: Float[Tensor, "out in"] | QTensor | Adapted,
    bias: Float[Tensor, "out"] | None = None,
) -> Float[Tensor, "*rows out"]:
    """Product x W^T + bias in the dtype of x, however the leaf W multiplies: dense, quantized or adapted.

    TypeError for a Delta, whose scale only the rule that trains it knows.
    """
    if isinstance(w, Adapted):
        return _adapted_linear(x, w, bias)
    bias = None if bias is None else bias.to(x.dtype)
    if isinstance(w, Delta):
        raise TypeError("ops: a leaf of the params is a Delta, expected a weight; make the params of a forward by Lora.apply")
    if not isinstance(w, Tensor):
        y = quant.linear(x, w)
    elif w.itemsize < x.itemsize:
        y = widened.linear(x, w)
    else:
        return F.linear(x, w.to(x.dtype), bias)
    return y if bias is None else y + bias


def _adapted_linear(x: Tensor, w: Adapted, bias: Tensor | None) -> Tensor:
    """x (W + b a)^T + bias (Hu et al. 2021, arXiv 2106.09685, eq. 3, with the scale inside b), its rows at length m where the
    leaf has a magnitude (Liu et al. 2024, arXiv 2402.09353, eq. 5)."""
    magnitude = w.m if isinstance(w.m, Tensor) else None
    # a product that takes the bias along adds it first
    bias_comes_first = isinstance(w.w, Tensor) and magnitude is None
    y = linear(x, w.w, bias if bias_comes_first else None)

    a, b = w.a.to(x.dtype), w.b.to(x.dtype)
    n = 1 if a.ndim == 2 else len(a)
    rows, z = (t.reshape(n, -1, t.shape[-1]) for t in (x, y))
    # b^T in its own memory: on a CPU the gradient of a view of b takes ten times as long
    z = torch.baddbmm(z, rows @ a.mT, b.reshape(n, *b.shape[-2:]).mT.contiguous())
    if magnitude is not None:
        z = z * (magnitude / row_norms(w)).to(x.dtype).unsqueeze(-2)
    y = z.view(y.shape)
    return y if bias is None or bias_comes_first else y + bias.to(x.dtype)


def row_norms(adapted: Adapted) -> Float[Tensor, "*n out"]:
    """|W + b a| of every row in float32 or wider, held constant in the gradient (Liu et al. 2024, section 4.3).

    From |W|^2 + 2 W a^T b + b a a^T b, so that the sum W + b a is never built.
    """
    wide = torch.promote_types(adapted.a.dtype, torch.float32)
    w = adapted.w if isinstance(adapted.w, Tensor) else quant.dequantize(adapted.w, wide)
    w, a, b = (x.detach().to(wide) for x in (w, adapted.a, adapted.b))
    square = w.square().sum(-1) + 2 * ((w @ a.mT) * b).sum(-1) + ((b @ (a @ a.mT)) * b).sum(-1)
    return square.clamp(min=torch.finfo(wide).tiny).sqrt()


def embed(tokens: Int[Tensor, "B T"], w: Float[Tensor, "V D"]) -> Float[Tensor, "B T D"]:
    """Row tokens[b, t] of the embedding, in its dtype; in float32 where the device multiplies no bfloat16.

    All that follows takes its dtype from here: such a device multiplies float32 activations by weights that stay in 16 bits.
    """
    return F.embedding(tokens, w).to(hardware.product_dtype(w.dtype, w.device))


def rms_norm(
    x: Float[Tensor, "*rows D"], w: Float[Tensor, "D"], eps: float, kind: Norm = "w_after_cast"
) -> Float[Tensor, "*rows D"]:
    """w * x / sqrt(mean(x^2) + eps), the quotient in float32 (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4).

    Families differ in where w comes in: after the cast back to the dtype of x, before it, or before it as 1 + w.
    """

    def normed(x: Tensor, w: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        if kind == "w_after_cast":
            return w.to(x.dtype) * scaled.to(x.dtype)
        w = w.to(wide.dtype)
        return (scaled * (1.0 + w if kind == "one_plus_w" else w)).to(x.dtype)

    def derivative(d_y: Tensor, needed: Sequence[bool], x: Tensor, w: Tensor) -> tuple[Tensor | None, Tensor | None]:
        # with r = 1 / sqrt(mean(x^2) + eps) and y = s x r: d_x = r (s d_y - x r^2 mean(x s d_y)), d_s = sum of d_y x r
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        d_x = d_w = None
        if needed[0]:
            after = kind == "w_after_cast"
            factor = w.to(x.dtype) if after else w.to(wide.dtype)
            d_scaled = ((d_y if after else d_y.to(wide.dtype)) * (1.0 + factor if kind == "one_plus_w" else factor)).to(
                wide.dtype
            )
            along = (wide * d_scaled).mean(-1, keepdim=True) * r.square()
            d_x = (torch.addcmul(d_scaled, wide, along, value=-1.0) * r).to(x.dtype)
        if needed[1]:
            scaled = (wide * r).to(x.dtype if kind == "w_after_cast" else wide.dtype)
            d_w = (d_y.to(scaled.dtype) * scaled).reshape(-1, x.shape[-1]).sum(0).to(w.dtype)
        return d_x, d_w

    return _recomputed(normed, derivative)(x, w)


def swiglu(gate: Float[Tensor, "*rows F"], up: Float[Tensor, "*rows F"]) -> Float[Tensor, "*rows F"]:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def derivative(d_y: Tensor, _: Sequence[bool], gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.aten.silu_backward(d_y * up, gate), d_y * F.silu(gate)

    return _recomputed(lambda gate, up: F.silu(gate) * up, derivative)(gate, up)


def geglu(gate: Float[Tensor, "*rows F"], up: Float[Tensor, "*rows F"]) -> Float[Tensor, "*rows F"]:
    """gelu(gate) * up with the tanh form of gelu (Shazeer 2020, arXiv 2002.05202, eq. 6)."""
    return _recomputed(lambda gate, up: F.gelu(gate, approximate="tanh") * up)(gate, up)


def rope_table(
    positions: Int[Tensor, "B T"], frequencies: Float[Tensor, "*rows half"], dtype: torch.dtype, magnitude: float = 1.0
) -> tuple[Float[Tensor, "b T E"], Float[Tensor, "b T E"]]:
    """magnitude * cos and sin of position * frequency [rad], each twice; float32, then cast (Su et al. 2021, arXiv 2104.09864,
    eq. 34). frequencies may differ from token to token."""
    angles = positions[..., None].to(frequencies.dtype) * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return (magnitude * angles.cos()).to(dtype), (magnitude * angles.sin()).to(dtype)


def rotate(x: Float[Tensor, "B H T E"], rope: tuple[Float[Tensor, "b T e"], Float[Tensor, "b T e"]]) -> Float[Tensor, "B H T E"]:
    """Rotate dimension i with i + e/2 (the half-split layout of Hugging Face weights) by the angles of each token, in the dtype
    of the angles if that is wider; dimensions from e on stay as they are."""
    cos, sin = (table[:, None] for table in rope)
    if cos.shape[-1] < x.shape[-1]:
        return torch.cat([rotate(x[..., : cos.shape[-1]], rope), x[..., cos.shape[-1] :]], dim=-1)
    # with the heads of a token side by side, as the linear map before left them; the sign goes to the table, which is smaller
    x, cos, sin = (t.transpose(1, 2) for t in (x, cos, sin))
    (first, second), (upper, lower) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    turned = x * cos + torch.cat([second, first], dim=-1) * torch.cat([-upper, lower], dim=-1)
    return turned.to(x.dtype).transpose(1, 2)


def token_losses(
    loss: Callable[[Float[Tensor, "n V"], Tree], Float[Tensor, "n *values"]],
    hidden: Float[Tensor, "B T D"],
    targets: Tree,
    mask: Bool[Tensor, "B T"],
    head: Float[Tensor, "V D"] | QTensor | Adapted,
    *,
    summed: bool = False,
) -> Float[Tensor, "B T *values"]:
    """loss(hidden head^T, targets) at the rows where mask is True, 0 elsewhere, without ever holding whole logits.

    targets is a tree of tensors [B, T, ...], of which the loss is given the same rows: token ids, a teacher's hidden states.
    A loss may give several values a row.
    Labelled rows are flattened and cut in chunks, see head_chunk. The gradients of each chunk are taken while its
    logits are there: those of its rows, and of the head where that trains (grad.in_chunks, which says what
    `summed` is for).
    targets and mask may lie on the host beside hidden states on an accelerator: the labelled rows are then counted
    there and sent. If the mask lies on an accelerator, the host waits for it to learn how many rows are labelled.
    """

    def piece(rows: Tensor, labels: Tree, w: Tensor | QTensor | Adapted) -> Tensor:
        return loss(linear(rows, w), labels)

    trains = any(leaf.requires_grad for leaf in tree.leaves(head))
    chunk = head_chunk(head, trains)
    flat, labels, place = hidden.flatten(0, 1), tree.map(lambda x: x.flatten(0, 1), targets), hidden.device
    if under_transform():  # the number of labelled rows depends on the data, which no vmap can follow: all rows are taken
        labels, mask = tree.map(lambda x: to_device(x, place), (labels, mask))
        nats = _chunked(remat(piece), flat, labels, head, chunk).unflatten(0, mask.shape)
        return torch.where(mask.view(*mask.shape, *(1 for _ in nats.shape[2:])), nats, 0.0)
    rows = mask.flatten().nonzero().squeeze(1)
    # rows are taken where they lie: what comes from the host is no more than the labelled ones
    given = tree.map(lambda x: to_device(x[to_device(rows, x.device)], place), labels)
    rows = to_device(rows, place)
    chosen = flat[rows]
    if not torch.is_grad_enabled() or not any(leaf.requires_grad for leaf in tree.leaves((hidden, head))):
        nats = _chunked(piece, chosen, given, head, chunk)
    elif trains:

        def at(start: int, some: Tensor, head: Tree) -> Tensor:
            return piece(some, tree.map(lambda x: x[start : start + len(some)], given), head)

        nats = in_chunks(at, chosen, head, chunk, summed)
    else:
        nats = _chunked(with_row_gradients(piece), chosen, given, head, chunk)
    return nats.new_zeros(mask.numel(), *nats.shape[1:]).index_put((rows,), nats).unflatten(0, mask.shape)


def by_rows(loss: Callable[..., Float[Tensor, "n *values"]]) -> Callable[..., Float[Tensor, "n *values"]]:
    """loss(logits [n V], *trees of n rows), taken of a few rows at a time, and its gradient by logits with it: nothing but that
    gradient is kept. For a loss whose values of a row depend on that row alone. Differentiable once, but under a transform."""

    def pieces(logits: Tensor, *targets: Tree) -> Tensor:
        if under_transform():
            return loss(logits, *targets)
        each = with_row_gradients(loss) if torch.is_grad_enabled() and logits.requires_grad else loss
        n = rows_at_once(logits)
        parts = enumerate(logits.split(n))
        return torch.cat([each(some, *tree.map(lambda x, i=i: x[n * i : n * (i + 1)], targets)) for i, some in parts])

    return pieces


def rows_at_once(logits: Float[Tensor, "n V"]) -> int:
    """How many rows `by_rows` gives to a loss."""
    return max(1, PIECE // logits.shape[-1] if logits.device.type == "cpu" else len(logits))


def head_chunk(head: Float[Tensor, "V D"] | QTensor | Adapted, trains: bool = False) -> int:
    """How many rows of logits are alive at a time."""
    times = (1 if tree.leaves(head)[0].device.type == "cpu" else ON_GPU) * (TRAINED if trains else 1)
    return max(HEAD_ROWS, times * HEAD_CHUNK // head.shape[0])


def _chunked(piece: Callable[..., Tensor], rows: Tensor, labels: Tree, head: Tensor | QTensor | Adapted, chunk: int) -> Tensor:
    starts = range(0, max(len(rows), 1), chunk)  # no row at all still makes one empty piece
    return torch.cat([piece(*tree.map(lambda x, i=i: x[i : i + chunk], (rows, labels)), head) for i in starts])


def _recomputed(f: Callable[..., Tensor], derivative: Callable[..., Any] | None = None) -> Callable[..., Tensor]:
    """Function f, which the backward recomputes or takes the `derivative` of (grad.with_derivative).

    Element-wise work costs less than keeping its intermediate results.
    """
    if not torch.is_grad_enabled() or under_transform() or torch.compiler.is_compiling():
        return f
    return remat(f) if derivative is None else with_derivative(f, derivative)
