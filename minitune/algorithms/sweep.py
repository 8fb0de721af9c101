"""Many adapters trained at once on one frozen base: deltas get a leading dimension, and every
frozen matmul serves all of them.

Adapters are stacked with their ranks padded by zeros to the largest. A zero in the pad of a meets a
zero in the pad of b, so neither gets a gradient and the pad stays exactly zero: each adapter takes
the steps that it would take alone.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune import tree
from minitune.algorithms.division import divided
from minitune.algorithms.loss_scale import (
    LossScale,
    factor_of,
    inner_state,
    next_scale,
    scaled,
    with_scale,
)
from minitune.algorithms.objective import require_no_draws
from minitune.autodiff.value_and_grad import accumulate, value_and_grad
from minitune.hardware import to_device
from minitune.lora import Lora
from minitune.losses.registry import TokenLoss
from minitune.models.draws import Draws
from minitune.models.model import Model
from minitune.models.weights import head_name
from minitune.optim.apply import apply_gradients_each
from minitune.optim.transforms import GradientTransformation
from minitune.sharding.ranks import ALONE, Dealt, Ranks
from minitune.tree import Tree, device_of
from minitune.types import (
    Adapted,
    Batch,
    Delta,
    Deltas,
    Mean,
    Metrics,
    Params,
    SeededBatch,
    Step,
    Trainable,
    TrainState,
    wide_dtype,
)

# numbers in a forward's hidden states, of which a CPU's cache holds a few: more only make it slower
CPU_HIDDEN_ELEMENTS = 2**18


def stack(adapters: Sequence[Deltas]) -> Deltas:
    """Deltas of one set of weights with a leading dimension for the adapters, their ranks padded by
    zeros to the largest.
    """

    def stacked(deltas: Sequence[Delta]) -> Delta:
        rank = max(d.a.shape[-2] for d in deltas)
        a = torch.stack([F.pad(d.a, (0, 0, 0, rank - d.a.shape[-2])) for d in deltas])
        b = torch.stack([F.pad(d.b, (0, rank - d.b.shape[-1])) for d in deltas])
        return Delta(a, b, tree.map(lambda *m: torch.stack(m), *(d.m for d in deltas)))

    return {name: stacked([deltas[name] for deltas in adapters]) for name in adapters[0]}


def adapter(stacked: Deltas, i: int, rule: Lora) -> Deltas:
    """Adapter i alone, without the pad of its rank."""
    ranks = {name: rule.rank_of(name) for name in stacked}
    deltas = {
        name: Delta(
            d.a[i, ..., : ranks[name], :], d.b[i, ..., : ranks[name]], tree.map(lambda m: m[i], d.m)
        )
        for name, d in stacked.items()
    }
    return tree.map(torch.clone, deltas)


def unstack(stacked: Tree, n: int) -> list[Tree]:
    """N trees that a stacked one is made of, as views."""
    columns = zip(*(leaf.unbind() for leaf in tree.leaves(stacked)), strict=True)
    members = [tree.rebuild(stacked, leaves) for leaves in columns]
    assert len(members) == n
    return members


def adapters_objective(
    model: Model, loss: TokenLoss, rules: Sequence[Lora]
) -> Callable[[Deltas, Params, Any], Mean]:
    """(stacked deltas, params, batch of leaves [n, B, T]) -> Mean of totals [n] and weights [n]:
    supervised.sft for n adapters.

    The rows of all adapters go through the model as one batch, and only the low-rank products tell
    them apart. A delta on the head or on experts, whose rows are no longer in the order of the
    adapters, makes them go one after another.
    """
    n, head = len(rules), head_name(model.config)

    def objective(deltas: Deltas, params: Params, batch: Batch | SeededBatch) -> Mean:
        scaled = _scaled(deltas, rules)
        drawing, own = _with_draws(model, rules, batch)
        together = Batch(*(x.flatten(0, 1) for x in own))
        if n == 1 or any(name == head or ".experts." in name for name in deltas):
            members = zip(drawing, unstack(own, n), unstack(scaled, n), strict=True)
            each = [
                one.token_losses(_adapted(params, delta), rows, loss, summed=True)
                for one, rows, delta in members
            ]
            nats = torch.stack(each)
        else:
            adapted = _adapted(params, scaled)
            nats = _together(drawing).token_losses(adapted, together, loss, summed=True)
            nats = nats.view(own.tokens.shape)
        mask = to_device(together.target_mask(), nats.device).view(own.tokens.shape)
        total, weight = (x.sum((1, 2)) for x in (torch.where(mask != 0, nats, 0.0), mask))
        return Mean(total, weight.to(nats.dtype))

    return objective


def _with_draws(
    model: Model,
    rules: Sequence[Lora],
    batch: Batch | SeededBatch,
) -> tuple[list[Model], Batch]:
    """(model of each adapter with the seeds of its rows, the rows of all)."""
    if isinstance(batch, SeededBatch):
        each = zip(batch.seeds.unbind(), rules, strict=True)
        return [model._replace(draws=Draws(own, (rule.dropout,))) for own, rule in each], batch.rows
    require_no_draws(model, max(rule.dropout for rule in rules))
    return [model] * len(rules), batch


def _together(models: Sequence[Model]) -> Model:
    """Model for the rows of all adapters, one adapter's after the other's."""
    draws = [model.draws for model in models if model.draws is not None]
    if not draws:
        return models[0]
    rates = tuple(rate for one in draws for rate in one.dropout)
    return models[0]._replace(draws=Draws(torch.cat([one.seeds for one in draws]), rates))


def _scaled(deltas: Deltas, rules: Sequence[Lora]) -> Deltas:
    """Stacked deltas with each adapter's scale inside its b: by its rule, because the pad hides its
    rank.
    """

    def scales(name: str, b: Tensor) -> Tensor:
        ranks = [rule.rank_of(name) for rule in rules]
        values = [
            rule.alpha / (rank**0.5 if rule.rslora else rank)
            for rule, rank in zip(rules, ranks, strict=True)
        ]
        return to_device(torch.tensor(values, dtype=b.dtype), b.device).view(
            -1, *(1 for _ in b.shape[1:])
        )

    return {
        name: delta._replace(b=scales(name, delta.b) * delta.b) for name, delta in deltas.items()
    }


def _adapted(params: Params, scaled: Deltas) -> Params:
    return {**params, **{name: Adapted(params[name], *delta) for name, delta in scaled.items()}}


def sweep_step(
    model: Model,
    loss: TokenLoss,
    rules: Sequence[Lora],
    optimizers: Sequence[GradientTransformation],
    *,
    micro_batch: int,
    donate: bool = False,
    loss_scale: LossScale | None = None,
    ranks: Ranks = ALONE,
) -> Step:
    """Step of n adapters at once, each under its own Lora rule and optimizer.

    Its state holds stacked deltas and a list of n optimizer states; a batch has leaves [n, B, T],
    of which `micro_batch` rows of every adapter are a micro-batch. Metrics are [n]. Each adapter is
    clipped, and skipped where its gradient is not finite, by itself. ranks: as in train_step.
    """

    def init(trainable: Trainable) -> TrainState:
        members = zip(optimizers, unstack(trainable, len(optimizers)), strict=True)
        opt_states = [optimizer.init(deltas) for optimizer, deltas in members]
        return TrainState(trainable, with_scale(opt_states, loss_scale, trainable))

    def update(params: Params, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        factor = factor_of(state.opt_state, micro_batch * tree.leaves(batch)[0].shape[2])
        trees = state.trainable, params, batch
        mean, grads = _summed(model, loss, rules, micro_batch, ranks, factor, *trees)
        leaf_norms = _norms(grads)
        sums = divided(mean, torch.linalg.vector_norm(leaf_norms, dim=0), factor)

        # written into what is ours here
        owned = state if donate else tree.map(torch.clone, state)
        states, trainable = inner_state(owned.opt_state), owned.trainable
        apply_gradients_each(optimizers, grads, states, trainable, **sums.of_gradients())
        after = TrainState(trainable, states)
        metrics = sums.metrics(batch.counts, leaf_norms)
        return next_scale(loss_scale, state.opt_state, after, sums.norm, metrics)

    return Step(init, update)


def _micro_batches(batch: Any, size: int) -> Iterator[Any]:
    """Batch in parts of `size` rows of every adapter."""
    for i in range(0, tree.leaves(batch)[0].shape[1], size):
        yield tree.map(lambda x, i=i: x[:, i : i + size], batch)


def _summed(
    model: Model,
    loss: TokenLoss,
    rules: Sequence[Lora],
    micro_batch: int,
    ranks: Ranks,
    factor: Tensor | None,
    trainable: Trainable,
    params: Params,
    batch: Any,
) -> tuple[Mean, Tree]:
    """(means, gradients of their totals) of all adapters over the micro-batches of all ranks."""
    n_rows, n_columns = tree.leaves(batch)[0].shape[1:]
    n_tokens = min(micro_batch, n_rows) * n_columns
    at_once = _members_at_once(model, rules, n_tokens, device_of({}, trainable))

    def evaluate(dealt: Dealt[Any]) -> tuple[Mean, Tree]:
        how = model, loss, rules, factor, at_once, trainable, params
        return _gradients(*how, dealt.part, dealt.counts)

    return ranks.sum(accumulate(evaluate, ranks.deal(_micro_batches(batch, micro_batch))))


def _members_at_once(
    model: Model, rules: Sequence[Lora], n_tokens: int, device: torch.device
) -> int:
    """Number of adapters whose rows go through the model together, as many as suits the device.

    n_tokens: of an adapter's micro-batch when it is full, so that all ranks make as many forwards.
    """
    if device.type != "cpu":
        return len(rules)
    return max(1, CPU_HIDDEN_ELEMENTS // (n_tokens * model.config.d_model))


def _gradients(
    model: Model,
    loss: TokenLoss,
    rules: Sequence[Lora],
    factor: Tensor | None,
    at_once: int,
    trainable: Trainable,
    params: Params,
    rows: Batch | SeededBatch,
    counts: bool,
) -> tuple[Mean, Tree]:
    """(means, gradients of their totals) of all adapters, at_once in one forward; zeros of rows
    that do not count, whose forward other ranks may wait for.
    """

    def of_some(i: int) -> tuple[Mean, Tree]:
        deltas, batch = tree.map(lambda x: x[i : i + at_once], (trainable, rows))
        objective = adapters_objective(model, loss, rules[i : i + at_once])
        weighed = objective if counts else lambda *args: objective(*args).weightless()
        own_factor = None if factor is None else factor[i : i + at_once]
        return value_and_grad(scaled(weighed, own_factor))(deltas, params, batch)

    return tree.map(lambda *x: torch.cat(x), *(of_some(i) for i in range(0, len(rules), at_once)))


def _norms(stacked: Tree) -> Tensor:
    """Euclidean norms [leaves, n] of each adapter's gradient, accumulated in float32 or wider."""
    parts = [
        torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=wide_dtype(x.dtype))
        for x in tree.leaves(stacked)
    ]
    return torch.stack(parts)
