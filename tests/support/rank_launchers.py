"""Joins of a process group as each launcher says it, and of one that exists already, by a rank of a pool."""

import os
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from minitune.errors import InputError
from minitune.programs.run_ranks import ranks_of_launch

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launchers(rank: str, port: int) -> dict[str, dict[str, str]]:
    """Variables that each launcher sets for one of two ranks, with a port of its own."""
    address = {"MASTER_ADDR": "127.0.0.1"}
    return {
        "torchrun": {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, **address, "MASTER_PORT": str(port)},
        "azureml-mpi": {
            "OMPI_COMM_WORLD_RANK": rank,
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": rank,
            "AZ_BATCH_MASTER_NODE": f"127.0.0.1:{port + 1}",
        },
        "slurm": {
            "SLURM_PROCID": rank,
            "SLURM_NTASKS": "2",
            "SLURM_LOCALID": rank,
            "SLURM_STEP_ID": "0",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "127.0.0.1",
            **address,
            "MASTER_PORT": str(port + 2),
        },
    }


def joined(port: int) -> dict[str, Any]:
    """What two ranks find together for each launcher, the same for all that goes well, and flags for what is left behind."""
    rank = str(dist.get_rank())
    dist.destroy_process_group()  # that of the pool, which destroys in its place the one that is made last
    results: dict[str, Any] = {}
    for name, variables in launchers(rank, port).items():
        with alone_with(variables):
            with ranks_of_launch() as ranks:
                results[name] = found(ranks, rank)
            results[f"{name} destroyed"] = not dist.is_initialized()
    torchrun = launchers(rank, port)["torchrun"]
    with alone_with(torchrun | {"MASTER_PORT": str(port + 3)}):
        try:
            with ranks_of_launch() as ranks:
                ranks.barrier()
                raise InputError("any error")
        except InputError:
            results["error destroyed"] = not dist.is_initialized()
    with alone_with(torchrun | {"MASTER_PORT": str(port + 4)}):
        dist.init_process_group("gloo")
        with ranks_of_launch() as ranks:
            results["existing"] = found(ranks, rank)
        results["existing kept"] = dist.is_initialized()
    return results


def alone_with(variables: dict[str, str]) -> Any:
    """Context with these variables and none that the pool has set of the place of a rank."""
    kept = {name: value for name, value in os.environ.items() if name not in (*PLACE, "TORCHELASTIC_USE_AGENT_STORE")}
    return mock.patch.dict(os.environ, kept | variables, clear=True)


def found(ranks: Any, rank: str) -> dict[str, Any]:
    """What this rank and the other one find together."""
    sums = ranks.sum({"x": torch.tensor([float(rank), 1.0], dtype=torch.bfloat16), "n": torch.tensor(3)})
    first = ranks.from_first([torch.full((2, 3), float(rank)) + 7, torch.tensor(rank == "1"), torch.zeros(0)])
    return {
        "ranks": list(ranks),
        "sum": sums["x"].tolist(),
        "n": int(sums["n"]),
        "any": [ranks.any(flag) for flag in (False, rank == "1", True)],
        "first": [x.tolist() for x in first],
        "text": ranks.text_from_first("from the first: \u00e9" if rank == "0" else "another"),
        "dealt": [list(dealt) for dealt in ranks.deal(range(5))],
        "none": list(ranks.deal([])),
    }
