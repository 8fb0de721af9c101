"""Optimizers as pure transforms of gradients: `init(params) -> state`, `update(grads, state, params) -> (updates, state)`.

Updates are added to the parameters by whoever calls (advance.py). Transforms compose with `chain`; a schedule is one more, which
multiplies the updates by its factor, because every optimizer here is proportional to its learning rate.
"""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from jaxtyping import Float, Int
from msgspec import Meta
from torch import Tensor

from minitune import optim8, seeds, tree
from minitune.tree import Tree

NonNegative = Annotated[float, Meta(ge=0.0)]
Fraction = Annotated[float, Meta(ge=0.0, lt=1.0)]


class AdamState(NamedTuple):
    """Steps taken, and the running means of the gradient and of its square, in the structure of the parameters."""

    step: Int[Tensor, ""]
    mu: Tree
    nu: Tree


class AdamW(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="adamw", tag_field="kind"):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2)."""

    lr: NonNegative
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.0

    def init(self, params: Tree) -> AdamState:
        """Zero moments, in float32 or wider."""
        return AdamState(zero_count(params), tree.map(wide_zeros, params), tree.map(wide_zeros, params))

    def update(self, grads: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
        """-lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) - lr * weight_decay * p."""
        b1, b2 = self.betas
        t = state.step + 1
        grads = tree.map(lambda m, g: g.to(m.dtype), state.mu, grads)
        mu = tree.map(lambda m, g: torch.lerp(m, g, 1 - b1), state.mu, grads)
        nu = tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        # in float64: 1 - 0.999^t has lost four of float32's seven digits at t = 1
        rate = self.lr / (1 - b1 ** t.double())
        root = (1 - b2 ** t.double()).sqrt()

        def leaf(m: Tensor, v: Tensor, p: Tensor) -> Tensor:
            return -rate.to(m.dtype) * m / (v.sqrt() / root.to(m.dtype) + self.eps) - (self.lr * self.weight_decay) * p

        return tree.map(leaf, mu, nu, params), AdamState(t, mu, nu)


class AdamW8bit(AdamW, frozen=True, forbid_unknown_fields=True, tag="adamw8bit", tag_field="kind"):
    """AdamW whose moments are kept in 8 bits by block-wise dynamic quantization (Dettmers et al. 2021, arXiv 2110.02861,
    sections 2.1 and 2.2); a step is taken with the float32 moments, before they are rounded."""

    def init(self, params: Tree) -> AdamState:
        """Zero moments: in 8 bits for leaves of optim8.SMALLEST elements and more."""

        def zeros(p: Tensor, signed: bool) -> Any:
            x = torch.zeros(p.shape, device=p.device)
            return optim8.quantize(x, signed) if p.numel() >= optim8.SMALLEST else x

        return AdamState(zero_count(params), *([zeros(p, signed) for p in tree.leaves(params)] for signed in (True, False)))

    def update(self, grads: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
        """AdamW's update of the moments' values, leaf by leaf, so that one leaf at a time is held in float32."""
        updates, mus, nus, step = [], [], [], state.step
        for g, p, mu, nu in zip(tree.leaves(grads), tree.leaves(params), state.mu, state.nu, strict=True):
            m, v = (
                optim8.dequantize(x, signed, p) if p.numel() >= optim8.SMALLEST else x for x, signed in ((mu, True), (nu, False))
            )
            u, (step, m, v) = super().update(g.float(), AdamState(state.step, m, v), p.float())
            m, v = (optim8.quantize(x, signed) if p.numel() >= optim8.SMALLEST else x for x, signed in ((m, True), (v, False)))
            updates, mus, nus = [*updates, u], [*mus, m], [*nus, v]
        return tree.rebuild(params, updates), AdamState(step, mus, nus)


class SGD(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="sgd", tag_field="kind"):
    """Gradient descent with momentum, and weight decay in the gradient (Sutskever et al. 2013, eq. 1-4, as torch.optim.SGD)."""

    lr: NonNegative
    momentum: Fraction = 0.0
    nesterov: bool = False
    weight_decay: NonNegative = 0.0

    def init(self, params: Tree) -> Tree:
        """Zero momentum."""
        return tree.map(torch.zeros_like, params)

    def update(self, grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        """-lr * m, with m = momentum * m + g; nesterov looks one step ahead: -lr * (g + momentum * m)."""
        grads = tree.map(lambda g, p: g + self.weight_decay * p, grads, params)
        state = tree.map(lambda m, g: self.momentum * m + g, state, grads)
        ahead = tree.map(lambda m, g: g + self.momentum * m, state, grads) if self.nesterov else state
        return tree.map(lambda m: -self.lr * m, ahead), state


class ClipByGlobalNorm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Scale the whole gradient so that its norm is at most max_norm (Pascanu et al. 2013, arXiv 1211.5063, algorithm 1)."""

    max_norm: Annotated[float, Meta(gt=0.0)]

    def init(self, params: Tree) -> tuple[()]:
        """No state."""
        return ()

    def update(self, grads: Tree, state: tuple[()], params: Tree) -> tuple[Tree, tuple[()]]:
        """g * factor(|g|)."""
        scale = self.factor(tree.norm(grads))
        return tree.map(lambda g: g * scale.to(g.dtype), grads), ()

    def factor(self, norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """min(1, max_norm / (norm + 1e-6)), the small term as in torch.nn.utils.clip_grad_norm_."""
        return (self.max_norm / (norm + 1e-6)).clamp(max=1.0)


class ScaleByGlob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Multiply updates by a factor of their own: learning-rate groups, as globs over the paths of leaves. The first match wins.

    {"*.b": 16.0} is LoRA+ (Hayou et al. 2024, arXiv 2402.12354, section 4.1); {"*norm.weight": 0.0} holds the norms still.
    """

    factors: dict[str, NonNegative]

    def init(self, params: Tree) -> tuple[()]:
        """No state; InputError for a glob that matches no leaf."""
        tree.select([path for path, _ in tree.items(params)], list(self.factors), "optim: lr factor")
        return ()

    def update(self, grads: Tree, state: tuple[()], params: Tree) -> tuple[Tree, tuple[()]]:
        """u * factor(path)."""
        return tree.rebuild(grads, [self.factor(path) * g for path, g in tree.items(grads)]), ()

    def factor(self, path: str) -> float:
        """Of the first glob that matches the path, 1 if none does."""
        return next((factor for glob, factor in self.factors.items() if fnmatchcase(path, glob)), 1.0)


class Chain(NamedTuple):
    """Transforms applied one after the other."""

    parts: tuple[Any, ...]

    def init(self, params: Tree) -> tuple[Tree, ...]:
        """Each part's state."""
        return tuple(part.init(params) for part in self.parts)

    def update(self, grads: Tree, state: Sequence[Tree], params: Tree) -> tuple[Tree, tuple[Tree, ...]]:
        """Feed each part's updates to the next."""
        states = []
        for part, part_state in zip(self.parts, state, strict=True):
            grads, new = part.update(grads, part_state, params)
            states.append(new)
        return grads, tuple(states)


def chain(*parts: Any) -> Chain:
    """Compose transforms: chain(ClipByGlobalNorm(1.0), AdamW(lr=1e-3))."""
    return Chain(parts)


class _Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """A factor of the peak learning rate: a linear rise over warmup_steps, then down to `end` at the last step."""

    warmup_steps: Annotated[int, Meta(ge=0)] = 0

    def factor(self, step: Int[Tensor, ""], total_steps: int) -> Float[Tensor, ""]:
        """The factor of step 0, 1, ..., total_steps - 1; the first step of a warm-up already moves."""
        t = step.double()
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

    end: NonNegative = 0.0

    def decay(self, progress: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """1 - (1 - end) * progress."""
        return 1 - (1 - self.end) * progress


class Cosine(_Schedule, frozen=True, tag="cosine"):
    """Warm-up, then half a cosine to `end` times the peak (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5)."""

    end: NonNegative = 0.0

    def decay(self, progress: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """end + (1 - end) * (1 + cos(pi * progress)) / 2."""
        return self.end + (1 - self.end) * 0.5 * (1 + torch.cos(math.pi * progress))


class ScaleBySchedule(NamedTuple):
    """Multiply updates by a schedule's factor; its state is the number of steps taken."""

    schedule: "Schedule"
    total_steps: int

    def init(self, params: Tree) -> Int[Tensor, ""]:
        """Step 0."""
        return zero_count(params)

    def update(self, grads: Tree, state: Int[Tensor, ""], params: Tree) -> tuple[Tree, Int[Tensor, ""]]:
        """u * factor(step)."""
        factor = self.schedule.factor(state, self.total_steps)
        return tree.map(lambda g: g * factor.to(g.dtype), grads), state + 1


class RoundStochastically(NamedTuple):
    """The last transform before bfloat16 parameters: an update u becomes the one that takes p to p + u rounded up or down at
    random, with the odds that make its mean p + u; steps too small for bfloat16 then add up in place of being lost."""

    seed: int

    def init(self, params: Tree) -> Int[Tensor, ""]:
        """Step 0."""
        return zero_count(params)

    def update(self, grads: Tree, state: Int[Tensor, ""], params: Tree) -> tuple[Tree, Int[Tensor, ""]]:
        """round(p + u) - p in float32, drawn from (seed, "rounding", step, path); leaves of other dtypes keep their u."""
        step = int(state)

        def rounded(path: str, u: Tensor, p: Tensor) -> Tensor:
            if p.dtype != torch.bfloat16:
                return u
            return optim8.stochastic_bfloat16(p.float() + u.float(), self.generator(step, path)).float() - p.float()

        pairs = zip(tree.items(grads), tree.leaves(params), strict=True)
        return tree.rebuild(grads, [rounded(path, u, p) for (path, u), p in pairs]), state + 1

    def generator(self, step: int, path: str) -> torch.Generator:
        """What the rounding of a leaf is drawn from, in the order of its elements."""
        return seeds.generator(self.seed, "rounding", step, path)


def zero_count(params: Tree) -> Int[Tensor, ""]:
    """No step taken yet, on the device of the parameters."""
    return torch.zeros((), dtype=torch.int64, device=tree.leaves(params)[0].device)


def wide_zeros(x: Tensor) -> Tensor:
    """Zeros in the shape of x, in float32 or wider."""
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


Optimizer = AdamW | AdamW8bit | SGD
Schedule = Constant | Linear | Cosine
