"""The one loop of every training stage: data, steps, rows of the log, evaluations, saves, and when to stop.

A stage trains one model or many adapters at once; what is counted for each of them is a tuple with an entry for each.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import msgspec
import torch

from minitune import hardware
from minitune.checkpoint.state import list_states, load_state, save_state
from minitune.data.cursor import Cursor
from minitune.errors import InputError
from minitune.programs.stages.base import peak_mem_bytes
from minitune.programs.state import PipelineState, Stopped
from minitune.tree import Tree, device_of
from minitune.types import Metrics

SKIPS = 20  # consecutive steps without a finite gradient after which a run stops

Row = dict[str, float | int]
Read = Mapping[str, Sequence[float]]  # what a step measured, by name: a value for each model that trains


class LoopState(msgspec.Struct, frozen=True):
    """Where a training stage is: saved with its train_state, and enough to go on from there."""

    cursors: tuple[tuple[int, int], ...]  # of each order of the data
    nats: tuple[float | None, ...]  # at the last evaluation; None if it was not finite
    best_nats: tuple[float | None, ...]
    best_step: tuple[int, ...]
    n_skipped: tuple[int, ...]
    step: int = 0
    time_s: float = 0.0
    n_tokens: int = 0
    peak_mem_bytes: int = 0
    n_worse: int = 0  # evaluations in a row without a new best

    def queued(self, cursors: Sequence[Cursor]) -> "LoopState":
        """The loop once one more step is queued, behind which the data goes on at `cursors`."""
        places = tuple((cursor.epoch, cursor.row) for cursor in cursors)
        return msgspec.structs.replace(self, step=self.step + 1, cursors=places)

    def after(self, time_s: float, n_tokens: int, rows: Sequence[Row], mem_bytes: int) -> "LoopState":
        """The loop once a step is read that took time_s."""
        return msgspec.structs.replace(
            self,
            time_s=self.time_s + time_s,
            n_tokens=self.n_tokens + n_tokens,
            n_skipped=tuple(before + int(row["skipped"]) for before, row in zip(self.n_skipped, rows, strict=True)),
            peak_mem_bytes=max(self.peak_mem_bytes, mem_bytes),
        )

    def judged(self, nats: Sequence[float]) -> tuple["LoopState", list[bool]]:
        """The loop after an evaluation, and which of the losses are new bests."""
        pairs = list(zip(nats, self.best_nats, strict=True))
        better = [math.isfinite(now) and (best is None or now < best) for now, best in pairs]
        loop = msgspec.structs.replace(
            self,
            nats=tuple(now if math.isfinite(now) else None for now in nats),
            best_nats=tuple(now if won else best for won, (now, best) in zip(better, pairs, strict=True)),
            best_step=tuple(self.step if won else step for won, step in zip(better, self.best_step, strict=True)),
            n_worse=0 if any(better) else self.n_worse + 1,
        )
        return loop, better

    def over(self, stage: Any) -> bool:
        """Whether all steps are taken, or the held-out loss has not improved for as long as the stage waits."""
        patience = stage.evaluate.patience if stage.evaluate else None
        return self.step >= stage.steps or (patience is not None and self.n_worse >= patience)

    def speed(self) -> dict[str, float]:
        """What a stage's record begins with."""
        return {"tokens_per_s": self.n_tokens / self.time_s, "peak_mem_bytes": self.peak_mem_bytes, "steps": self.step}


class TrainingTask(NamedTuple):
    """What sets one training stage apart from another. A train_state is a tree with what is trained under "trainable"."""

    take: Callable[[Sequence[Cursor]], tuple[Tree, list[Cursor]]]  # a batch and where the next one begins
    n_tokens: Callable[[Tree], int]
    step: Callable[[Tree, Tree], tuple[Tree, Metrics]]  # (train_state, batch) -> (train_state, what the step measured, not yet read)
    rows: Callable[[int, Read], list[Row]]  # (steps done, what was read) -> rows of the log
    heldout: Callable[[Tree], list[float]]  # losses of a train_state
    keep: Callable[[Tree, LoopState, list[bool]], Tree]  # the train_state once its new bests are kept


class Unread(NamedTuple):
    """A step that is queued, and what waits for its metrics."""

    step: int
    n_tokens: int
    read: Callable[[], Read]


def reading(metrics: Metrics) -> Callable[[], Read]:
    """Begin to copy a step's metrics to the host, all at once; the function that is returned waits for them."""
    names, values = list(metrics), metrics.values()
    wide = reduce(torch.promote_types, (x.dtype for x in values), torch.float32)
    read = hardware.reading(torch.stack([x.reshape(-1).to(wide) for x in values]))
    return lambda: dict(zip(names, read().tolist(), strict=True))


def start(n: int, n_orders: int = 1) -> LoopState:
    """The loop of n models before the first step, which read the data in n_orders orders."""
    return LoopState(((0, 0),) * n_orders, (None,) * n, (None,) * n, (0,) * n, (0,) * n)


def row(stage: Any, done: int, metrics: Mapping[str, float]) -> Row:
    """What is logged of a step, under the names that dashboards expect."""
    lr = stage.optimizer.lr * float(stage.schedule.factor(torch.tensor(done - 1), stage.steps))
    return {"loss": metrics["loss_nats"], "lr": lr, **{name: value for name, value in metrics.items() if name != "loss_nats"}}


def train(
    stage: Any, state: PipelineState, train_state: Tree, loop: LoopState, prepare: Callable[[], TrainingTask]
) -> tuple[Tree, LoopState]:
    """(train_state, loop) when the stage is over; it goes on from the newest train_state in the run folder. prepare is not called if that
    is the last one."""
    folder = state.folder / "checkpoints" / stage.label
    if saved := list_states(folder):
        train_state, meta = load_state(saved[-1], train_state)
        loop = msgspec.convert(meta["loop"], LoopState)
        state.log.say(f"{stage.label}: continuing from step {loop.step} of {stage.steps}")
    state.log.rewind(loop.step)
    if loop.over(stage):
        return train_state, loop
    work, device, skips, since = prepare(), device_of(state.loaded.params, train_state["trainable"]), 0, 0.0
    ahead = 1 if hardware.is_accelerator(device) else 0  # steps that are queued before one is read
    unread: deque[Unread] = deque()
    with state.log.progress(stage.label, stage.steps, loop.step) as progress:
        while not loop.over(stage):
            since = since if unread else time.perf_counter()
            batch, cursors = work.take([Cursor(*cursor) for cursor in loop.cursors])
            train_state, metrics = work.step(train_state, batch)
            loop = loop.queued(cursors)
            unread.append(Unread(loop.step, work.n_tokens(batch), reading(metrics)))
            evaluates = stage.evaluate is not None and (loop.step % stage.evaluate.every == 0 or loop.step == stage.steps)
            stopping, saves = state.stopping(), loop.step % stage.save_every == 0

            # nothing is judged or saved before every step is read, and the last row waits for the evaluation
            everything = evaluates or saves or stopping or loop.step == stage.steps
            while len(unread) > (0 if everything or skips >= SKIPS else ahead):
                entry = unread.popleft()
                rows, now = work.rows(entry.step, entry.read()), time.perf_counter()
                loop = loop.after(now - since, entry.n_tokens, rows, peak_mem_bytes(device))
                shown = {"tokens_per_second": entry.n_tokens / (now - since), "mem_bytes": loop.peak_mem_bytes}
                since = now
                best = min(rows, key=lambda row: row["loss"])
                progress.update(entry.step, {"loss": best["loss"], "lr": best["lr"], **shown})
                losses: list[Row] = [{} for _ in rows]
                if evaluates and not unread:
                    nats = work.heldout(train_state)
                    losses = [{"heldout_loss": value} for value in nats]
                    loop, better = loop.judged(nats)
                    train_state = work.keep(train_state, loop, better)
                for one, loss in zip(rows, losses, strict=True):
                    state.log.metrics(entry.step, {**one, **shown, **loss})
                skips = skips + 1 if all(one["skipped"] for one in rows) or skips >= SKIPS else 0

            stopping, over = stopping or (not unread and state.stopping()), loop.over(stage)
            if stopping or skips >= SKIPS or over or saves:
                save_state(folder, loop.step, train_state, {"loop": msgspec.to_builtins(loop)})
            if stopping and not over:
                raise Stopped(loop.step, folder)
            if skips >= SKIPS:
                raise InputError(
                    f"stages: {stage.label} had {SKIPS} steps in a row without a finite gradient or a target token, "
                    f"up to step {loop.step}; they changed nothing. Lower the learning rate, or look at the data"
                )
    return train_state, loop
