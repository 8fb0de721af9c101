"""Trackio, the tracker of Hugging Face: a database on this machine, or a Space."""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from minitune.errors import InputError
from minitune.io.atomic import write_atomic
from minitune.trackers.background import reason
from minitune.trackers.tracker import (
    TRACKIO_STEP,
    Artifact,
    Histogram,
    Kept,
    StepValues,
    flat,
    numbers,
)


class TrackioConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keywords of trackio.init; what is absent is trackio's own default."""

    project: str = "minitune"  # project that the run belongs to, as in trackio.init
    name: str | None = None  # name of the run on the page; the program's if absent
    group: str | None = None  # group of runs that belong together, as in trackio.init
    space_id: str | None = None  # Space of the Hub that shows the run, as in trackio.init
    server_url: str | None = None  # server of one's own, as in trackio.init
    dataset_id: str | None = None  # data set of the Hub that keeps the Space's rows
    private: bool | None = None  # whether a Space that is made is private, as in trackio.init

    @property
    def artifacts(self) -> tuple[Kept, ...]:
        """Nothing: it keeps no folders."""
        return ()

    def check(self) -> None:
        """InputError if the package is missing."""
        _imported()

    def start(self, folder: Path, program: Mapping[str, Any]) -> "TrackioRun":
        """Run of trackio with the program as its config; a continued run keeps its name."""
        given = {name: value for name, value in msgspec.to_builtins(self).items() if value}
        step_file = folder / TRACKIO_STEP
        is_continued = step_file.is_file()
        how: dict[str, Any] = {"name": str(program.get("name")), **given, "config": dict(program)}
        how |= {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        begin = partial(_imported().init, **how, resume="allow" if is_continued else "never")
        try:
            # In a context of its own the run is not the process's current one, which trackio would
            # finish a second time at exit.
            with redirect_stdout(io.StringIO()):
                run = copy_context().run(begin)
        except Exception as error:
            said = f"trackio says: {reason(error)}, expected a run to begin"
            raise InputError(f"log: {said}; correct [log] trackio") from None
        return TrackioRun(run, step_file, int(step_file.read_text("utf-8")) if is_continued else -1)


class TrackioRun:
    """Run of trackio; rows up to the step that it has already are left as they are."""

    def __init__(self, run: Any, step_file: Path, last_step: int) -> None:
        """last_step: that the run had when it was opened, -1 for a new one."""
        self._run, self._step_file, self._last_step = run, step_file, last_step

    def log(self, rows: Sequence[StepValues]) -> None:
        """Log rows, and note how far they go."""
        for step, values in rows:
            if step > self._last_step:
                self._run.log(numbers({"global_step": step, **values}), step=step)
        write_atomic(self._step_file, str(max(rows[-1].step, self._last_step)).encode())

    def record(self, step: int, label: str, record: Mapping[str, Any]) -> None:
        """Log the figures of a finished stage as LABEL/NAME."""
        values = {f"{label}/{name}": value for name, value in flat(record).items()}
        self._run.log(values, step=step)

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Log histograms."""
        histogram = _imported().Histogram
        values = {name: histogram(np_histogram=tuple(h)) for name, h in histograms.items()}
        self._run.log(values, step=step)

    def artifact(self, artifact: Artifact) -> None:
        """Nothing: a run's folders are too large for its database."""

    def summarize(self, content: Mapping[str, Any]) -> None:
        """Nothing: the figures of all stages were logged as they ended."""

    def finish(self, *, failed: bool) -> None:
        """End the run, with what is left sent."""
        with redirect_stdout(io.StringIO()):
            self._run.finish()


def _imported() -> Any:
    try:
        import trackio  # slow to import, and only for those who ask for it
    except ImportError:
        found = "the package trackio is not installed"
        raise InputError(
            f"log: {found}, expected it for [log] trackio; pip install 'minitune[trackio]'"
        ) from None
    return trackio
