"""Processes that are the ranks of a process group on this machine: over gloo, on the loopback interface."""

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

from support.forked import started

TIMEOUT_S = 300  # of a call; a collective that waits for a missing rank gives up after it as well
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


def run_apart(n: int, f: Callable[..., None], *args: Any) -> list[int]:
    """Exit codes of n processes that call f(*args) as the ranks of a group, and of which none is ended when another one is."""
    store, port = _store(n)
    with mock.patch.dict(os.environ, CHILD_VARIABLES):
        processes = [started(partial(_as_rank, rank, n, port, f, args), f"rank-{rank}") for rank in range(n)]
    for process in processes:
        process.join(TIMEOUT_S)
        process.kill()
        process.join()
    del store
    return [process.exitcode for process in processes]


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
    try:
        return "", _as_rank(*pickle.loads(call))
    except BaseException:
        return traceback.format_exc(), None


def _as_rank(rank: int, n: int, port: int, f: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Result of f(*args) as one of n ranks."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= _torchrun_variables(rank, n, port)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
    dist.barrier()  # one that ends at once would break the connections that another one still makes
    result = f(*args)
    dist.destroy_process_group()
    return result
