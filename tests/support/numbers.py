"""A training loop over a model of one number, which takes milliseconds: for what happens around the steps."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import torch

from minitune.data.cursor import Cursor
from minitune.programs.log import Log, LogConfig
from minitune.programs.signals import StopSignals
from minitune.programs.stages import loop_state, training_loop
from minitune.programs.stages.histograms import nothing_watched
from minitune.programs.stages.loop_state import LoopState
from minitune.programs.stages.train import Train
from minitune.programs.stages.training_loop import TrainingTask
from minitune.programs.state import LoadedModel, PipelineState


class Power(BaseException):
    """The machine went away."""


class Numbers:
    """Task whose step adds 1 to a number, unless the step is one that is skipped."""

    def __init__(self, skipped: tuple[int, ...] = (), signal_at: int = 0, dies_at: int = 0) -> None:
        self.skipped, self.signal_at, self.dies_at = skipped, signal_at, dies_at
        self.evaluations: list[float] = []

    def task(self) -> TrainingTask:
        return TrainingTask(self.next_batch, lambda batch: 5, self.step, self.rows, self.evaluate, self.keep, nothing_watched)

    def next_batch(self, done: int, cursors: Any) -> Any:
        (cursor,) = cursors
        return torch.tensor(cursor.row), [Cursor(cursor.epoch, cursor.row + 1)]

    def step(self, train_state: Any, batch: Any) -> Any:
        step = int(batch) + 1
        if step == self.dies_at:
            raise Power
        is_skipped = step in self.skipped
        x = train_state["trainable"]["x"] + (not is_skipped)
        metrics = {"loss_nats": torch.tensor(math.nan if is_skipped else 1 / step)}
        return {"trainable": {"x": x}}, {**metrics, "skipped": torch.tensor(float(is_skipped))}

    def rows(self, done: int, metrics: Any) -> Any:
        return [{"loss": metrics["loss_nats"][0], "lr": 0.1, "skipped": metrics["skipped"][0]}]

    def evaluate(self, train_state: Any) -> list[float]:
        x = float(train_state["trainable"]["x"].flatten()[0])
        if x == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the evaluation went on")
        self.evaluations.append(x)
        return [1 / x]

    def keep(self, train_state: Any, loop: Any, improved: Any) -> Any:
        return train_state


STAGE = Train(data="train", steps=6, batch_size=1, save_every=1)


def train(
    folder: Path, numbers: Numbers, stage: Train = STAGE, start: torch.Tensor | None = None
) -> tuple[torch.Tensor, LoopState]:
    """(the number, the counters) after the stage, in a run folder that may hold states already."""
    folder.mkdir(exist_ok=True)
    trained = {"trainable": {"x": torch.tensor(0.0) if start is None else start}}
    loaded = LoadedModel._make([None] * len(LoadedModel._fields))._replace(params=trained["trainable"], trainable={})
    with StopSignals() as stopping, Log(folder, LogConfig(), {}) as log:
        log.begin(stage.label)
        state = PipelineState(0, folder, log, stopping, {}, {}, loaded)
        after, loop = training_loop.train(stage, state, trained, loop_state.begin(1), lambda _: numbers.task())
    return after["trainable"]["x"], loop
