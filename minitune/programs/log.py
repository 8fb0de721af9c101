"""Output of a run: the terminal, log.txt, metrics.jsonl, and the trackers of its program."""

import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import time
from types import TracebackType
from typing import IO, Any, Literal, cast

import msgspec
from rich.console import Console, RenderableType
from rich.progress import Progress as RichProgress

from minitune import __version__
from minitune.io.atomic import write_atomic
from minitune.io.results import iso_time
from minitune.programs.artifacts import written
from minitune.programs.progress import Bar, Lines, Number, Progress, columns
from minitune.programs.records import read_rows
from minitune.programs.terminal import terminal
from minitune.trackers.background import Trackers
from minitune.trackers.mlflow import MlflowConfig
from minitune.trackers.tensorboard import TensorboardConfig
from minitune.trackers.tracker import Histogram, TrackerConfig, numbers
from minitune.trackers.trackio import TrackioConfig
from minitune.trackers.wandb import WandbConfig
from minitune.types import PositiveInt

LINES = "log.txt"


class Watch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Histograms of what trains, for the trackers that draw them, under the names of wandb.watch.

    Gradients are computed once more for a histogram, since a step keeps none.
    """

    every: PositiveInt = 100  # steps between two histograms of every tensor
    log: Literal["gradients", "parameters", "all"] = "gradients"  # what histograms are made of


class LogConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of what is logged beyond the terminal."""

    wandb: WandbConfig | None = None  # log to Weights & Biases too, as keywords of wandb.init say
    mlflow: MlflowConfig | None = None  # log to MLflow too, which is what Azure ML shows
    tensorboard: TensorboardConfig | None = None  # write event files of TensorBoard too
    trackio: TrackioConfig | None = None  # log to Trackio too
    watch: Watch | None = None  # histograms of gradients and parameters for these trackers
    every: PositiveInt = 1  # steps between two rows of metrics

    def trackers(self) -> dict[str, TrackerConfig]:
        """Settings of the trackers that are asked for, by their names."""
        named: dict[str, TrackerConfig | None] = {
            "wandb": self.wandb,
            "mlflow": self.mlflow,
            "tensorboard": self.tensorboard,
            "trackio": self.trackio,
        }
        return {name: config for name, config in named.items() if config is not None}

    def check(self) -> None:
        """InputError for what would stop a tracker at the beginning of a run."""
        for config in self.trackers().values():
            config.check()


class Log:
    """Terminal, metrics.jsonl and trackers of one run: a context manager, so that all are closed
    however the run ends.
    """

    def __init__(
        self,
        folder: Path | None,
        config: LogConfig,
        program: Mapping[str, Any],
        console: Console | None = None,
    ) -> None:
        """folder: of the run, None if nothing is kept; program: the resolved one, for trackers."""
        self._folder = folder
        self._path = self._file_of("metrics.jsonl")
        self._config = config
        self._program = program
        self._console = console or terminal()
        self._trackers: Trackers | None = None
        self._figures: dict[str, float] = {}  # of the stages that have ended in this process
        self._stage, self._n_before = "", 0
        self._bars: RichProgress | None = None  # that are on the terminal now
        self._text: IO[str] | None = None

    def __enter__(self) -> "Log":
        if self._folder is not None:
            configs = self._config.trackers()
            self._trackers = Trackers(configs, self._folder, self._program, self.say)
        self._file = self._reopened(keep=lambda stage, step: True)
        self._text = self._file_of(LINES).open("a", encoding="utf-8", errors="replace")
        self._write(f"--- {iso_time(time())}, minitune {__version__} ---")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if error is not None:
            self._write(str(error) or type(error).__name__)
        self.close_trackers(failed=error is not None)
        if self._text is not None:
            self._text.close()
            self._text = None

    def close_trackers(self, *, failed: bool = False) -> None:
        """End the trackers, which may print closing lines of their own."""
        if self._trackers is not None:
            self._trackers.finish(failed=failed)
            self._trackers = None

    @property
    def width(self) -> int:
        """Characters of a line of the terminal."""
        return self._console.width

    def say(self, text: str) -> None:
        """One plain line on the terminal, and in log.txt."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._write(text)

    def show(self, renderable: RenderableType) -> None:
        """Show a table or anything else that rich can draw."""
        self._console.print(renderable)
        plain = Console(file=io.StringIO(), width=self.width, no_color=True, force_terminal=False)
        plain.print(renderable)
        lines = cast("io.StringIO", plain.file).getvalue().splitlines()
        self._write("\n".join(line.rstrip() for line in lines))

    def _write(self, text: str) -> None:
        """Add lines to log.txt, which is open while the run goes on."""
        if self._text is not None:
            self._text.write(f"{text}\n")
            self._text.flush()

    def begin(self, stage: str) -> None:
        """Name the stage whose steps are counted from now on; the global_step of trackers goes on
        where the stages before it ended.
        """
        last = {name: step for name, step, _ in read_rows(self._path)}
        earlier = list(last)[: list(last).index(stage)] if stage in last else list(last)
        self._stage, self._n_before = stage, sum(last[name] for name in earlier)

    def metrics(self, step: int, values: Mapping[str, Number]) -> None:
        """Append a row to metrics.jsonl and the trackers, on a stage's first step and on every
        `every`-th; NaN, inf become strings.
        """
        if step > 1 and step % self._config.every:
            return
        row = {"stage": self._stage, "step": step}
        row |= {
            name: value if math.isfinite(value) else str(value) for name, value in values.items()
        }
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()
        if self._trackers is not None:
            # of a sweep: trackers draw each group apart
            group = f"adapter-{values['adapter']}/" if "adapter" in values else ""
            named = {f"{group}{name}": value for name, value in values.items()}
            self._trackers.log(self._n_before + step, named)

    def record(self, label: str, record: Mapping[str, Any]) -> None:
        """Give the figures and samples of the stage that has ended to the trackers, and what it
        wrote to those that keep it."""
        self._figures |= numbers(record, f"{label}/")
        if self._trackers is None:
            return
        self._trackers.record(self._n_before + int(record.get("steps") or 0), label, record)
        folder = self._path.parent
        for kept, artifact in written(folder, self._program, self._figures, label, record).items():
            self._trackers.artifact(kept, artifact)

    @property
    def watch(self) -> Watch | None:
        """When histograms are due, None if never."""
        return self._config.watch

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Give histograms of a step of this stage to the trackers."""
        if self._trackers is not None:
            self._trackers.histograms(self._n_before + step, histograms)

    def summarize(self, content: Mapping[str, Any]) -> None:
        """Give the content of summary.json to the trackers."""
        if self._trackers is not None:
            self._trackers.summarize(content)

    def sync(self) -> None:
        """Flush the rows to the disk, before a state that says that they are there."""
        if self._folder is not None:
            os.fsync(self._file.fileno())

    def rewind(self, step: int) -> None:
        """Cut this stage's rows after a step, because it goes on from there (wandb itself drops
        steps that it already has).
        """
        self._file.close()
        self._file = self._reopened(keep=lambda stage, at: stage != self._stage or at <= step)

    @contextmanager
    def progress(
        self,
        title: str,
        total: int,
        done: int = 0,
        *,
        brief: bool = False,
    ) -> Iterator[Progress]:
        """Show a progress bar on a terminal, else a plain line now and then; `done` of `total`
        steps were done before. brief: no line tells of a loop that takes seconds."""
        if not self._console.is_terminal:
            yield Lines(self.say, title, total, done, brief)
            return
        lines = Lines(self._write, title, total, done, brief)
        shown, room = columns(title, total, self._console.width)
        outer = self._bars
        bars = outer or RichProgress(*shown, console=self._console)
        # One inside another is a second line of the same display.
        with nullcontext() if outer is not None else bars:
            self._bars = bars
            task = bars.add_task(title, total=total, completed=done, readings="")
            try:
                yield Bar(bars, task, room, lines)
            finally:
                self._bars = outer
                if outer is not None:
                    outer.remove_task(task)

    @contextmanager
    def counter(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """Function that counts one of `total` things as done each time it is called, for loops
        that take seconds with a small model and minutes with a large one.
        """
        with self.progress(title, total, brief=True) as progress:
            done = itertools.count(1)
            yield lambda: progress.update(next(done), {})

    def _file_of(self, name: str) -> Path:
        return Path(os.devnull) if self._folder is None else self._folder / name

    def _reopened(self, keep: Callable[[str, int], bool]) -> IO[bytes]:
        """metrics.jsonl without the rows that are not to be kept and without a row torn by a kill,
        open for appending.
        """
        kept = b"".join(line for stage, step, line in read_rows(self._path) if keep(stage, step))
        if self._path.exists() and kept != self._path.read_bytes():
            write_atomic(self._path, kept)
        return self._path.open("ab")


def say_early(text: str) -> None:
    """One plain line on the terminal, before a run has a folder."""
    terminal().print(text, markup=False, highlight=False, soft_wrap=True)
