"""Processes that are forked where `minitune` is imported already: a start takes no seconds, and a signal ends a real process."""

import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from support.paths import ROOT

IMPORTED = ["__main__", "minitune.cli.running", "minitune.sharding.placements", "torch.distributed.tensor"]
# of the process that is forked: no other thread may be there
VARIABLES = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def started(target: Callable[[], None], name: str | None = None) -> Any:
    """Process that calls the target, with the environment that this one has now."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, VARIABLES):
        forkserver.ensure_running()
    process = context.Process(target=partial(_call, dict(os.environ), target), daemon=True, name=name)
    process.start()
    return process


def _call(environment: dict[str, str], target: Callable[[], None]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target()


class Program:
    """Process that runs `minitune` with these words, and has what tests ask of a Popen."""

    def __init__(self, words: list[str]) -> None:
        import torch

        self._folder = Path(tempfile.mkdtemp(prefix="program-"))
        self._outputs = [self._folder / name for name in ("out", "err")]
        for path in self._outputs:
            path.touch()
        run = partial(_run, words, [str(path) for path in self._outputs], os.getcwd(), torch.get_num_threads())
        self._process = started(run)
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, the negative number of the signal that has ended the process, or None as long as it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send the process a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Send the process a signal that it can't handle."""
        self._process.kill()

    def communicate(self) -> tuple[str, str]:
        """Output and error output, after the end of the process."""
        self._process.join()
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in self._outputs)
        shutil.rmtree(self._folder)
        return out, err


def _run(words: list[str], outputs: list[str], folder: str, n_threads: int) -> None:
    import torch

    from minitune.__main__ import start

    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(folder)
    torch.set_num_threads(n_threads)
    sys.argv = ["minitune", *words]
    start()
