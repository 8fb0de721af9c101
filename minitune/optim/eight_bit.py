"""AdamW whose moments are kept in 8 bits by block-wise dynamic quantization."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from minitune import hardware, tree
from minitune.optim.adamw import AdamState, adamw_update
from minitune.optim.transforms import Scope, Slice, slice_scratch_bytes, take_slice, zero_count
from minitune.structs import CheckedStruct
from minitune.tree import Tree
from minitune.types import Epsilon, Fraction, NonNegativeFloat

BLOCK = 256  # moments that share one scale
SMALLEST = 4096  # elements; smaller leaves keep their moments in float32
# codes of zero: the place of zero among the values with a sign, and the first one without
ZERO_CODES = {True: 127, False: 1}


class Moment8(NamedTuple):
    """Moment as table[codes] * absmax, one absmax for every BLOCK elements counted over the
    flattened leaf.
    """

    codes: UInt8[Tensor, "blocks block"]
    absmax: Float[Tensor, "blocks 1"]


class AdamW8bit(
    CheckedStruct, frozen=True, forbid_unknown_fields=True, tag="adamw8bit", tag_field="kind"
):
    """AdamW whose moments are kept in 8 bits by block-wise dynamic quantization (Dettmers et al.
    2021, arXiv 2110.02861, sections 2.1 and 2.2); a step is taken with the float32 moments, before
    they are rounded.
    """

    # or rather a block of elements: slices begin at multiples of BLOCK
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
        """Zero moments: in 8 bits for leaves of SMALLEST elements and more."""

        def zeros(p: Tensor, signed: bool) -> Any:
            if p.numel() >= SMALLEST:
                return _quantized_zeros(p.numel(), signed, p.device)
            return torch.zeros(p.shape, dtype=torch.float32, device=p.device)

        mu, nu = ([zeros(p, signed) for p in tree.leaves(params)] for signed in (True, False))
        return AdamState(zero_count(params), mu, nu)

    def update(self, grads: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
        """AdamW's update of the moments' values, leaf by leaf, so that one leaf at a time is held
        in float32.
        """
        rule = partial(adamw_update, self.lr, self.betas, self.eps, self.weight_decay)
        updates, mus, nus, step = [], [], [], state.step
        for g, p, mu, nu in zip(
            tree.leaves(grads), tree.leaves(params), state.mu, state.nu, strict=True
        ):
            m, v = (
                dequantize(x, signed, p) if isinstance(x, Moment8) else x
                for x, signed in ((mu, True), (nu, False))
            )
            u, (step, m, v) = rule(g.float(), AdamState(state.step, m, v), p.float())
            updates.append(u)
            mus.append(quantize(m, True) if isinstance(mu, Moment8) else m)
            nus.append(quantize(v, False) if isinstance(nu, Moment8) else v)
        return tree.rebuild(params, updates), AdamState(step, mus, nus)

    def slice_state(self, state: AdamState, slices: Sequence[Slice]) -> AdamState:
        """Codes and scales, or small moments, of these slices, where they lie, and a copy of the
        step count.
        """

        def cut(moment: Any, part: Slice) -> Any:
            if isinstance(moment, Moment8):
                return Moment8(*(x[part.start // BLOCK : -(-part.end // BLOCK)] for x in moment))
            return take_slice(moment, part.start, part.end)

        mu, nu = (
            [cut(moment[part.number], part) for part in slices] for moment in (state.mu, state.nu)
        )
        return AdamState(state.step.clone(), mu, nu)

    def counts(self, state: AdamState) -> Int[Tensor, ""]:
        """Step count."""
        return state.step

    def scratch_bytes(self, leaves: Sequence[Tensor], *, rounds: bool) -> int:
        """Ten float32 numbers an element of a slice, two of them the moments, and two codes."""
        return slice_scratch_bytes(leaves, 42, rounds=rounds)


def quantize(x: Float[Tensor, "*shape"], signed: bool) -> Moment8:
    """Nearest codes of x over the largest absolute value of its block.

    An unsigned x is never rounded to 0 (nor does bitsandbytes): it is what Adam divides by, and a
    step would grow by 1 / eps.
    """
    flat = x.flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1, keepdim=True)
    table = dynamic_table(signed, x.device)
    unit = blocks / torch.where(absmax > 0, absmax, 1.0)
    codes = torch.bucketize(unit, (table[1:] + table[:-1]) / 2).clamp(min=0 if signed else 1)
    return Moment8(codes.to(torch.uint8), absmax)


def _quantized_zeros(n: int, signed: bool, device: torch.device) -> Moment8:
    """Result of `quantize` on n zeros, without the zeros."""
    n_blocks = -(-n // BLOCK)
    shape = n_blocks, BLOCK
    codes = torch.full(shape, ZERO_CODES[signed], dtype=torch.uint8, device=device)
    return Moment8(codes, torch.zeros(n_blocks, 1, device=device))


def dequantize(q: Moment8, signed: bool, like: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """table[codes] * absmax in float32, in the shape of `like`."""
    table = dynamic_table(signed, q.absmax.device)
    values = table.index_select(0, q.codes.flatten().int()).view(q.codes.shape)
    return (values * q.absmax).flatten()[: like.numel()].view(like.shape)


def dynamic_table(signed: bool, device: torch.device | None = None) -> Float[Tensor, "codes"]:
    """256 values of the dynamic map in [-1, 1] or [0, 1]: seven decades, each with twice the
    fractions of the one below (Dettmers et al. 2021, section 1.3), with 0 and 1. It is computed
    where it is used: a copy would make a device wait.
    """
    wide = hardware.widest_float(device or torch.device("cpu"))
    # value number k has 2^floor(log2 k) fractions in its decade; the lowest decade begins at k = 1,
    # or 2 without a sign
    k = torch.arange(1 if signed else 2, 128 if signed else 256, device=device).to(wide)
    octave = torch.floor(torch.log2(k + 0.5))
    n = torch.exp2(octave)
    fraction = 0.1 + 0.9 * (k - n + 0.5) / n
    values = torch.pow(10.0, octave - (6 if signed else 7)) * fraction
    ends = torch.arange(2, device=device).to(wide)
    return (
        torch.cat([values, ends, -values] if signed else [values, ends])
        .sort()
        .values.to(torch.float32)
    )
