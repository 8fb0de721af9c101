"""Learning-rate schedules: factors of the peak rate, and the transform that multiplies updates by
one.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitune import hardware, tree
from minitune.optim.transforms import Scope, Slice, zero_count
from minitune.structs import CheckedStruct
from minitune.tree import Tree
from minitune.types import NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveInt


class _Schedule(CheckedStruct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """Factor of the peak rate: a linear rise over warmup_steps, then a fall.

    The last step of the warm-up and the one after it have the peak. `end` is the factor that a step
    after the last one would have, so that every step moves, as the schedules of transformers do.
    """

    # first steps, in which the rate rises in a straight line to its peak
    warmup_steps: NonNegativeInt = 0

    def factor(self, step: Int[Tensor, ""], total_steps: int) -> Float[Tensor, ""]:
        """Factor of step 0, 1, ..., total_steps - 1; the first step of a warm-up already moves."""
        t = step.to(hardware.widest_float(step.device))
        rise = (t + 1) / max(self.warmup_steps, 1)
        return torch.where(step < self.warmup_steps, rise, self.fall(t, total_steps))

    def fall(self, t: Float[Tensor, ""], total_steps: int) -> Float[Tensor, ""]:
        """Factor of step t after the warm-up."""
        raise NotImplementedError


class _ByProgress(_Schedule, frozen=True):
    """Schedule whose fall depends on the share of the steps after the warm-up that are behind."""

    def fall(self, t: Float[Tensor, ""], total_steps: int) -> Float[Tensor, ""]:
        """Factor of step t after the warm-up."""
        n_steps = max(total_steps - self.warmup_steps, 1)
        return self.decay(((t - self.warmup_steps) / n_steps).clamp(0.0, 1.0))

    def decay(self, progress: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Factor after the warm-up, progress in [0, 1]."""
        raise NotImplementedError


class Constant(_ByProgress, frozen=True, tag="constant"):
    """Warm-up, then the peak."""

    def decay(self, progress: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """1."""
        return torch.ones_like(progress)


class Linear(_ByProgress, frozen=True, tag="linear"):
    """Warm-up, then a straight line to `end` times the peak."""

    end: NonNegativeFloat = 0.0  # factor of the peak rate that is left at the end

    def decay(self, progress: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """1 - (1 - end) * progress."""
        return 1 - (1 - self.end) * progress


class Cosine(_ByProgress, frozen=True, tag="cosine"):
    """Warm-up, then half a cosine to `end` times the peak (Loshchilov & Hutter 2017, arXiv
    1608.03983, eq. 5).
    """

    end: NonNegativeFloat = 0.0  # factor of the peak rate that is left at the end

    def decay(self, progress: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """end + (1 - end) * (1 + cos(pi * progress)) / 2."""
        return self.end + (1 - self.end) * 0.5 * (1 + torch.cos(math.pi * progress))


class Wsd(_ByProgress, frozen=True, tag="wsd"):
    """Warm-up, the peak, and a straight line to `end` times the peak in the last share of the steps
    after the warm-up (warmup-stable-decay: Hu et al. 2024, arXiv 2404.06395, section 4)."""

    end: NonNegativeFloat = 0.0  # factor of the peak rate that is left at the end
    # share of the steps after the warm-up in which the rate falls
    decay_share: OpenUnitInterval = 0.1

    def decay(self, progress: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """1 - (1 - end) * the share of the last line that is behind."""
        behind = ((progress - (1 - self.decay_share)) / self.decay_share).clamp(0.0, 1.0)
        return 1 - (1 - self.end) * behind


class InverseSqrt(_Schedule, frozen=True, tag="inverse_sqrt"):
    """Warm-up, then sqrt(timescale / (timescale + steps since then)), for any number of steps
    (Vaswani et al. 2017, arXiv 1706.03762, 5.3; Zhai et al. 2022, arXiv 2106.04560, 3.5)."""

    # steps until the rate has fallen to 0.71; absent: those of the warm-up, or 10,000 without
    timescale: PositiveInt | None = None

    def fall(self, t: Float[Tensor, ""], total_steps: int) -> Float[Tensor, ""]:
        """sqrt(timescale / (timescale + t - warmup_steps))."""
        timescale = self.timescale or self.warmup_steps or 10_000
        return torch.rsqrt(1 + (t - self.warmup_steps).clamp(min=0.0) / timescale)


Schedule = Constant | Linear | Cosine | Wsd | InverseSqrt


class ScaleBySchedule(CheckedStruct, frozen=True, forbid_unknown_fields=True):
    """Multiply updates by a schedule's factor; its state is the number of steps taken.

    It stands at the end of a chain, because every optimizer here is proportional to its learning
    rate.
    """

    scope: ClassVar[Scope] = "element"
    schedule: Schedule
    total_steps: int

    def init(self, params: Tree) -> Int[Tensor, ""]:
        """Step 0."""
        return zero_count(params)

    def update(
        self, grads: Tree, state: Int[Tensor, ""], params: Tree
    ) -> tuple[Tree, Int[Tensor, ""]]:
        """u * step_factor(step)."""
        factor = self.step_factor(state)
        return tree.map(lambda g: g * factor.to(g.dtype), grads), state + 1

    def step_factor(self, state: Int[Tensor, ""]) -> Float[Tensor, ""]:
        """Schedule's factor after so many steps."""
        return self.schedule.factor(state, self.total_steps)

    def slice_state(self, state: Int[Tensor, ""], slices: Sequence[Slice]) -> Int[Tensor, ""]:
        """Step count, for every slice the old one."""
        return state.clone()

    def counts(self, state: Int[Tensor, ""]) -> Int[Tensor, ""]:
        """Step count."""
        return state
