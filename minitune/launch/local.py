"""Ranks on this machine, started by one command: `--ranks 2`."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, NamedTuple

from minitune.errors import RANK_LOST, InputError
from minitune.launch.ranks import Launched, launched

FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
GRACE_S = 10.0  # for the others to end by themselves after one has failed
POLL_S = 0.05


class Child(NamedTuple):
    """Process of one rank, and the file that takes what it writes on stderr (none of rank 0)."""

    process: subprocess.Popen[bytes]
    stderr: IO[bytes] | None


def require_no_launcher(variables: Mapping[str, str]) -> None:
    """InputError where a launcher has started several processes already."""
    size = launched(variables).size
    if size > 1:
        found = f"--ranks within a launcher that has started {size} processes"
        raise InputError(f"launch: {found}, expected one of the two; leave out --ranks")


def run_ranks(n_ranks: int, command: Sequence[str]) -> int:
    """Run a command as n_ranks processes of one run on this machine; returns its exit code.

    Rank 0 has the terminal. Signals go to all ranks. When one rank fails, the others are ended
    within GRACE_S, and one line says which it was; the exit code is that rank's.
    """
    require_no_launcher(os.environ)
    with ExitStack() as open_files:
        children = [
            _started(command, one, n_ranks, open_files) for one in _places(n_ranks, _free_port())
        ]
        with _forwarding(children) as caught:
            try:
                failed = _first_failure(children, caught)
            finally:
                _end(children)
        if failed is None:
            return 0
        code = children[failed].process.returncode
        if failed > 0 and not caught:
            _say(f"minitune: rank {failed} of {n_ranks} {_ended(children[failed])}\n")
        return code if code >= 0 else 128 - code


def _places(n_ranks: int, port: int) -> Iterator[Launched]:
    return (Launched(rank, n_ranks, rank, "127.0.0.1", port) for rank in range(n_ranks))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _started(
    command: Sequence[str],
    place: Launched,
    n_ranks: int,
    open_files: ExitStack,
) -> Child:
    # the cores are shared out, as torchrun leaves it to its user to do
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // n_ranks))}
    environment = {**threads, **os.environ, **place.variables()}
    # Ctrl-C reaches this process alone, which hands it on once
    group = 0 if hasattr(os, "setpgid") else None
    if place.rank == 0:
        return Child(subprocess.Popen(command, env=environment, process_group=group), None)
    stderr = open_files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
    process = subprocess.Popen(
        command,
        env=environment,
        process_group=group,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    )
    return Child(process, stderr)


@contextmanager
def _forwarding(children: Sequence[Child]) -> Iterator[list[int]]:
    """Signals that have arrived, each of which is handed on to every rank."""
    caught: list[int] = []

    def forward(number: int, frame: object) -> None:
        caught.append(number)
        for child in children:
            if child.process.poll() is None:
                child.process.send_signal(number)

    numbers = [getattr(signal, name) for name in FORWARDED if hasattr(signal, name)]
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_failure(children: Sequence[Child], caught: Sequence[int]) -> int | None:
    """Rank whose failure is the cause, None if all ended well; returns when the others need not be
    waited for any longer.
    """
    deadline = float("inf")
    failures: dict[int, int] = {}  # exit code by rank, in the order in which they ended
    while time.monotonic() < deadline:
        codes = [child.process.poll() for child in children]
        failures |= {rank: code for rank, code in enumerate(codes) if code}
        if None not in codes:
            break
        # after a signal every rank saves what it has, and ends by itself
        if failures and not caught:
            deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(POLL_S)
    # one that lost another rank is not the cause, and what all ranks found the first one has said
    causes = [rank for rank, code in failures.items() if code != RANK_LOST]
    return 0 if 0 in causes else next(iter([*causes, *failures]), None)


def _end(children: Sequence[Child]) -> None:
    for child in children:
        if child.process.poll() is None:
            child.process.kill()
        child.process.wait()


def _ended(child: Child) -> str:
    """Words on the end of a rank: its signal or exit code, and the last line that it wrote."""
    code = child.process.returncode
    how = f"ended with exit code {code}"
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    assert child.stderr is not None, "rank 0 writes to the terminal itself"
    child.stderr.seek(0)
    lines = child.stderr.read().decode(errors="replace").strip().splitlines()
    return f"{how}: {lines[-1]}" if lines else how


def _say(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(text)
