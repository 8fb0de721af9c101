"""Ranks from the environment: which process of a run this one is, as its launcher says it.

torchrun, Azure ML, Kubeflow and Ray set RANK and WORLD_SIZE, Open MPI its OMPI_ names, and srun its
SLURM_ names. Nothing here imports torch.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from minitune.errors import InputError, quoted

MASTER = "set MASTER_ADDR and MASTER_PORT to the host of rank 0 and a free port of it"
DEFAULT_PORT = 29500  # as torchrun's


class Launched(NamedTuple):
    """Place of this process among those that a launcher has started for one run."""

    rank: int = 0  # among all
    size: int = 1  # how many there are
    local_rank: int = 0  # on this node
    address: str = "127.0.0.1"  # of rank 0
    port: int = DEFAULT_PORT  # at which rank 0 answers
    gpus_per_task: int = 0  # that the launcher shows this process alone; 0: it says none

    def variables(self) -> dict[str, str]:
        """Environment variables by which torch.distributed finds the others (`env://`)."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def launched(variables: Mapping[str, str]) -> Launched:
    """Place of the process with these environment variables; rank 0 of 1 where none started
    several.

    RANK and WORLD_SIZE decide before the names of Open MPI, and these before those of SLURM.
    InputError for variables that contradict each other or say too little.
    """
    if {"RANK", "WORLD_SIZE"} <= variables.keys() or _size(variables, "WORLD_SIZE") > 1:
        return _checked(_of_torchrun(variables))
    if "OMPI_COMM_WORLD_RANK" in variables:
        return _checked(_of_open_mpi(variables))
    # the script of a batch job has SLURM_NTASKS as well: only a step of srun is started many times
    if "SLURM_STEP_ID" in variables and "SLURM_PROCID" in variables:
        return _checked(_of_slurm(variables))
    if _size(variables, "PMI_SIZE") > 1:
        raise InputError(
            f"launch: PMI_SIZE is {variables['PMI_SIZE']}, which mpiexec sets, expected a launcher "
            f"whose variables say the rank: torchrun, srun or Open MPI's mpirun"
        )
    return Launched()


def _of_torchrun(variables: Mapping[str, str]) -> Launched:
    size = _number(variables, "WORLD_SIZE", "RANK")
    rank = _number(variables, "RANK", "WORLD_SIZE")
    # absent where each node runs one process
    local_rank = _number(variables, "LOCAL_RANK", "RANK") if "LOCAL_RANK" in variables else 0
    if size == 1:
        return Launched(rank, size, local_rank)
    return Launched(rank, size, local_rank, *_master(variables))


def _of_open_mpi(variables: Mapping[str, str]) -> Launched:
    names = [f"OMPI_COMM_WORLD_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK")]
    rank, size, local_rank = (_number(variables, name, "OMPI_COMM_WORLD_RANK") for name in names)
    if size == 1:
        return Launched(rank, size, local_rank)
    if "MASTER_ADDR" in variables:
        return Launched(rank, size, local_rank, *_master(variables))
    # Azure ML's name for the host of rank 0 and its port
    node = variables.get("AZ_BATCH_MASTER_NODE", "")
    if node:
        address, _, port = node.rpartition(":")
        return Launched(rank, size, local_rank, address or node, _port(port, node))
    if variables.get("OMPI_COMM_WORLD_LOCAL_SIZE") != str(size):
        raise InputError(
            f"launch: mpirun has started {size} processes on several nodes, and nothing says where "
            f"rank 0 runs, expected MASTER_ADDR; {MASTER}"
        )
    return Launched(rank, size, local_rank)


def _of_slurm(variables: Mapping[str, str]) -> Launched:
    names = "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"
    rank, size, local_rank = (_number(variables, name, "SLURM_STEP_ID") for name in names)
    if size == 1:
        return Launched(rank, size, local_rank)
    # of srun --gpus-per-task, which binds each task to its own: "1" or "h100:1"
    _, _, per_task = variables.get("SLURM_GPUS_PER_TASK", "").rpartition(":")
    n_gpus = int(per_task) if per_task.isdecimal() else 0
    if "MASTER_ADDR" in variables:
        return Launched(rank, size, local_rank, *_master(variables), n_gpus)
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        raise InputError(
            f"launch: srun has started {size} processes, and neither SLURM_STEP_NODELIST nor "
            f"SLURM_JOB_NODELIST says where, expected a list of nodes; {MASTER}"
        )
    # steps of two jobs may share a node, and ports below 15000 are often taken
    port = 15000 + _number(variables, "SLURM_JOB_ID", "SLURM_STEP_ID") % 20000
    return Launched(rank, size, local_rank, first_node(nodes), port, n_gpus)


def first_node(nodes: str) -> str:
    """First host of a list as SLURM writes it: gpu003 of "gpu[003-004,7],cpu1"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None, "the pattern matches the empty text too"
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())


def _master(variables: Mapping[str, str]) -> tuple[str, int]:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not variables.get(name)]
    if missing:
        raise InputError(
            f"launch: several processes were started without {' and '.join(missing)}, expected "
            f"both; {MASTER}, or start the run with torchrun or --ranks"
        )
    return variables["MASTER_ADDR"], _port(variables["MASTER_PORT"], "MASTER_PORT")


def _port(text: str, place: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        found = f"launch: {place} gives the port {quoted(text)}"
        raise InputError(f"{found}, expected a number from 1 to 65535; correct it")
    return int(text)


def _size(variables: Mapping[str, str], name: str) -> int:
    text = variables.get(name, "").strip()
    return int(text) if text.isdecimal() else 1


def _number(variables: Mapping[str, str], name: str, because_of: str) -> int:
    text = variables.get(name, "").strip()
    if not text.isdecimal():
        found = f"{name} is {quoted(text)}" if text else f"{because_of} is set without {name}"
        raise InputError(
            f"launch: {found}, expected a number from 0 on, as a launcher sets it; "
            "unset both to run one process"
        )
    return int(text)


def _checked(one: Launched) -> Launched:
    if not one.rank < one.size:
        raise InputError(
            f"launch: this is rank {one.rank} of {one.size} processes, expected a rank below their "
            "number; correct what sets the variables"
        )
    return one
