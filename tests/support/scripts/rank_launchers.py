"""Joins a process group as each launcher says it, and one that exists already: rank_launchers.py RANK PORT.

Prints a line of JSON for each launcher: the ranks, and what they found together.
"""

import json
import os
import sys

import torch
import torch.distributed as dist

from minitune.errors import InputError
from minitune.programs.run_ranks import ranks_of_launch

rank, port = sys.argv[1], int(sys.argv[2])
address = {"MASTER_ADDR": "127.0.0.1"}
LAUNCHERS = {
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
ours = {name for variables in LAUNCHERS.values() for name in variables} | {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"}


def found(ranks: object) -> dict[str, object]:
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


results = {}
for name, variables in LAUNCHERS.items():
    for variable in ours:
        os.environ.pop(variable, None)
    os.environ.update(variables)
    with ranks_of_launch() as ranks:
        results[name] = found(ranks)
    results[f"{name} destroyed"] = not dist.is_initialized()
os.environ.update({**LAUNCHERS["torchrun"], "MASTER_PORT": str(port + 3)})
try:
    with ranks_of_launch() as ranks:
        raise InputError("any error")
except InputError:
    results["error destroyed"] = not dist.is_initialized()
os.environ["MASTER_PORT"] = str(port + 4)
dist.init_process_group("gloo")
with ranks_of_launch() as ranks:
    results["existing"] = found(ranks)
results["existing kept"] = dist.is_initialized()
dist.destroy_process_group()
print(json.dumps(results))
