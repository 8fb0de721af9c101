"""Trackers of one run, each fed by a thread of its own: no step waits for a network, and no tracker
ends a training."""

from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic
from typing import Any

from minitune.trackers.tracker import Artifact, Histogram, Kept, StepValues, Tracker, TrackerConfig

GATHER_S = 0.5  # that rows wait for each other, to be sent together
FINISH_S = 45.0  # that the end of a run waits for a tracker; wandb itself takes 30 at most
REASON_CHARACTERS = 300

Call = Callable[[Tracker], None]


class Trackers:
    """All trackers of a run; one that fails is dropped with a line that says so."""

    def __init__(
        self,
        configs: Mapping[str, TrackerConfig],
        folder: Path,
        program: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """configs: by the tracker's name; folder: of the run; say: takes the lines about failures.

        InputError if one does not begin.
        """
        self._say, self._configs = say, configs
        self._fed = {
            name: Background(name, config.start(folder, program))
            for name, config in configs.items()
        }

    def log(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Give a row of training to all."""
        self._to_all(StepValues(step, dict(values)))

    def record(self, step: int, label: str, record: Mapping[str, Any]) -> None:
        """Give the figures of a finished stage to all."""
        self._to_all(lambda tracker: tracker.record(step, label, record))

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Give histograms to all."""
        self._to_all(lambda tracker: tracker.histograms(step, histograms))

    def artifact(self, kept: Kept, artifact: Artifact) -> None:
        """Give what was written to the trackers that are to keep it."""
        for name, background in self._fed.items():
            if kept in self._configs[name].artifacts:
                background.put(lambda tracker: tracker.artifact(artifact))

    def summarize(self, content: Mapping[str, Any]) -> None:
        """Give the content of summary.json to all."""
        self._to_all(lambda tracker: tracker.summarize(content))

    def finish(self, *, failed: bool) -> None:
        """End all, and say what did not finish."""
        for background in self._fed.values():
            background.put(lambda tracker: tracker.finish(failed=failed))
            background.put(None)
        for name, background in self._fed.items():
            fault = background.join()
            if fault is not None:
                self._say(f"{name} did not finish ({fault}); metrics.jsonl has every row")

    def _to_all(self, item: StepValues | Call) -> None:
        for name, background in list(self._fed.items()):
            if background.fault is None:
                background.put(item)
                continue
            reason = f"{name} takes no more rows ({background.fault})"
            self._say(f"{reason}; training goes on, metrics.jsonl has them")
            del self._fed[name]


class Background:
    """Tracker behind a queue that a thread empties; `fault` says why it takes nothing more."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.fault: str | None = None
        self._tracker = tracker
        self._queue: SimpleQueue[StepValues | Call | None] = SimpleQueue()
        # A daemon: a process that ends does not wait for a server that never answers.
        self._thread = Thread(target=self._feed, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, item: StepValues | Call | None) -> None:
        """Queue a row, a call, or None, after which the thread ends."""
        self._queue.put(item)

    def join(self) -> str | None:
        """Wait until the thread has ended, FINISH_S at most; returns why something is missing, None
        if nothing is."""
        self._thread.join(FINISH_S)
        if self._thread.is_alive():
            return f"it has not taken everything after {FINISH_S:.0f} s"
        return self.fault

    def _feed(self) -> None:
        """Give the tracker what is queued, until None is."""
        item: StepValues | Call | None = self._queue.get()
        while item is not None:
            try:
                if isinstance(item, StepValues):
                    rows, item = self._gathered(item)
                    self._tracker.log(rows)
                else:
                    item(self._tracker)
                    item = self._queue.get()
            except Exception as error:
                self.fault = reason(error)
                return

    def _gathered(self, first: StepValues) -> tuple[list[StepValues], StepValues | Call | None]:
        """(rows that come within GATHER_S, what is queued behind them)."""
        rows, end = [first], monotonic() + GATHER_S
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, end - monotonic()))
            except Empty:
                return rows, self._nothing
            if not isinstance(item, StepValues):
                return rows, item
            rows.append(item)

    @staticmethod
    def _nothing(tracker: Tracker) -> None:
        """Do nothing with a tracker: what stands in the queue's place while it is empty."""


def reason(error: Exception) -> str:
    """Words of an error on one line, without the address of a manual."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith("For further information")]
    return " ".join(kept)[:REASON_CHARACTERS].rstrip(".") or type(error).__name__
