"""Rounding at random of parameters in bfloat16, which keeps the steps that rounding to the nearest
would drop.

A CPU draws from a generator of (seed, step, path), which is the fastest there. An accelerator
hashes (seed, step, path, place of the element) itself: a generator on the host would need the step
count, and the queue would wait until it is read.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor
from typing_extensions import TypeAliasType

from minitune import hardware, seeds, tree
from minitune.optim.transforms import Scope, Slice, zero_count
from minitune.structs import CheckedStruct
from minitune.tree import Tree

# (float32 values of a slice, path of its leaf, its start) -> bfloat16
Rounding = TypeAliasType("Rounding", Callable[[Tensor, str, int], Tensor])


class StepKeys(NamedTuple):
    """Two numbers of 31 bits that look unrelated from one step to the next."""

    first: Int[Tensor, ""]
    second: Int[Tensor, ""]


class RoundStochastically(CheckedStruct, frozen=True, forbid_unknown_fields=True):
    """Last transform before bfloat16 parameters: an update u becomes the one that takes p to p
    + u rounded up or down at random, with the odds that make its mean p + u; steps too small for
    bfloat16 then add up in place of being lost.
    """

    scope: ClassVar[Scope] = "leaf"  # the draws of a leaf are one sequence
    seed: int

    def init(self, params: Tree) -> Int[Tensor, ""]:
        """Step 0."""
        return zero_count(params)

    def update(
        self, grads: Tree, state: Int[Tensor, ""], params: Tree
    ) -> tuple[Tree, Int[Tensor, ""]]:
        """round(p + u) - p in float32, drawn from (seed, step, path); leaves of other dtypes keep
        their u.
        """

        rounded = self.rounding_after(state)

        def change(path: str, u: Tensor, p: Tensor) -> Tensor:
            if p.dtype != torch.bfloat16:
                return u
            return rounded(p.float() + u.float(), path, 0).float() - p.float()

        pairs = zip(tree.items(grads), tree.leaves(params), strict=True)
        return tree.rebuild(grads, [change(path, u, p) for (path, u), p in pairs]), state + 1

    def rounding_after(self, step: Int[Tensor, ""]) -> Rounding:
        """Function that rounds float32 elements start, start + 1, ... of a leaf as it is done after
        `step` steps.

        The slices of a leaf are to come in their order, because those of a generator are one
        sequence.
        """
        if hardware.is_asynchronous(step.device):
            keys = step_keys(self.seed, step)

            def hashed(x: Tensor, path: str, start: int) -> Tensor:
                leaf_key = seeds.derive(self.seed, "rounding", path) & 0x7FFFFFFF
                return stochastic_bfloat16(
                    x, draw_16_bits(keys, leaf_key, start, x.numel()).view(x.shape)
                )

            return hashed

        n_steps, generators = int(step), {}

        def drawn(x: Tensor, path: str, start: int) -> Tensor:
            if start == 0:
                generators[path] = seeds.generator(self.seed, "rounding", n_steps, path)
            bits = torch.randint(0, 2**16, x.shape, generator=generators[path], dtype=torch.int32)
            return stochastic_bfloat16(x, bits.to(x.device))

        return drawn

    def slice_state(self, state: Int[Tensor, ""], slices: Sequence[Slice]) -> Int[Tensor, ""]:
        """Step count, for every slice the old one."""
        return state.clone()

    def counts(self, state: Int[Tensor, ""]) -> Int[Tensor, ""]:
        """Step count."""
        return state


def stochastic_bfloat16(
    x: Float[Tensor, "*shape"], drawn: Int[Tensor, "*shape"]
) -> BFloat16[Tensor, "*shape"]:
    """float32 x as one of its two neighbours in bfloat16, the nearer the likelier, so that its mean
    is x.

    `drawn`, uniform in [0, 2^16), is added to the bits that bfloat16 has no room for, and these are
    cut off: a carry rounds up.
    """
    cut = ((x.contiguous().view(torch.int32) + drawn) & -(2**16)).view(torch.float32)
    return torch.where(torch.isfinite(x), cut, x).to(torch.bfloat16)


def draw_16_bits(keys: StepKeys, leaf_key: int, start: int, n: int) -> Int[Tensor, "n"]:
    """Uniform integers in [0, 2^16) for elements start .. start + n of a leaf, on the device of the
    keys.

    One hash of 32 bits serves two neighbours.
    """
    x = torch.arange(start // 2, (start + n + 1) // 2, dtype=torch.int32, device=keys.first.device)
    x = seeds.scrambled((x * seeds.GOLDEN_32 + keys.first) ^ leaf_key, keys.second)
    return (x.view(torch.int16)[start % 2 : start % 2 + n]).to(torch.int32) & 0xFFFF


def step_keys(seed: int, step: Int[Tensor, ""]) -> StepKeys:
    """Keys of a step, computed where its count lies."""
    z = seeds.mixed(step, seeds.derive(seed, "rounding"))
    return StepKeys((z & 0x7FFFFFFF).to(torch.int32), ((z >> 32) & 0x7FFFFFFF).to(torch.int32))
