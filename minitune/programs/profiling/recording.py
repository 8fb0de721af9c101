"""Recording of some steps of a training stage by torch.profiler, from the first one to the last."""

import gzip
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from minitune.errors import InputError
from minitune.io.atomic import atomic_file, create_folder
from minitune.programs.profiling import kinds
from minitune.programs.profiling.table import (
    FOLDER,
    drawn_table,
    read_profiles,
    stage_profile,
    write_profile,
)
from minitune.programs.profiling.trace import decode, measure
from minitune.programs.stages.training_stage import TrainingStage
from minitune.programs.state import PipelineState

ACTIVITIES: Mapping[str, ProfilerActivity] = MappingProxyType(
    {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}
)
QUIET = ("KINETO_LOG_LEVEL", "6")  # keeps the profiler's own messages off the terminal
MEMORY_EVENTS = 1_000_000  # that CUDA's allocator remembers


class Recording:
    """Steps of a stage that are recorded: a context manager, which drops what is not complete."""

    def __init__(self, stage: TrainingStage, state: PipelineState, device: torch.device) -> None:
        """device: that trains."""
        self._label, self._log, self._folder = stage.label, state.log, state.folder
        # no step is the zeroth
        self._steps = (0, 0) if state.profile is None else state.profile.steps
        self.device = device
        self._profiler: profile | None = None
        self._range: Any = None
        self._has_begun = False

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, *error: object) -> None:
        if self._profiler is not None:
            self._stop()
            self._forget_memory()
            self._say_none("training ended before the last of them")

    def is_edge(self, step: int) -> bool:
        """True if recording begins or ends after a step, which is then read before the next one is
        queued."""
        first, last = self._steps
        return step in (first - 1, last)

    def begin(self, step: int) -> None:
        """Begin to record if the next step is the first one to record."""
        if step == self._steps[0]:
            self._start()
        elif step > self._steps[0] > 0 and not self._has_begun:
            self._has_begun = True
            known = read_profiles(self._folder).get(self._label)
            if known is None or known.steps != self._steps:
                self._say_none(f"training goes on at step {step}")

    def end(self, step: int) -> None:
        """Write what was recorded if a step is the last one to record and has been read."""
        if self._profiler is None or step < self._steps[1]:
            return
        recorded = self._stop()
        try:
            self._write(recorded)
        except (InputError, OSError, RuntimeError) as error:
            self._say_none(str(error))
        finally:
            self._forget_memory()

    def _start(self) -> None:
        self._has_begun = True
        os.environ.setdefault(*QUIET)
        activities = [ProfilerActivity.CPU]
        if self.device.type in ACTIVITIES:
            activities.append(ACTIVITIES[self.device.type])
        if self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._profiler = profile(activities=activities, profile_memory=True)
        self._profiler.start()
        self._range = record_function(kinds.STEPS)
        self._range.__enter__()

    def _stop(self) -> profile:
        recorded, self._profiler = self._profiler, None
        assert recorded is not None, "nothing is recorded"
        self._range.__exit__(None, None, None)
        recorded.stop()
        return recorded

    def _write(self, recorded: profile) -> None:
        """Write trace, snapshot and table, and show the table."""
        first, last = self._steps
        create_folder(self._folder / FOLDER)
        name = f"{FOLDER}/{self._label}-steps-{first}-{last}"
        snapshot = self._write_snapshot(f"{name}.snapshot.pickle")
        trace = f"{name}.json.gz"
        with _exported(recorded, self._folder / trace) as content:
            measured = measure(decode(content))
        found = stage_profile(measured, self._steps, trace, snapshot)
        write_profile(self._folder, self._label, found)
        self._log.show(drawn_table(self._label, found, self._log.width))
        self._log.say(f"{self._label}: {found.sentence()}")
        self._log.say(f"{self._label}: the trace is {self._folder / trace}; Perfetto opens it")
        if snapshot is None:
            self._log.say(f"{self._label}: no snapshot of memory, which only CUDA makes")

    def _write_snapshot(self, name: str) -> str | None:
        """Write what CUDA's allocator did in these steps; None without CUDA."""
        if self.device.type != "cuda":
            return None
        with atomic_file(self._folder / name) as aside:
            torch.cuda.memory._dump_snapshot(str(aside))
        return name

    def _forget_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)

    def _say_none(self, why: str) -> None:
        first, last = self._steps
        self._log.say(f"{self._label}: no profile of steps {first} to {last}: {why}")


@contextmanager
def _exported(recorded: profile, path: Path) -> Iterator[bytes]:
    """Content of a trace, which is at `path`, compressed, when the block ends without an error."""
    plain = path.with_name(f".{path.name}.part")
    try:
        recorded.export_chrome_trace(str(plain))
        content = plain.read_bytes()
        with atomic_file(path) as aside:
            aside.write_bytes(gzip.compress(content, compresslevel=6, mtime=0))
            yield content
    finally:
        with suppress(OSError):
            plain.unlink(missing_ok=True)
