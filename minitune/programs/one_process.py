"""Refusal of a launcher that starts several processes, each of which would train the whole job."""

import os

from minitune.errors import InputError

# variable that says how many processes there are -> what sets it
WORLD_SIZES = {
    "WORLD_SIZE": "torchrun or accelerate",
    "SLURM_NTASKS": "Slurm",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}


def require_one_process() -> None:
    """InputError where a launcher has started several processes; a world of one is none."""
    for name, launcher in WORLD_SIZES.items():
        size = os.environ.get(name, "").strip()
        if size.isdecimal() and int(size) > 1:
            ask = "ask for one task (--ntasks=1)" if name == "SLURM_NTASKS" else f"unset {name}"
            raise InputError(
                f"minitune: {name} is {size}, which {launcher} sets, expected one process; "
                f"start it without torchrun, srun or mpirun, or {ask}"
            )
