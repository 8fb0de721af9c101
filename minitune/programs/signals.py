"""Signals that ask a run to stop, and when they are heeded: at once, or after the step that is
being taken."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

# SIGHUP: a terminal that closes, or an ssh connection that breaks.
# SIGUSR1: Slurm's `--signal`, before the time is up.
# SIGBREAK: on Windows alone, what one process can send to another.
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGBREAK")


class Stopped(BaseException):
    """End of a run that a signal asked for: all that it did up to `step` is in `folder`.

    It is no Exception, because no library that catches all of those may swallow it.
    """

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__(f"stopped at step {step}, saved in {folder}")
        self.step, self.folder = step, folder


class _Place(NamedTuple):
    """Position of a run that a signal may end at once, because what it does now can be repeated."""

    step: int
    folder: Path


class StopSignals:
    """Context manager that catches the signals of NAMES; call it to ask whether one has arrived.

    Within at_once() a signal raises Stopped where it arrives, as Ctrl-C does in any program.
    Elsewhere it only makes the call return True. A second SIGINT raises KeyboardInterrupt, and a
    third ends the process.
    """

    def __init__(self) -> None:
        """Outside of the main thread it catches nothing."""
        self.number: int | None = None  # of the last signal caught
        self._n_interrupts = 0
        self._before: dict[int, Any] = {}
        self._place: _Place | None = None  # None: a signal waits for the one who asks

    def __call__(self) -> bool:
        return self.number is not None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            numbers = {getattr(signal, name) for name in NAMES if hasattr(signal, name)}
            # nohup has the system ignore SIGHUP, and the run is to outlive its terminal
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
                numbers.remove(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._caught) for number in numbers}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            # Whoever has pressed Ctrl-C twice may do so again while the process ends.
            if not (number == signal.SIGINT and self._n_interrupts > 1):
                signal.signal(number, handler)

    @contextmanager
    def at_once(self, step: int, folder: Path) -> Iterator[None]:
        """Raise Stopped(step, folder) as soon as a signal arrives in the block, or for one that
        arrived before."""
        with self._at(_Place(step, folder)):
            if self():
                raise Stopped(step, folder)
            yield

    @contextmanager
    def after_step(self) -> Iterator[None]:
        """Let signals wait in the block, which asks whether one has arrived when its state can be
        saved."""
        with self._at(None):
            yield

    @contextmanager
    def _at(self, place: _Place | None) -> Iterator[None]:
        outer, self._place = self._place, place
        try:
            yield
        finally:
            self._place = outer

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT:
            self._n_interrupts += 1
            if self._n_interrupts > 2:
                os._exit(128 + number)
            if self._n_interrupts == 2:
                with suppress(OSError):
                    os.write(2, b"SIGINT: ending at once, without a save\n")
                raise KeyboardInterrupt
        when = "stopping after this step" if self._place is None else "stopping"
        if number == signal.SIGINT:
            when += "; Ctrl-C again ends at once, without a save"
        # Not through the console: a signal may come while it is printing, and its locks are held.
        with suppress(OSError):
            os.write(2, f"{signal.Signals(number).name}: {when}\n".encode())
        if self._place is not None:
            # A second signal must not break off the cleaning up that this one begins.
            place, self._place = self._place, None
            raise Stopped(*place)
