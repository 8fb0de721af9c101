"""Progress of a loop for a person: a bar on a terminal, a plain line now and then elsewhere."""

import math
from collections.abc import Callable, Iterator, Mapping
from time import monotonic
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

Number = float | int
LINE_EVERY_S = 10.0  # where the output is no terminal: a line after this long,
TIME_CHARACTERS = 12  # of the time left, the slash of the count and the blanks between columns
BAR_CHARACTERS = 20
BAR_FROM = 80  # characters left for readings, from which on a bar takes some
LINE_EVERY_SHARE = 0.05  # or after this share of the steps, whichever comes first


class Progress:
    """Progress of a loop, shown as the terminal allows."""

    def update(self, step: int, values: Mapping[str, Number]) -> None:
        """Show that `step` steps are done, with readings such as {"loss": 0.5}."""
        raise NotImplementedError


def columns(title: str, total: int, width: int) -> tuple[list[ProgressColumn], int]:
    """(columns of a bar, characters that are left for readings) on a terminal of some width.

    Count and time come first: a narrow terminal shows fewer readings, and no number is cut.
    """
    room = width - len(title) - 2 * len(str(total)) - TIME_CHARACTERS
    shown: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[readings]}", markup=False),
    ]
    if room > BAR_FROM:
        shown.append(BarColumn(bar_width=BAR_CHARACTERS))
        room -= BAR_CHARACTERS + 1
    return shown, room


class Lines(Progress):
    """Plain lines, each after a while or a share of the steps."""

    def __init__(
        self,
        say: Callable[[str], None],
        title: str,
        total: int,
        done: int,
        brief: bool,
    ) -> None:
        """say: writes a line; brief: nothing is written of a loop that takes seconds."""
        self._brief = brief
        self._say, self._title, self._total, self._done = say, title, total, done
        self._started = monotonic()
        self._shown_step, self._shown_s = -math.inf, self._started

    def update(self, step: int, values: Mapping[str, Number]) -> None:
        """Write a line if the last one is long enough ago."""
        now = monotonic()
        share, waited_s = (step - self._shown_step) / max(self._total, 1), now - self._shown_s
        is_due = step >= self._total or share >= LINE_EVERY_SHARE
        if waited_s < LINE_EVERY_S and (self._brief or not is_due):
            return
        self._shown_step, self._shown_s = step, now
        left_s = (now - self._started) / max(step - self._done, 1) * (self._total - step)
        minutes, seconds = divmod(round(left_s), 60)
        count, left = f"{self._title} {step}/{self._total}", f"{minutes}:{seconds:02} left"
        parts = (count, readings(values), left)
        self._say("  ".join(part for part in parts if part))


class Count:
    """Plain lines on a count whose end nobody knows, each after a while."""

    def __init__(self, say: Callable[[str], None], title: str) -> None:
        """say: writes a line; title: of it, such as "tokenizing train"."""
        self._say, self._title, self._shown_s = say, title, monotonic()

    def __call__(self, n: int) -> None:
        """Write a line if the last one is long enough ago."""
        now = monotonic()
        if now - self._shown_s >= LINE_EVERY_S:
            self._shown_s = now
            self._say(f"{self._title}: {n:,} samples")


class Bar(Progress):
    """Bar of a terminal."""

    def __init__(self, bar: RichProgress, task: TaskID, room: int, lines: Lines) -> None:
        """room: characters for readings; lines: what goes to the file of the log besides."""
        self._bar, self._task, self._room, self._lines = bar, task, room, lines

    def update(self, step: int, values: Mapping[str, Number]) -> None:
        """Move the bar to a step, with its readings."""
        self._bar.update(self._task, completed=step, readings=fitted(values, self._room))
        self._lines.update(step, values)


def _label(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _texts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each value as it is read: bytes in MiB or GiB, rates and counts with thousands, learning
    rates in powers of ten."""
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


def readings(values: Mapping[str, Number]) -> str:
    """Named numbers as one line, each with its unit: "loss 0.1234  12,345 tokens/s  mem 1 GiB"."""
    return "  ".join(_each_reading(values))


def fitted(values: Mapping[str, Number], room: int) -> str:
    """Readings on one line of at most `room` characters, without the last ones that do not fit."""
    parts = _each_reading(values)
    while parts and len("  ".join(parts)) > room:
        parts.pop()
    return "  ".join(parts)


def _each_reading(values: Mapping[str, Number]) -> list[str]:
    unlabelled = ("tokens_per_second",)
    texts = _texts(values)
    return [text if name in unlabelled else f"{_label(name)} {text}" for name, text in texts]
