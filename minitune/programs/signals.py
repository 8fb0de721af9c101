"""Signals that ask a run to stop."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Context manager that catches SIGTERM, SIGINT and Windows' SIGBREAK; call it to ask whether a signal arrived.

    A second SIGINT acts as usual.
    """

    def __init__(self) -> None:
        """Outside of the main thread it catches nothing."""
        self.number: int | None = None  # of the last signal caught
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.number is not None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            # SIGBREAK exists on Windows only, where it is what one process can send to another.
            names = ("SIGTERM", "SIGINT", "SIGBREAK")
            numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
            self._before = {number: signal.signal(number, self._caught) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
        # Not through the console: a signal may come while it is printing, and its locks are held.
        with suppress(OSError):
            os.write(2, f"{signal.Signals(number).name}: stopping after this step\n".encode())
