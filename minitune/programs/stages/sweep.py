"""How a training stage trains many adapters at once: its points, their data, their rows in the log, and which one goes on."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from rich.table import Table

from minitune import tree
from minitune.algorithms import sweep
from minitune.data.cursor import Cursor
from minitune.errors import InputError
from minitune.hardware import to_device
from minitune.lora import Lora
from minitune.models.model import Model
from minitune.programs.stages import training_loop
from minitune.programs.stages.batches import BatchLoader, feed
from minitune.programs.state import AbstractState, PipelineState
from minitune.tree import device_of
from minitune.types import Batch, Delta, Deltas, Metrics, TrainState

KEYS = "optimizer.*, schedule.*, clip_norm, lr_factors, seed, lora.rank, lora.alpha or lora.rslora"
ALLOWED = ("optimizer", "schedule", "clip_norm", "lr_factors", "seed", "lora.rank", "lora.alpha", "lora.rslora")

Sweep = dict[str, tuple[Any, ...]] | tuple[dict[str, Any], ...]  # a grid, or its points one by one


class Point(NamedTuple):
    """One adapter of a sweep: what was written for it, and the stage, the Lora fields and the seed that follow from it."""

    written: Mapping[str, Any]
    stage: Any
    lora: Mapping[str, Any]
    seed: int | None  # of the fresh deltas and of the data's order; the program's if None


def points(stage: Any) -> list[Point]:
    """Every adapter that the stage's sweep asks for; InputError for a key or a value that does not fit."""
    label, written = stage.label, stage.sweep
    if isinstance(written, Mapping):
        written = [dict(zip(written, values, strict=True)) for values in product(*written.values())]
    if not written or not all(written):
        raise InputError(f"stages: {label} has an empty sweep, expected at least one value of {KEYS}")
    return [_point(stage, table) for table in written]


def check(stage: Any, abstract: AbstractState) -> None:
    """InputError unless the stage trains deltas by a loss of tokens and says on which data the best adapter is found."""
    found = points(stage)
    if stage.loss.objective != "supervised":
        raise InputError(
            f"stages: {stage.label} has a sweep and loss {stage.loss.__struct_config__.tag!r}, expected cross_entropy"
        )
    if stage.evaluate is None:
        raise InputError(f"stages: {stage.label} has a sweep without evaluate, expected one: it finds the adapter that goes on")
    if abstract.whole:
        raise InputError(f"stages: {stage.label} has a sweep, but {min(abstract.whole)} trains whole, expected deltas only")
    if len({tuple(point.written.items()) for point in found if _hashable(point.written)}) < len(found):
        raise InputError(f"stages: {stage.label} has a sweep with the same point twice, expected each once")


def run(stage: Any, state: PipelineState, model: Model, optimizer_of: Callable[[Any], Any]) -> PipelineState:
    """state with the best adapter of the sweep; continues from the newest train_state in the run folder.

    model: with its blocks wrapped as the stage wants them; optimizer_of: a point's stage -> its optimizer.
    """
    found, loaded = points(stage), state.loaded
    assert loaded.lora is not None, "adapters have a rule"
    rules = [msgspec.convert({**msgspec.to_builtins(loaded.lora), **point.lora}, Lora) for point in found]
    starts = [_start(state, point, rule, stage.label) for point, rule in zip(found, rules, strict=True)]
    optimizers = [optimizer_of(point.stage) for point in found]
    seeds = list(dict.fromkeys(_seed(point, state) for point in found))
    deltas, n = sweep.stack(starts), len(found)
    states = [optimizer.init(part) for optimizer, part in zip(optimizers, sweep.unstack(deltas, n), strict=True)]
    train_state = {"trainable": deltas, "opt_state": states, "best": tree.map(torch.clone, deltas)}
    train_state, loop = training_loop.train(
        stage,
        state,
        train_state,
        training_loop.start(n, len(seeds)),
        lambda: _work(stage, state, model, found, rules, optimizers, seeds),
    )
    kept = stage.evaluate.keep == "best"
    nats = [math.inf if value is None else value for value in (loop.best_nats if kept else loop.nats)]
    state.log.show(_table(stage.label, found, loop))
    best = min(range(n), key=lambda i: nats[i])
    if nats[best] == math.inf:
        raise InputError(f"stages: {stage.label} has no adapter with a finite held-out loss; lower the learning rates")
    state.log.say(f"{stage.label}: adapter {best} goes on ({_told(found[best])}), held-out loss {nats[best]:.4f}")
    chosen = sweep.adapter(train_state["best" if kept else "trainable"], best, rules[best])
    return state.with_model(trainable=chosen, lora=rules[best]).record(stage.label, _record(found, loop, best))


def _work(
    stage: Any,
    state: PipelineState,
    model: Model,
    found: Sequence[Point],
    rules: Sequence[Lora],
    optimizers: Sequence[Any],
    seeds: Sequence[int],
) -> training_loop.TrainingTask:
    feeds = [_feed(stage, state._replace(seed=seed), stage.data) for seed in seeds]
    state.log.say(f"{stage.label}: {len(found)} adapters at once; {stage.data} has {feeds[0].told}")
    micro = stage.micro_batch_size or stage.batch_size
    all_step = sweep.sweep_step(model, stage.loss, rules, optimizers, micro_batch=micro, donate=True)

    def take(cursors: Sequence[Cursor]) -> tuple[Batch, list[Cursor]]:
        taken = [one.take(cursor, stage.batch_size) for one, cursor in zip(feeds, cursors, strict=True)]
        own = [taken[seeds.index(_seed(point, state))][0] for point in found]
        return _together(own), [after for _, after in taken]

    def step(train_state: Any, batch: Batch) -> tuple[Any, Metrics]:
        before = TrainState(train_state["trainable"], train_state["opt_state"])
        after, metrics = all_step.update(state.loaded.params, before, batch)
        return {**train_state, **after._asdict()}, metrics

    def rows(done: int, metrics: training_loop.Read) -> list[training_loop.Row]:
        own = ({name: column[i] for name, column in metrics.items()} for i in range(len(found)))
        return [
            {"adapter": i, **_numbers(point), **training_loop.row(point.stage, done, values)}
            for i, (point, values) in enumerate(zip(found, own, strict=True))
        ]

    def keep(train_state: Any, loop: training_loop.LoopState, better: list[bool]) -> Any:
        def newest(kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            won = to_device(torch.tensor(better), new.device)
            return torch.where(won.view(-1, *(1 for _ in new.shape[1:])), new, kept)

        return {**train_state, "best": tree.map(newest, train_state["best"], train_state["trainable"])}

    def heldout(train_state: Any) -> list[float]:
        return _heldout(stage, state, model, rules, train_state["trainable"])

    return training_loop.TrainingTask(take, feeds[0].n_tokens, step, rows, heldout, keep)


def _point(stage: Any, table: Mapping[str, Any]) -> Point:
    fields: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(stage, sweep=None))
    lora: dict[str, Any] = {}
    try:
        for key, value in table.items():
            head, _, rest = key.partition(".")
            if (key if head == "lora" else head) not in ALLOWED:
                raise InputError(f"stages: {stage.label} has {key!r} in its sweep, expected {KEYS}")
            if head == "lora":
                lora = {**lora, rest: value}
            elif head != "seed":
                fields = _placed(fields, key.split("."), value)
        seed = msgspec.convert(table.get("seed"), int | None)
        msgspec.convert({"rank": 1, "alpha": 1.0, "targets": ["*"], **lora}, Lora)
        return Point(table, msgspec.convert(fields, type(stage)), lora, seed)
    except msgspec.ValidationError as error:
        raise InputError(f"stages: {stage.label} has a sweep with {dict(table)}: {error}; correct the value") from None


def _placed(fields: Mapping[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    below = value if len(keys) == 1 else _placed(fields.get(keys[0], {}), keys[1:], value)
    return {**fields, keys[0]: below}


def _start(state: PipelineState, point: Point, rule: Lora, label: str) -> Deltas:
    """The deltas that an adapter begins with: the stage's own, or fresh ones where its rank, scale or seed is its own."""
    held = {name: leaf for name, leaf in state.loaded.trainable.items() if isinstance(leaf, Delta)}
    if not point.lora and point.seed is None:
        return held
    if any(bool(delta.b.any()) for delta in held.values()):
        raise InputError(
            f"stages: {label} sweeps lora or seed, but its deltas are trained already, expected fresh ones; "
            "sweep other keys, or put it right after the lora stage"
        )
    return rule.init(state.loaded.params, _seed(point, state))


def _seed(point: Point, state: PipelineState) -> int:
    return state.seed if point.seed is None else point.seed


def _feed(stage: Any, state: PipelineState, name: str) -> BatchLoader:
    return feed(state, name, stage.loss, cached=False, teacher=None, top_k=None)


def _together(batches: Sequence[Batch]) -> Batch:
    """Leaves [n, B, T], with rows padded to the longest."""
    width = max(batch.tokens.shape[1] for batch in batches)
    return Batch(*(torch.stack([F.pad(x, (0, width - x.shape[1])) for x in leaves]) for leaves in zip(*batches, strict=True)))


def _heldout(stage: Any, state: PipelineState, model: Model, rules: Sequence[Lora], deltas: Deltas) -> list[float]:
    """Each adapter's mean loss over the held-out data."""
    total, device = sweep.adapters_objective(model, stage.loss, rules), device_of(state.loaded.params, deltas)
    sums = torch.zeros(2, len(rules), device=device)
    for batch in _feed(stage, state, stage.evaluate.data).batches(max(1, stage.evaluate.batch_size // len(rules))):
        rows = tree.map(lambda x: x.expand(len(rules), *x.shape), batch)
        with torch.no_grad():
            sums = sums + torch.stack(total(deltas, state.loaded.params, rows))
    return (sums[0] / sums[1].clamp(min=1.0)).tolist()


def _numbers(point: Point) -> dict[str, float]:
    return {key: value for key, value in point.written.items() if isinstance(value, int | float)}


def _told(point: Point) -> str:
    return ", ".join(f"{key} = {value}" for key, value in point.written.items())


def _hashable(table: Mapping[str, Any]) -> bool:
    return all(isinstance(value, int | float | str) for value in table.values())


def _table(label: str, found: Sequence[Point], loop: training_loop.LoopState) -> Table:
    table = Table(title=f"{label}: {len(found)} adapters", title_justify="left")
    columns = list(dict.fromkeys(key for point in found for key in point.written))
    for column in ("adapter", *columns, "held-out loss", "best", "at step", "skipped"):
        table.add_column(column, justify="right")
    for i, point in enumerate(found):
        nats = ("none" if value is None else f"{value:.4f}" for value in (loop.nats[i], loop.best_nats[i]))
        written = (str(point.written.get(key, "")) for key in columns)
        table.add_row(str(i), *written, *nats, str(loop.best_step[i]), str(loop.n_skipped[i]))
    return table


def _record(found: Sequence[Point], loop: training_loop.LoopState, best: int) -> dict[str, Any]:
    adapters = [
        {"point": dict(point.written), "heldout_nats": now, "best_heldout_nats": low, "best_step": at, "n_skipped": skipped}
        for point, now, low, at, skipped in zip(found, loop.nats, loop.best_nats, loop.best_step, loop.n_skipped, strict=True)
    ]
    return {"top": loop.speed(), "time_s": loop.time_s, "steps": loop.step, "best_adapter": best, "adapters": adapters}
