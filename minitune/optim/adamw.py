"""AdamW, by its definition and by torch's kernel that reads and writes all of its memory once."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minitune import hardware, tree
from minitune.optim.rounding import Rounding
from minitune.optim.transforms import Scope, Slice, slice_tree, wide_zeros, zero_count
from minitune.structs import CheckedStruct
from minitune.tree import Tree
from minitune.types import Epsilon, Fraction, NonNegativeFloat

# elements per fused call; bounds the scratch memory of a donated step
FUSED_ELEMENTS = {"cpu": 2**20, "cuda": 2**26, "mps": 2**26, "xpu": 2**26}


class AdamState(NamedTuple):
    """Steps taken, and the running means of the gradient and of its square, in the structure of the
    parameters.
    """

    step: Int[Tensor, ""]
    mu: Tree
    nu: Tree


class FusedSlice(NamedTuple):
    """Part of a leaf that one call of the kernel updates, and where it begins in the flattened
    leaf.
    """

    path: str
    start: int
    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor


class AdamW(CheckedStruct, frozen=True, forbid_unknown_fields=True, tag="adamw", tag_field="kind"):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, 1711.05101, algorithm 2)."""

    scope: ClassVar[Scope] = "element"
    # learning rate at the schedule's peak; in a program also "auto", by the size of the model
    lr: NonNegativeFloat
    # what the means of the gradient and of its square keep at a step: more averages longer
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    # added to the root of the mean square: more shortens steps where gradients are tiny
    eps: Epsilon = 1e-8
    # each step takes lr * weight_decay off a weight, as a share of it
    weight_decay: NonNegativeFloat = 0.0

    def init(self, params: Tree) -> AdamState:
        """Zero moments, in float32 or wider."""
        return AdamState(
            zero_count(params), tree.map(wide_zeros, params), tree.map(wide_zeros, params)
        )

    def update(self, grads: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
        """-lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) - lr * weight_decay * p."""
        return adamw_update(self.lr, self.betas, self.eps, self.weight_decay, grads, state, params)

    def slice_state(self, state: AdamState, slices: Sequence[Slice]) -> AdamState:
        """Moments of these slices, where they lie, and a copy of the step count."""
        mu, nu = (slice_tree(tree.leaves(moment), slices) for moment in (state.mu, state.nu))
        return AdamState(state.step.clone(), mu, nu)

    def counts(self, state: AdamState) -> Int[Tensor, ""]:
        """Step count."""
        return state.step

    def scratch_bytes(self, leaves: Sequence[Tensor], *, rounds: bool) -> int:
        """Bytes of one fused call: a scaled gradient, for bfloat16 a wide one and a wide weight,
        for rounding three integers.
        """
        narrow = any(x.dtype == torch.bfloat16 for x in leaves)
        elements = min(
            sum(x.numel() for x in leaves),
            FUSED_ELEMENTS.get(leaves[0].device.type, FUSED_ELEMENTS["cpu"]),
        )
        return 4 * elements * (1 + 2 * narrow + 3 * (narrow and rounds))

    def is_fusable(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], state: AdamState
    ) -> bool:
        """True if torch's kernel takes these tensors: contiguous, on one device, moments as wide as
        weights or float32.
        """
        moments = tree.leaves(state.mu), tree.leaves(state.nu)
        return all(map(_is_fusable, params, grads, *moments))

    def fused_update(
        self,
        paths: Sequence[str],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: AdamState,
        *,
        grad_scale: Float[Tensor, ""],
        lr_scale: Float[Tensor, ""],
        path_factors: Sequence[float],
        rounded: Rounding | None,
        is_finite: Bool[Tensor, ""] | None,
    ) -> None:
        """Write over params and moments what a step on grads * grad_scale makes of them; the step
        count stays.

        The learning rate is lr * lr_scale * the leaf's own factor. Nothing is written if is_finite
        is false; None says that the caller has looked at it.
        """
        moments = tree.leaves(state.mu), tree.leaves(state.nu)
        groups: dict[Any, list[tuple[str, tuple[Tensor, ...]]]] = {}
        for path, factor, *leaves in zip(paths, path_factors, params, grads, *moments, strict=True):
            group = factor, leaves[0].dtype, leaves[0].device
            groups.setdefault(group, []).append((path, tuple(leaves)))

        for (factor, _, device), members in groups.items():
            # float64 moments, which only a CPU gives to the kernel, take them in float64
            wide_number = members[0][1][2].dtype
            lr = (self.lr * factor * lr_scale).to(device, wide_number)
            step = (state.step + 1).to(device, wide_number)
            found_inf = None if is_finite is None else (~is_finite).to(device, torch.float32)
            for chunk in _chunks(members, FUSED_ELEMENTS[device.type]):
                _donate_chunk(self, chunk, lr, step, grad_scale, found_inf, rounded)


def adamw_update(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grads: Tree,
    state: AdamState,
    params: Tree,
) -> tuple[Tree, AdamState]:
    """(updates, next state) of AdamW: a function of numbers, because torch.compile can't make a
    struct while it traces.
    """
    b1, b2 = betas
    t = state.step + 1
    grads = tree.map(lambda m, g: g.to(m.dtype), state.mu, grads)
    mu = tree.map(lambda m, g: torch.lerp(m, g, 1 - b1), state.mu, grads)
    nu = tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
    rate = lr / bias_correction(b1, t)
    root = bias_correction(b2, t).sqrt()

    def leaf(m: Tensor, v: Tensor, p: Tensor) -> Tensor:
        change = -rate.to(m.dtype) * m / (v.sqrt() / root.to(m.dtype) + eps)
        return change - (lr * weight_decay) * p.to(m.dtype)

    return tree.map(leaf, mu, nu, params), AdamState(t, mu, nu)


def bias_correction(beta: float, step: Int[Tensor, ""]) -> Float[Tensor, ""]:
    """1 - beta^step, exact to the last digits where a power in float32 would have lost four of its
    seven at step 1.
    """
    wide = step.to(hardware.widest_float(step.device))
    return -torch.expm1(wide * (math.log(beta) if beta else -math.inf))


def donate_adamw(
    rule: AdamW,
    lr: Float[Tensor, ""],
    step: Float[Tensor, ""],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    mu: Sequence[Tensor],
    nu: Sequence[Tensor],
    found_inf: Float[Tensor, ""] | None = None,
) -> None:
    """Write over params, mu and nu their values after AdamW's step number `step` (from 1), by
    torch's one-pass kernel.

    The kernel writes nothing where found_inf is 1. Beside tree.donate the only writer of tensors,
    and like it only for memory that the caller gave away.
    """
    b1, b2 = rule.betas
    rates = {"beta1": b1, "beta2": b2, "weight_decay": rule.weight_decay, "eps": rule.eps}
    lists = [list(params), list(grads), list(mu), list(nu), [], [step] * len(params)]
    flags = {"amsgrad": False, "maximize": False, "found_inf": found_inf}
    with torch.no_grad():
        torch._fused_adamw_(*lists, lr=lr, **rates, **flags)  # pyright: ignore[reportPrivateImportUsage, reportArgumentType]


def _donate_chunk(
    rule: AdamW,
    chunk: Sequence[FusedSlice],
    lr: Float[Tensor, ""],
    step: Float[Tensor, ""],
    grad_scale: Float[Tensor, ""],
    found_inf: Float[Tensor, ""] | None,
    rounded: Rounding | None,
) -> None:
    """Take the step of the slices of one call of the kernel, all of one dtype."""
    p, g, m, v = zip(*((one.p, one.g, one.m, one.v) for one in chunk), strict=True)
    # weights of 16 bits beside wider moments are updated as float32 copies
    wide = [x.to(y.dtype) for x, y in zip(p, m, strict=True)]
    g = [x.to(y.dtype) for x, y in zip(g, m, strict=True)]
    g = torch._foreach_mul(g, grad_scale.to(m[0].device, m[0].dtype))  # pyright: ignore[reportPrivateImportUsage]
    donate_adamw(rule, lr, step, wide, g, m, v, found_inf)
    if p[0].dtype == m[0].dtype:
        return
    new = wide
    if rounded is not None:
        new = [rounded(x, one.path, one.start) for x, one in zip(wide, chunk, strict=True)]
    tree.donate(p, new)


def _chunks(
    members: Sequence[tuple[str, tuple[Tensor, ...]]], limit: int
) -> Iterator[list[FusedSlice]]:
    """Leaves (p, g, m, v) of each path in their order, in lists of slices that have at most
    `limit` elements together.
    """
    chunk: list[FusedSlice] = []
    room = limit
    for path, leaves in members:
        start = 0
        for part in zip(*(x.reshape(-1).split(limit) for x in leaves), strict=True):
            n = part[0].numel()
            if room < n:
                yield chunk
                chunk, room = [], limit
            chunk.append(FusedSlice(path, start, *part))
            start, room = start + n, room - n
    if chunk:
        yield chunk


def _is_fusable(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> bool:
    moments = {m.dtype, v.dtype}
    narrow = p.dtype == torch.bfloat16 and g.dtype in (torch.bfloat16, torch.float32)
    kept = moments == {torch.float32} and (narrow or p.dtype == g.dtype == torch.float32)
    kept = kept or (moments == {p.dtype, g.dtype} == {torch.float64} and p.device.type == "cpu")
    whole = (
        p.shape == m.shape == v.shape == g.shape
        and p.is_contiguous()
        and m.is_contiguous()
        and v.is_contiguous()
    )
    return (
        kept
        and whole
        and p.device == m.device == v.device == g.device
        and p.device.type in FUSED_ELEMENTS
    )
