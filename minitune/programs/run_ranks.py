"""Ranks of a run: how its processes find one another, and what the others learn of the first."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import msgspec
import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.rendezvous import rendezvous

from minitune import hardware
from minitune.errors import InputError, cut
from minitune.io import locks
from minitune.io.results import Record
from minitune.launch.ranks import Launched, launched
from minitune.planning.mesh import Mesh, mesh_under
from minitune.programs.ended import Ended
from minitune.programs.log import Log, LogConfig
from minitune.programs.model_paths import models_of
from minitune.programs.offloading import refuse_plan
from minitune.programs.program import Program
from minitune.programs.run_folder import Run
from minitune.programs.state import PipelineStage, PipelineState, RankedStage
from minitune.sharding.mesh import n_sharers
from minitune.sharding.ranks import ALONE, TIMEOUT, Ranks

# of processes that a launcher starts together, on nodes that may not be ready at the same time
MEETING = timedelta(minutes=15)
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # flags of the run travel over gloo


class _Opened(msgspec.Struct, frozen=True):
    """Run folder that the first rank has opened, as it tells the others of it."""

    folder: str
    resumed: bool
    records: dict[str, Record]
    summary: Record | None
    ended: dict[str, Ended]


@contextmanager
def ranks_of_launch() -> Iterator[Ranks]:
    """Ranks of this run, by the process group that exists or by what a launcher has set.

    A group that is made here is destroyed at the end, also after an error. InputError for variables
    of a launcher that say too little, and for a node with fewer GPUs than ranks.
    """
    if dist.is_available() and dist.is_initialized():
        local_rank = launched({"RANK": "0", "WORLD_SIZE": "1", **os.environ}).local_rank
        yield Ranks(dist.get_rank(), dist.get_world_size(), local_rank)
        return
    place = launched(os.environ)
    if place.size == 1:
        yield ALONE
        return
    accelerator = hardware.accelerator() or "cpu"
    _take_device(place, accelerator)
    os.environ.update(place.variables())
    _join(place, BACKENDS[accelerator])
    try:
        yield Ranks(place.rank, place.size, place.local_rank)
    finally:
        # after an error the other ends may be gone
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _join(place: Launched, backend: str) -> None:
    """Make the process group; InputError where the ranks don't meet in time at the host and port of
    the first."""
    keys = [f"rank {i} is here" for i in range(place.size)]
    store: Any = None
    try:
        store, _, _ = next(rendezvous("env://", timeout=MEETING))
        store.set(keys[place.rank], "yes")
        store.wait(keys, MEETING)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise InputError(_not_met(place, store, keys, error)) from None
    store.set_timeout(TIMEOUT)
    how: dict[str, Any] = {"rank": place.rank, "world_size": place.size, "timeout": TIMEOUT}
    dist.init_process_group(backend, store=store, **how)


def _not_met(place: Launched, store: Any, keys: Sequence[str], error: Exception) -> str:
    """Sentence on ranks that have not met."""
    where = f"MASTER_ADDR {place.address} and MASTER_PORT {place.port}"
    minutes = f"{MEETING.total_seconds() / 60:.0f} minutes"
    if store is not None:
        return (
            f"launch: within {minutes} rank {place.rank} has not met {_absent(store, keys)} of "
            f"{place.size} at {where}, expected all of them; look whether they were started, and "
            "with the same address, port and number of ranks"
        )
    if "EADDRINUSE" in str(error):
        return (
            f"launch: rank {place.rank} can't answer at {where}: another process has that port, "
            "expected a free one; set MASTER_PORT to another number for all ranks"
        )
    if place.rank == 0:
        return (
            f"launch: within {minutes} rank 0 has not met all {place.size} ranks at {where} "
            f"({cut(str(error))}), expected them there; look whether they were started, and with "
            "the same address, port and number of ranks"
        )
    return (
        f"launch: rank {place.rank} of {place.size} can't reach {where} within {minutes} "
        f"({cut(str(error))}), expected the host of rank 0 and a free port of it; correct them"
    )


def _absent(store: Any, keys: Sequence[str]) -> str:
    """Ranks that have not come, in words: the first one where its store is gone."""
    try:
        missing = [str(i) for i, key in enumerate(keys) if not store.check([key])]
    except dist.DistError:
        missing = ["0"]
    return f"rank {', '.join(missing)}"


def _take_device(place: Launched, accelerator: str) -> None:
    """Make the GPU of this rank the one that "cuda" means."""
    if accelerator not in BACKENDS:
        raise InputError(
            f"launch: {place.size} processes on a device of type {accelerator}, expected cpu or "
            "cuda, for which torch can exchange tensors; start one process"
        )
    if accelerator != "cuda":
        return
    n_devices = torch.cuda.device_count()
    if n_devices == place.gpus_per_task == 1:  # the one that it sees is its own
        torch.cuda.set_device(0)
        return
    if place.local_rank >= n_devices:
        raise InputError(
            f"launch: local rank {place.local_rank} on a node with {n_devices} GPUs, expected one "
            "for each process; start as many processes a node as it has GPUs"
        )
    torch.cuda.set_device(place.local_rank)


def run_for_all(ranks: Ranks, run: Run | None) -> Run:
    """Run folder that the first rank has opened, for every rank; the lock stays with the first."""
    text = ""
    if run is not None:
        own = run.folder, run.resumed, run.records, run.summary, dict(run.ended)
        text = msgspec.json.encode(_Opened(str(own[0]), *own[1:])).decode()
    text = ranks.text_from_first(text)
    if run is not None:
        return run
    opened = msgspec.json.decode(text, type=_Opened)
    folder = Path(opened.folder)
    nobody = locks.Lock(None, locks.holder_file(folder))
    return Run(folder, opened.resumed, opened.records, (), nobody, opened.summary, opened.ended)


@contextmanager
def log_for(ranks: Ranks, run: Run, config: LogConfig, program: dict[str, Any]) -> Iterator[Log]:
    """Log of a run; of another rank than the first one that nobody sees and that has no file."""
    if ranks.is_first:
        with Log(run.folder, config, program) as log:
            yield log
        return
    with _nowhere() as nowhere:
        console = Console(file=nowhere, force_terminal=False)
        with Log(None, LogConfig(every=config.every), program, console) as log:
            yield log


def stages_on_ranks(program: Program, ranks: Ranks) -> tuple[PipelineStage, ...]:
    """Stages of a program as its ranks run them together; InputError for one that they can't, and
    for models that are cut as well as offloaded.
    """
    if any(model.offload is not None for model in models_of(program.model, program.stage)):
        refuse_plan(program.plan)
    if ranks.size == 1:
        return program.stage
    is_sharded = program.divides_model
    # ranks that work on the same rows have the same micro-batches; a mesh of more ranks than were
    # started is refused a little later
    n_shares = max(1, ranks.size // n_sharers(program.mesh))
    return tuple(_on_ranks(stage, n_shares, is_sharded) for stage in program.stage)


def _on_ranks(stage: PipelineStage, n_ranks: int, is_sharded: bool) -> PipelineStage:
    if is_sharded and not stage.shards:
        raise InputError(
            f"stages: {stage.label} needs the whole model on every rank, and plan or mesh divides "
            'it, expected plan = "dp" and rows on all axes; or do this in a program of its own, '
            "after a save"
        )
    if isinstance(stage, RankedStage):
        return stage.on_ranks(n_ranks, is_sharded=is_sharded)
    return stage


def backend_for(device_type: str) -> str:
    """Name of what tensors on a type of device travel by, such as gloo or nccl."""
    backends = str(dist.get_backend_config())  # such as cpu:gloo,cuda:nccl
    return dict(part.split(":") for part in backends.split(",")).get(device_type, backends)


def planned_mesh(program: Program, ranks: Ranks) -> Mesh:
    """Mesh and plan by which the memory of a rank is planned: those of the program; a single
    process holds everything.
    """
    if ranks.size == 1:
        return Mesh()
    return mesh_under(program.mesh or {"data": ranks.size}, program.plan)


def runs_everywhere(stage: PipelineStage, state: PipelineState) -> bool:
    """True for a stage that every rank runs: one that changes the model, or needs whole weights
    where each rank has parts. What else observes the model is the first rank's work.
    """
    if state.ranks.size == 1 or not stage.observes:
        return True
    return stage.gathers and state.sharding is not None


def with_first_records(state: PipelineState) -> PipelineState:
    """State with the records of the first rank, for which every rank waits here."""
    records = state.ranks.text_from_first(msgspec.json.encode(state.records).decode())
    return state if state.ranks.is_first else state._replace(records=msgspec.json.decode(records))


def _nowhere() -> IO[str]:
    return open(os.devnull, "w", encoding="utf-8")
