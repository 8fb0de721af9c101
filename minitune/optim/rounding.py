"""Rounding at random of parameters in bfloat16, which keeps the steps that rounding to the nearest would drop.

The random numbers are a hash of (seed, step, path, place of the element): each has its own, whatever slice of a leaf is rounded,
on every device alike, and no device waits for the host to read its step count.
"""

from collections.abc import Sequence
from typing import ClassVar

import msgspec
import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from minitune import seeds, tree
from minitune.optim.transforms import Scope, Slice, zero_count
from minitune.tree import Tree

GOLDEN = -1640531527  # 2^32 / golden ratio, as a signed number: neighbours in the order of elements become far apart
MIX_32 = (0x7FEB352D, 0x846CA68B - 2**32)  # multipliers of the hash "lowbias32" (Wellons 2018)
MIX_64 = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)  # of splitmix64 (Steele et al. 2014)


class RoundStochastically(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last transform before bfloat16 parameters: an update u becomes the one that takes p to p + u rounded up or down at
    random, with the odds that make its mean p + u; steps too small for bfloat16 then add up in place of being lost."""

    scope: ClassVar[Scope] = "leaf"  # an update does not know where a slice began
    seed: int

    def init(self, params: Tree) -> Int[Tensor, ""]:
        """Step 0."""
        return zero_count(params)

    def update(self, grads: Tree, state: Int[Tensor, ""], params: Tree) -> tuple[Tree, Int[Tensor, ""]]:
        """round(p + u) - p in float32, drawn from (seed, step, path); leaves of other dtypes keep their u."""

        def change(path: str, u: Tensor, p: Tensor) -> Tensor:
            if p.dtype != torch.bfloat16:
                return u
            return self.rounded(p.float() + u.float(), state, path, 0).float() - p.float()

        pairs = zip(tree.items(grads), tree.leaves(params), strict=True)
        return tree.rebuild(grads, [change(path, u, p) for (path, u), p in pairs]), state + 1

    def rounded(self, x: Float[Tensor, "*shape"], step: Int[Tensor, ""], path: str, start: int) -> BFloat16[Tensor, "*shape"]:
        """Elements start, start + 1, ... of a leaf in float32, rounded as they are after `step` steps."""
        return stochastic_bfloat16(x, draw_16_bits(self.seed, step, path, start, x.numel()).view(x.shape))

    def slice_state(self, state: Int[Tensor, ""], slices: Sequence[Slice]) -> Int[Tensor, ""]:
        """The step count, for every slice the old one."""
        return state.clone()

    def counts(self, state: Int[Tensor, ""]) -> Int[Tensor, ""]:
        """The step count."""
        return state


def stochastic_bfloat16(x: Float[Tensor, "*shape"], drawn: Int[Tensor, "*shape"]) -> BFloat16[Tensor, "*shape"]:
    """float32 x as one of its two neighbours in bfloat16, the nearer the likelier, so that its mean is x.

    `drawn`, uniform in [0, 2^16), is added to the bits that bfloat16 has no room for, and these are cut off: a carry rounds up.
    """
    cut = ((x.contiguous().view(torch.int32) + drawn) & -(2**16)).view(torch.float32)
    return torch.where(torch.isfinite(x), cut, x).to(torch.bfloat16)


def draw_16_bits(seed: int, step: Int[Tensor, ""], path: str, start: int, n: int) -> Int[Tensor, "n"]:
    """Uniform integers in [0, 2^16) for elements start .. start + n of a leaf, on the device of `step`.

    One hash of 32 bits serves two neighbours.
    """
    first_key, second_key = _step_keys(seed, step)
    leaf_key = seeds.derive(seed, "rounding", path) & 0x7FFFFFFF
    x = torch.arange(start // 2, (start + n + 1) // 2, dtype=torch.int32, device=step.device)
    x = (x * GOLDEN + first_key) ^ leaf_key
    x = (x ^ ((x >> 16) & 0xFFFF)) * MIX_32[0] + second_key
    x = (x ^ ((x >> 15) & 0x1FFFF)) * MIX_32[1]
    x = x ^ ((x >> 16) & 0xFFFF)
    return (x.view(torch.int16)[start % 2 : start % 2 + n]).to(torch.int32) & 0xFFFF


def _step_keys(seed: int, step: Int[Tensor, ""]) -> tuple[Int[Tensor, ""], Int[Tensor, ""]]:
    """Two numbers of 31 bits that look unrelated from one step to the next."""
    z = (step + 1) * (0x9E3779B97F4A7C15 - 2**64) + seeds.derive(seed, "rounding")
    z = (z ^ ((z >> 30) & (2**34 - 1))) * MIX_64[0]
    z = (z ^ ((z >> 27) & (2**37 - 1))) * MIX_64[1]
    z = z ^ ((z >> 31) & (2**33 - 1))
    return (z & 0x7FFFFFFF).to(torch.int32), ((z >> 32) & 0x7FFFFFFF).to(torch.int32)
