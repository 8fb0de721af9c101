"""Learning-rate schedules: factors of the peak rate, and the transform that multiplies updates by one."""

import math
from collections.abc import Sequence
from typing import ClassVar

import msgspec
import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitune import hardware, tree
from minitune.optim.transforms import Scope, Slice, zero_count
from minitune.tree import Tree
from minitune.types import NonNegativeFloat, NonNegativeInt


class _Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """Factor of the peak rate: a linear rise over warmup_steps, then a fall.

    The last step of the warm-up and the one after it have the peak. `end` is the factor that a step
    after the last one would have, so that every step moves, as the schedules of transformers do.
    """

    warmup_steps: NonNegativeInt = 0

    def factor(self, step: Int[Tensor, ""], total_steps: int) -> Float[Tensor, ""]:
        """The factor of step 0, 1, ..., total_steps - 1; the first step of a warm-up already moves."""
        t = step.to(hardware.widest_float(step.device))
        rise = (t + 1) / max(self.warmup_steps, 1)
        progress = ((t - self.warmup_steps) / max(total_steps - self.warmup_steps, 1)).clamp(0.0, 1.0)
        return torch.where(step < self.warmup_steps, rise, self.decay(progress))

    def decay(self, progress: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The factor after the warm-up, progress in [0, 1]."""
        raise NotImplementedError


class Constant(_Schedule, frozen=True, tag="constant"):
    """Warm-up, then the peak."""

    def decay(self, progress: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """1."""
        return torch.ones_like(progress)


class Linear(_Schedule, frozen=True, tag="linear"):
    """Warm-up, then a straight line to `end` times the peak."""

    end: NonNegativeFloat = 0.0

    def decay(self, progress: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """1 - (1 - end) * progress."""
        return 1 - (1 - self.end) * progress


class Cosine(_Schedule, frozen=True, tag="cosine"):
    """Warm-up, then half a cosine to `end` times the peak (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5)."""

    end: NonNegativeFloat = 0.0

    def decay(self, progress: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """end + (1 - end) * (1 + cos(pi * progress)) / 2."""
        return self.end + (1 - self.end) * 0.5 * (1 + torch.cos(math.pi * progress))


Schedule = Constant | Linear | Cosine


class ScaleBySchedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Multiply updates by a schedule's factor; its state is the number of steps taken.

    It stands at the end of a chain, because every optimizer here is proportional to its learning rate.
    """

    scope: ClassVar[Scope] = "element"
    schedule: Schedule
    total_steps: int

    def init(self, params: Tree) -> Int[Tensor, ""]:
        """Step 0."""
        return zero_count(params)

    def update(self, grads: Tree, state: Int[Tensor, ""], params: Tree) -> tuple[Tree, Int[Tensor, ""]]:
        """u * step_factor(step)."""
        factor = self.step_factor(state)
        return tree.map(lambda g: g * factor.to(g.dtype), grads), state + 1

    def step_factor(self, state: Int[Tensor, ""]) -> Float[Tensor, ""]:
        """The schedule's factor after so many steps."""
        return self.schedule.factor(state, self.total_steps)

    def slice_state(self, state: Int[Tensor, ""], slices: Sequence[Slice]) -> Int[Tensor, ""]:
        """The step count, for every slice the old one."""
        return state.clone()

    def counts(self, state: Int[Tensor, ""]) -> Int[Tensor, ""]:
        """The step count."""
        return state
