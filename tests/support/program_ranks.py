"""Programs as the ranks of a pool run them: no process starts for them, and nothing is imported again."""

from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch.distributed as dist

from support.ranks import Ranks


class Ended(NamedTuple):
    """How a command ended on a rank: its exit code, and what it wrote."""

    code: int
    out: str
    err: str


def run_on_ranks(ranks: Ranks, n: int, words: list[str], folder: Path) -> Ended:
    """End of the first of n ranks that run `minitune` with these words in a folder; all of them end well."""
    ended = ranks.run(n, end_of, words, folder)
    for rank, one in enumerate(ended):
        assert one.code == 0, f"rank {rank} of {n}: {one.err}"
    return ended[0]


def end_of(words: list[str], folder: Path) -> Ended:
    """End of `minitune` with these words in this process."""
    from minitune.__main__ import main  # here, so that a process that never runs a program does not import all of it

    out, err = StringIO(), StringIO()
    with chdir(folder), redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    return Ended(code, out.getvalue(), err.getvalue())


def metrics_of(script: str) -> dict[str, Any]:
    """Metrics that a script for torchrun ends with on this rank; the process group that it makes is the one that is here."""
    names: dict[str, Any] = {}
    with mock.patch.object(dist, "init_process_group"), mock.patch.object(dist, "destroy_process_group"):
        exec(script, names)
    return {name: float(value) for name, value in names["metrics"].items()}
