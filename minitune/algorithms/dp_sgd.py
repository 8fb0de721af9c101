"""Differential privacy: each example's gradient is clipped, and noise hides what any one of them
did (DP-SGD).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitune import seeds, tree
from minitune.algorithms.objective import Objective
from minitune.autodiff.value_and_grad import per_example
from minitune.hardware import to_device
from minitune.optim.apply import apply_gradients
from minitune.optim.transforms import GradientTransformation
from minitune.structs import CheckedStruct
from minitune.tree import Tree
from minitune.types import (
    Mean,
    Metrics,
    NonNegativeFloat,
    Params,
    PositiveFloat,
    PositiveInt,
    Step,
    Trainable,
    TrainState,
    wide_dtype,
)


class Privacy(CheckedStruct, frozen=True, forbid_unknown_fields=True):
    """DP-SGD's knobs (Abadi et al. 2016, arXiv 1607.00133, algorithm 1): a clipping norm C, and the
    noise's deviation over C.
    """

    max_norm: PositiveFloat
    noise: NonNegativeFloat  # sigma, the noise multiplier
    seed: int
    chunk: PositiveInt = 8  # examples whose gradients are computed at once


class PrivateState(NamedTuple):
    """Steps taken, on the host, where the noise is drawn from them, and the optimizer's state."""

    step: Int[Tensor, ""]
    inner: Tree


def private_state(optimizer: GradientTransformation, trainable: Trainable) -> PrivateState:
    """State of a private step before the first one."""
    return PrivateState(torch.zeros((), dtype=torch.int64), optimizer.init(trainable))


def clipped_sum(grads: Tree, max_norm: float) -> tuple[Tree, Float[Tensor, "B"]]:
    """(sum of g_i / max(1, |g_i| / max_norm) over examples, norms |g_i|), of gradients with a
    leading dimension B.

    An example whose gradient is not finite adds nothing, or it alone would decide the step.
    """
    squares = torch.stack(
        [g.flatten(1).to(wide_dtype(g.dtype)).square().sum(1) for g in tree.leaves(grads)]
    )
    norms = squares.sum(0).sqrt()
    good = torch.isfinite(norms)
    factors = torch.where(good, 1 / (norms / max_norm).clamp(min=1.0), 0.0)

    def summed(g: Tensor) -> Tensor:
        own = (-1, *(1 for _ in g.shape[1:]))
        return torch.where(good.view(own), factors.view(own).to(g.dtype) * g, 0.0).sum(0)

    return tree.map(summed, grads), norms


def noised(grads: Tree, deviation: float, seed: int, step: int) -> Tree:
    """grads + normal(0, deviation^2), drawn from (seed, "noise", step, path of the leaf)."""

    def noise(path: str, g: Tensor) -> Tensor:
        drawn = torch.randn(
            g.shape, generator=seeds.generator(seed, "noise", step, path), dtype=wide_dtype(g.dtype)
        )
        return g + to_device((deviation * drawn).to(g.dtype), g.device)

    return tree.rebuild(grads, [noise(path, g) for path, g in tree.items(grads)])


def private_step(
    objective: Objective,
    optimizer: GradientTransformation,
    privacy: Privacy,
    *,
    donate: bool = False,
) -> Step:
    """Step on (sum of the clipped gradients + noise) / B, each gradient that of one row's mean
    loss; B: rows of the batch.

    Rows without a target count in B, because who has none is private too.
    """

    def init(trainable: Trainable) -> TrainState:
        return TrainState(trainable, private_state(optimizer, trainable))

    def update(params: Params, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        trainable, opt_state = state

        losses, norms, total = _clipped(objective, privacy, trainable, params, batch)
        taken = int(opt_state.step)
        grads = noised(total, privacy.noise * privacy.max_norm, privacy.seed, taken)
        n = norms.new_full((), len(norms))
        norm = tree.norm(grads) / n
        is_finite = torch.isfinite(norm)
        how: dict[str, Any] = {"divisor": n, "norm": norm, "is_finite": is_finite}
        new, inner = apply_gradients(
            optimizer, grads, opt_state.inner, trainable, **how, donate=donate
        )
        finite = torch.isfinite(losses.total)
        metrics = {"loss_nats": Mean.of(losses.total, finite).value(), "grad_norm": norm}
        metrics |= {"clipped_share": (norms > privacy.max_norm).float().mean()}
        metrics |= {batch.counts: losses.weight.sum(), "skipped": (~is_finite).float()}
        return TrainState(new, PrivateState(opt_state.step + 1, inner)), metrics

    return Step(init, update)


def _clipped(
    objective: Objective, privacy: Privacy, trainable: Trainable, params: Params, batch: Any
) -> tuple[Mean, Tensor, Tree]:
    """(losses, norms of the gradients, sum of the clipped gradients) of a batch's rows."""

    def mean(leaves: Trainable, row: Any) -> Mean:
        value, _ = objective(leaves, params, tree.map(lambda x: x[None], row))
        return Mean(value.value(), value.weight)

    # a chunk's gradients are summed before the next one's are there
    def of_chunk(rows: Any) -> tuple[Mean, Tensor, Tree]:
        losses, each = per_example(mean, chunk=privacy.chunk)(trainable, rows)
        total, norms = clipped_sum(each, privacy.max_norm)
        return losses, norms, total

    # under vmap no token is counted, so none is kept on the host
    place = tree.leaves(trainable)[0].device
    return _in_chunks(of_chunk, tree.map(lambda x: to_device(x, place), batch), privacy.chunk)


def _in_chunks(
    of_chunk: Callable[[Any], tuple[Mean, Tensor, Tree]],
    batch: Any,
    size: int,
) -> tuple[Mean, Tensor, Tree]:
    """(losses, norms, sum of totals) of a batch's rows, given those of `size` rows at a time."""
    n_rows = len(tree.leaves(batch)[0])
    losses, norms, total = [], [], None
    for i in range(0, n_rows, size):
        loss, norm, part = of_chunk(tree.map(lambda x, i=i: x[i : i + size], batch))
        losses.append(loss)
        norms.append(norm)
        total = part if total is None else tree.add(total, part)
    return tree.map(lambda *x: torch.cat(x), *losses), torch.cat(norms), total
