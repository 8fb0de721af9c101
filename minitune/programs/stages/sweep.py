"""Training of many adapters at once: their data, their rows of the log, and which one goes on."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from rich.table import Table

from minitune import tree
from minitune.algorithms import sweep
from minitune.algorithms.loss_scale import with_scale
from minitune.algorithms.supervised import sft
from minitune.data.cursor import Cursor
from minitune.errors import InputError
from minitune.hardware import to_device
from minitune.lora import Lora
from minitune.losses.registry import TokenLoss
from minitune.models.model import Model
from minitune.nn.dropout import seeded
from minitune.optim.transforms import GradientTransformation
from minitune.programs.stages import loop_state, training_loop
from minitune.programs.stages.batches import BatchLoader, heldout_losses, load_batches
from minitune.programs.stages.first_steps import (
    TakeStep,
    WatchedAdapter,
    rate_function,
    watched_adapters,
)
from minitune.programs.stages.histograms import nothing_watched
from minitune.programs.stages.shown_batches import n_tokens, shown_batches
from minitune.programs.stages.sweep_points import Point, points
from minitune.programs.stages.training_optimizer import adapter_optimizer, loss_scale_for
from minitune.programs.stages.training_stage import Evaluation, TrainingStage
from minitune.programs.state import PipelineState
from minitune.types import Batch, Delta, Deltas, Mean, Metrics, Params, SeededBatch, TrainState


class Member(NamedTuple):
    """One adapter of a sweep as it trains."""

    point: Point
    rule: Lora
    optimizer: GradientTransformation
    seed: int
    start: Deltas  # what it begins with


def run(
    stage: TrainingStage,
    state: PipelineState,
    model: Model,
) -> PipelineState:
    """State with the best adapter of the sweep; continues from the newest saved state in the run
    folder.

    model: with its blocks wrapped as the stage wants them.
    """
    members = [_member(stage, state, point) for point in points(stage)]
    evaluation = _evaluation(stage)

    train_state = _begin(stage, members, state.loaded.params)
    begin = loop_state.begin(len(members), n_orders=len(_seeds(members)))
    train_state, loop = training_loop.train(
        stage, state, train_state, begin, lambda _: _task(stage, state, model, members)
    )

    state.log.show(_table(stage.label, members, loop))
    keeps_best = evaluation.keep == "best"
    losses = loop.best_nats if keeps_best else loop.nats
    nats = [math.inf if loss is None else loss for loss in losses]
    best = min(range(len(members)), key=lambda i: nats[i])
    if nats[best] == math.inf:
        raise InputError(
            f"stages: {stage.label} has no adapter with a finite held-out loss; lower the "
            "learning rates"
        )
    point, rule = members[best].point, members[best].rule
    state.log.say(
        f"{stage.label}: adapter {best} goes on ({point.describe()}), held-out loss "
        f"{nats[best]:.4f}"
    )
    chosen = sweep.adapter(train_state["best" if keeps_best else "trainable"], best, rule)
    of_loop = {**loop.training_record(best), **loop.end_record(stage)}
    record = {**_record(members, loop, best), **of_loop}
    return state.with_model(trainable=chosen, lora=rule).record(stage.label, record)


def _begin(stage: TrainingStage, members: Sequence[Member], params: Params) -> dict[str, Any]:
    """State before the first step: one tree of stacked deltas, and an optimizer state for each
    adapter.
    """
    deltas = sweep.stack([member.start for member in members])
    each = zip(members, sweep.unstack(deltas, len(members)), strict=True)
    opt_states = [member.optimizer.init(start) for member, start in each]
    opt_state = with_scale(opt_states, loss_scale_for(stage, params), deltas)
    return {"trainable": deltas, "opt_state": opt_state, "best": tree.map(torch.clone, deltas)}


def _evaluation(stage: TrainingStage) -> Evaluation:
    assert stage.evaluate is not None, "sweep_points.check refuses a sweep without evaluate"
    return stage.evaluate


def _seeds(members: Sequence[Member]) -> list[int]:
    """Seeds of the members, each once: every seed is an order of the data."""
    return list(dict.fromkeys(member.seed for member in members))


def _member(
    stage: TrainingStage,
    state: PipelineState,
    point: Point,
) -> Member:
    assert state.loaded.lora is not None, "adapters have a rule"
    rule = point.rule(state.loaded.lora)
    seed = state.seed if point.seed is None else point.seed
    start = {name: leaf for name, leaf in state.loaded.trainable.items() if isinstance(leaf, Delta)}
    # A point with a rank, a scale or a seed of its own begins with fresh deltas, the others with
    # the stage's.
    if point.lora or point.seed is not None:
        if any(bool(delta.b.any()) for delta in start.values()):
            raise InputError(
                f"stages: {stage.label} sweeps lora or seed, but its deltas are trained already, "
                "expected fresh ones; sweep other keys, or put it right after the lora stage"
            )
        start = rule.init(state.loaded.params, seed)
    return Member(point, rule, adapter_optimizer(point.stage, start), seed, start)


def _task(
    stage: TrainingStage, state: PipelineState, model: Model, members: Sequence[Member]
) -> training_loop.TrainingTask:
    params, rules, seeds = state.loaded.params, [member.rule for member in members], _seeds(members)
    token_loss = cast(TokenLoss, stage.loss)  # sweep_points.check refuses any other
    loaders = [load_batches(state._replace(seed=seed), stage.data, stage.loss) for seed in seeds]
    state.log.say(
        f"{stage.label}: {len(members)} adapters at once; {stage.data} has {loaders[0].description}"
    )
    micro_batch = stage.micro_batch_size or stage.batch_size
    optimizers = [member.optimizer for member in members]
    loss_scale = loss_scale_for(stage, params)
    how: dict[str, Any] = {"loss_scale": loss_scale, "donate": True, "ranks": state.ranks}
    all_step = sweep.sweep_step(
        model, token_loss, rules, optimizers, micro_batch=micro_batch, **how
    )

    watch = _watch(stage, model, members, params, micro_batch)

    def step(train_state: Any, batch: Any) -> tuple[Any, Metrics]:
        before = TrainState(train_state["trainable"], train_state["opt_state"])
        after, metrics = watch(before, batch, lambda: all_step.update(params, before, batch))
        return {**train_state, **after._asdict()}, metrics

    mean_of = sweep.adapters_objective(model, token_loss, rules)
    evaluate = partial(_heldout, stage, state, mean_of, len(rules), micro_batch)
    take, rows = partial(_take, stage, members, loaders), partial(_rows, members)
    return training_loop.TrainingTask(
        take, n_tokens, step, rows, evaluate, _keep_best, nothing_watched
    )


def _rows(
    members: Sequence[Member], done: int, metrics: loop_state.MetricValues
) -> list[loop_state.Row]:
    """Row of the log for every member."""
    rows = []
    for i, member in enumerate(members):
        values = {name: column[i] for name, column in metrics.items()}
        row = training_loop.row(member.point.stage, done, values)
        rows.append({"adapter": i, **member.point.numbers(), **row})
    return rows


def _heldout(
    stage: TrainingStage,
    state: PipelineState,
    mean_of: Callable[[Deltas, Params, Any], Mean],
    n_members: int,
    micro_batch: int,
    train_state: Any,
) -> list[float]:
    """Held-out loss of every member, in nats."""
    evaluation = _evaluation(stage)
    n_rows = micro_batch
    if evaluation.batch_size is not None:
        n_rows = max(1, evaluation.batch_size // n_members)
    loader = load_batches(state, evaluation.data, stage.loss)
    title, total = f"{stage.label} held-out", loader.total_tokens
    trainable, params = train_state["trainable"], state.loaded.params
    with shown_batches(state.log, title, loader.batches(n_rows), total) as batches:
        each = (tree.map(lambda x: x.expand(n_members, *x.shape), batch) for batch in batches)
        return heldout_losses(lambda batch: mean_of(trainable, params, batch), each, state)


def _watch(
    stage: TrainingStage,
    model: Model,
    members: Sequence[Member],
    params: Params,
    micro_batch: int,
) -> Callable[[TrainState, Any, TakeStep], tuple[TrainState, Metrics]]:
    """Function that takes a step and, for the first ones, looks at every member."""
    adapters = [
        WatchedAdapter(
            sft(model, member.rule, cast(TokenLoss, stage.loss)),
            rate_function(member.point.stage),
            partial(sweep.adapter, i=i, rule=member.rule),
        )
        for i, member in enumerate(members)
    ]
    return watched_adapters(stage.label, adapters, params, micro_batch)


def _take(
    stage: TrainingStage,
    members: Sequence[Member],
    loaders: Sequence[BatchLoader],
    done: int,
    cursors: Sequence[Cursor],
) -> tuple[Any, list[Cursor]]:
    """(batch of every member's rows, where the next begins); loaders, cursors: of each seed."""
    pairs = zip(loaders, cursors, strict=True)
    orders = [loader.take(cursor, stage.batch_size) for loader, cursor in pairs]
    batch_of = {seed: rows for seed, (rows, _) in zip(_seeds(members), orders, strict=True)}
    batch: Any = _stacked([batch_of[member.seed] for member in members])
    if stage.draws(*(member.rule for member in members)):
        each = [seeded(batch_of[member.seed], member.seed, done).seeds for member in members]
        batch = SeededBatch(batch, torch.stack(each))
    return batch, [after for _, after in orders]


def _keep_best(train_state: Any, loop: loop_state.LoopState, improved: list[bool]) -> Any:
    """State whose "best" deltas are the present ones, for every adapter that has improved."""

    def newest(best: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        chosen = to_device(torch.tensor(improved), new.device)
        return torch.where(chosen.view(-1, *(1 for _ in new.shape[1:])), new, best)

    return {**train_state, "best": tree.map(newest, train_state["best"], train_state["trainable"])}


def _stacked(batches: Sequence[Batch]) -> Batch:
    """Batch of leaves [n, B, T], with rows padded to the longest."""
    width = max(batch.tokens.shape[1] for batch in batches)
    padded = [tree.map(lambda x: F.pad(x, (0, width - x.shape[1])), batch) for batch in batches]
    return tree.map(lambda *leaves: torch.stack(leaves), *padded)


def _table(label: str, members: Sequence[Member], loop: loop_state.LoopState) -> Table:
    table = Table(title=f"{label}: {len(members)} adapters", title_justify="left")
    keys = list(dict.fromkeys(key for member in members for key in member.point.table))
    for column in ("adapter", *keys, "held-out loss", "best", "at step", "skipped"):
        table.add_column(column, justify="right")
    for i, member in enumerate(members):
        values = [str(member.point.table.get(key, "")) for key in keys]
        losses = [
            "none" if loss is None else f"{loss:.4f}" for loss in (loop.nats[i], loop.best_nats[i])
        ]
        table.add_row(str(i), *values, *losses, str(loop.best_step[i]), str(loop.n_skipped[i]))
    return table


def _record(members: Sequence[Member], loop: loop_state.LoopState, best: int) -> dict[str, Any]:
    adapters = [
        {
            "point": dict(member.point.table),
            "heldout_nats": loop.nats[i],
            "best_heldout_nats": loop.best_nats[i],
            "best_step": loop.best_step[i],
            "n_skipped": loop.n_skipped[i],
        }
        for i, member in enumerate(members)
    ]
    return {
        "top": loop.throughput(),
        "time_s": loop.time_s,
        "steps": loop.step,
        "best_adapter": best,
        "best_step": loop.best_step[best],
        "best_heldout_nats": loop.best_nats[best],
        "adapters": adapters,
    }
