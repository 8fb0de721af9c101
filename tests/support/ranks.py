"""Processes that are the ranks of a process group on this machine: over gloo, on the loopback interface."""

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from support.forked import started
from support.paths import ROOT, TESTS

TIMEOUT_S = 300  # of a call or a command; a collective that waits for a missing rank gives up after it as well
TICK_S = 0.02  # between two looks at the processes of a command
CHILD_VARIABLES = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_USE_AGENT_STORE": "True"}


class RankError(AssertionError):
    """Raised where a rank failed; its message is what the rank that failed first had to say."""


class Ranks:
    """Pool of processes that call functions as the ranks of a group, which is a new one for every call.

    The processes start at the first call, and end when one of them fails or the pool is closed.
    """

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, n: int, f: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Results of f(*args) on each of n ranks, in their order; RankError if one raises, dies or is late.

        f is a function of a module that a new process can import, such as one of `support`; it finds the default
        process group initialized. What it gets and returns is pickled.
        """
        while len(self._workers) < n:
            self._workers.append(_started(len(self._workers)))
        store, port = _store(n)
        for rank in range(n):
            self._workers[rank][1].send_bytes(pickle.dumps((rank, n, port, f, args)))
        try:
            return self._results(n, timeout_s)
        except RankError:
            self.close()
            raise
        finally:
            del store

    def close(self) -> None:
        """End all processes."""
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers = []

    def _results(self, n: int, timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < n:
            pending = {self._workers[rank][1]: rank for rank in range(n) if rank not in results}
            ready = wait(list(pending), timeout_s)
            if not ready:
                for process, _ in self._workers:
                    os.kill(process.pid, signal.SIGUSR1)
                time.sleep(1)
                raise RankError(f"ranks {sorted(pending.values())} of {n} gave no result in time")
            for connection in ready:
                rank = pending[connection]  # pyright: ignore[reportArgumentType]
                try:
                    failure, result = pickle.loads(self._workers[rank][1].recv_bytes())
                except (EOFError, ConnectionResetError):
                    raise RankError(f"rank {rank} of {n} died") from None
                if failure:
                    raise RankError(f"rank {rank} of {n} failed:\n{failure}")
                results[rank] = result
        return [results[rank] for rank in range(n)]


class Finished(NamedTuple):
    """How the ranks of a command ended: the exit code and the output of each."""

    codes: list[int]
    outputs: list[str]  # standard output and error together


def run_command(
    command: Sequence[str],
    n: int,
    folder: Path,
    *,
    variables: Mapping[str, str] | None = None,
    variables_of: Callable[[int], Mapping[str, str]] = lambda _: {},
    timeout_s: float = TIMEOUT_S,
    check: bool = True,
) -> Finished:
    """Run a command as n ranks, with the variables that torchrun sets, in a folder that gets their outputs.

    When one ends with a code other than 0, the others are killed; RankError then holds its output, unless not check,
    and always if a rank has not ended in time.
    """
    store, port = _store(n)
    path = os.pathsep.join([str(ROOT), str(TESTS)])
    processes = []
    for rank in range(n):
        own = _torchrun_variables(rank, n, port) | {"PYTHONPATH": path} | dict(variables or {}) | dict(variables_of(rank))
        with (folder / f"rank-{rank}.log").open("wb") as log:
            how: dict[str, Any] = {
                "cwd": folder,
                "env": os.environ | CHILD_VARIABLES | own,
                "stdout": log,
                "stderr": subprocess.STDOUT,
            }
            processes.append(subprocess.Popen(command, start_new_session=True, **how))
    try:
        first = _first_failure(processes, timeout_s)
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        del store
    finished = Finished(
        [process.returncode for process in processes],
        [(folder / f"rank-{rank}.log").read_text("utf-8", "replace") for rank in range(n)],
    )
    if first == "late":
        raise RankError(f"ranks did not end in {timeout_s} s:\n" + "\n".join(finished.outputs))
    if check and first is not None:
        raise RankError(f"rank {first} of {n} ended with {finished.codes[first]}:\n{finished.outputs[first]}")
    return finished


def _first_failure(processes: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> int | str | None:
    """Rank that ended first with a code other than 0; None if all ended well, "late" if one does not end."""
    for _ in range(int(timeout_s / TICK_S)):
        codes = [process.poll() for process in processes]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None or all(code == 0 for code in codes):
            return failed
        time.sleep(TICK_S)
    return "late"


def _store(n: int) -> tuple[Any, int]:
    """Store where n ranks find one another, held by this process, and its port: no other can take that first."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, n, is_master=True, wait_for_workers=False)
    return store, store.port


def _torchrun_variables(rank: int, n: int, port: int) -> dict[str, str]:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), **address}


def _started(number: int) -> tuple[Any, Connection]:
    """Process that waits for calls, and the connection to it."""
    here, there = multiprocessing.Pipe()
    with mock.patch.dict(os.environ, CHILD_VARIABLES):
        process = started(partial(_serve, there), f"rank-{number}")
    there.close()
    return process, here


def _serve(connection: Connection) -> None:
    """Answer calls until the other end is closed."""
    faulthandler.register(signal.SIGUSR1)  # writes to the standard error where a rank that is late stands
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(pickle.dumps(_answer(call)))


def _answer(call: bytes) -> tuple[str, Any]:
    """(traceback, result) of one call within a process group of its own."""
    import torch
    import torch.distributed as dist

    try:
        rank, n, port, f, args = pickle.loads(call)
        torch.set_num_threads(1)
        os.environ |= _torchrun_variables(rank, n, port)
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
        result = f(*args)
        dist.destroy_process_group()
        return "", result
    except BaseException:
        return traceback.format_exc(), None
