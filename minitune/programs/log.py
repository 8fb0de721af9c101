"""Output of a run: lines and a progress bar on the terminal, rows in metrics.jsonl, and wandb where the program asks for it."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import IO, Any, cast

import msgspec
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from minitune.io.atomic import write_atomic
from minitune.programs.records import read_rows
from minitune.programs.wandb_tracker import WandbConfig, WandbRun
from minitune.types import PositiveInt

Number = float | int
LINE_EVERY_S = 10.0  # where the output is no terminal: a line after this long,
LINE_EVERY_SHARE = 0.05  # or after this share of the steps, whichever comes first


class LogConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of what is logged beyond the terminal. wandb: keywords of wandb.init; every: steps between two rows of metrics."""

    wandb: WandbConfig | None = None
    every: PositiveInt = 1


class Progress:
    """Progress of a loop, shown as the terminal allows."""

    def update(self, step: int, values: Mapping[str, Number]) -> None:
        """Show that `step` steps are done, with these readings: {"loss": ..., "lr": ..., "mem_bytes": ...}."""
        raise NotImplementedError


class Log:
    """Terminal, metrics.jsonl and wandb of one run: a context manager, so that all are closed however the run ends."""

    def __init__(self, folder: Path, config: LogConfig, program: Mapping[str, Any], console: Console | None = None) -> None:
        """folder: of the run; program: the resolved one, which becomes wandb's config."""
        self._path = folder / "metrics.jsonl"
        self._config = config
        self._program = program
        self._console = console or Console(file=cast("IO[str]", _Terminal()))
        self._wandb: WandbRun | None = None
        self._stage, self._n_before = "", 0

    def __enter__(self) -> "Log":
        if self._config.wandb is not None:
            self._wandb = WandbRun(self._path.parent, self._config.wandb, self._program)
        self._file = self._reopened(keep=lambda stage, step: True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if self._wandb is not None:
            fault = self._wandb.finish(exit_code=0 if error is None else 1)
            if fault is not None:
                self.say(f"wandb did not finish ({fault}); metrics.jsonl has every row")

    def say(self, text: str) -> None:
        """One plain line on the terminal."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, renderable: RenderableType) -> None:
        """Show a table or anything else that rich can draw."""
        self._console.print(renderable)

    def begin(self, stage: str) -> None:
        """Name the stage whose steps are counted from now on; wandb's global_step goes on where the stages before it ended."""
        last = {name: step for name, step, _ in read_rows(self._path)}
        earlier = list(last)[: list(last).index(stage)] if stage in last else list(last)
        self._stage, self._n_before = stage, sum(last[name] for name in earlier)

    def metrics(self, step: int, values: Mapping[str, Number]) -> None:
        """Append a row to metrics.jsonl and wandb, on a stage's first step and on every `every`-th; NaN, inf become strings."""
        if step > 1 and step % self._config.every:
            return
        row = {"stage": self._stage, "step": step}
        row |= {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()
        if self._wandb is not None:
            global_step = self._n_before + step
            group = f"adapter-{values['adapter']}/" if "adapter" in values else ""  # of a sweep: wandb draws each group apart
            named = {f"{group}{name}": value for name, value in values.items()}
            fault = self._wandb.log(global_step, {"global_step": global_step, **named})
            if fault is not None:
                self.say(f"wandb takes no more rows ({fault}); training goes on, metrics.jsonl has them")
                self._wandb = None

    def sync(self) -> None:
        """Flush the rows to the disk, before a state that says that they are there."""
        os.fsync(self._file.fileno())

    def rewind(self, step: int) -> None:
        """Cut this stage's rows after a step, because it goes on from there (wandb itself drops steps that it already has)."""
        self._file.close()
        self._file = self._reopened(keep=lambda stage, at: stage != self._stage or at <= step)

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Progress]:
        """Show a progress bar on a terminal, else a plain line now and then; `done` of `total` steps were done before."""
        if not self._console.is_terminal:
            yield _Lines(self, title, total, done)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[readings]}", markup=False),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self._console) as bar:
            yield _Bar(bar, bar.add_task(title, total=total, completed=done, readings=""))

    def _reopened(self, keep: Callable[[str, int], bool]) -> IO[bytes]:
        """metrics.jsonl without the rows that are not to be kept and without a row torn by a kill, open for appending."""
        kept = b"".join(line for stage, step, line in read_rows(self._path) if keep(stage, step))
        if self._path.exists() and kept != self._path.read_bytes():
            write_atomic(self._path, kept)
        return self._path.open("ab")


def readings(values: Mapping[str, Number]) -> str:
    """Named numbers as one line, each with its unit: "loss 0.1234  lr 3.00e-04  12,345 tokens/s  mem 1.2 GiB"."""
    return "  ".join(text if name == "tokens_per_second" else f"{_label(name)} {text}" for name, text in _texts(values))


class _Terminal:
    """Standard output that goes silent once it can't be written, so that a run outlives its
    terminal or pipe."""

    def __init__(self) -> None:
        self._is_open = True

    def write(self, text: str) -> int:
        if self._is_open:
            self._if_open(lambda: sys.stdout.write(text))
        return len(text)

    def flush(self) -> None:
        if self._is_open:
            self._if_open(sys.stdout.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    def _if_open(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError:
            # A reader such as head has gone, or the terminal was closed: what Python still has to
            # flush at its end goes nowhere.
            self._is_open = False
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Bar(Progress):
    def __init__(self, bar: RichProgress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def update(self, step: int, values: Mapping[str, Number]) -> None:
        self._bar.update(self._task, completed=step, readings=readings(values))


class _Lines(Progress):
    def __init__(self, log: Log, title: str, total: int, done: int) -> None:
        self._log, self._title, self._total, self._done = log, title, total, done
        self._started = monotonic()
        self._shown_step, self._shown_s = -math.inf, self._started

    def update(self, step: int, values: Mapping[str, Number]) -> None:
        now = monotonic()
        share, waited_s = (step - self._shown_step) / max(self._total, 1), now - self._shown_s
        if step < self._total and share < LINE_EVERY_SHARE and waited_s < LINE_EVERY_S:
            return
        self._shown_step, self._shown_s = step, now
        left_s = (now - self._started) / max(step - self._done, 1) * (self._total - step)
        minutes, seconds = divmod(round(left_s), 60)
        self._log.say(f"{self._title} {step}/{self._total}  {readings(values)}  {minutes}:{seconds:02} left")


def _label(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _texts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each value as it is read: bytes in MiB or GiB, rates and counts with thousands, learning rates in powers of ten."""
    for name, value in values.items():
        if isinstance(value, (str, bool)):
            yield name, str(value)
        elif name.endswith("_bytes"):
            yield name, f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
        elif name.endswith(("tokens_per_second", "tokens_per_s")):
            yield name, f"{value:,.0f} tokens/s"
        elif isinstance(value, int):
            yield name, f"{value:,}"
        elif name == "lr" or (value != 0 and not 1e-3 <= abs(value) < 1e6):
            yield name, f"{value:.2e}"
        else:
            yield name, f"{value:.4f}"
