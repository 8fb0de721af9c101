"""Training states that ranks save and load, in parts that are drawn by name and seed."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minitune import tree
from minitune.algorithms.objective import split_trainable
from minitune.checkpoint.state import list_states, load_state, save_state
from minitune.checkpoint.state_writer import state_writer
from minitune.models.weights import dims
from minitune.quant.tensors import QInt8
from minitune.sharding.mesh import device_mesh
from minitune.sharding.parts import is_sharded, local_parts
from minitune.sharding.placements import Plan, shard, shard_leaf
from minitune.sharding.ranks import Ranks
from minitune.types import Delta
from support.faults import Faults
from support.models import SMALL, random_params
from support.sharded import Case, step_of

# (mesh, dim that each axis of it cuts where a leaf has it, None for copies)
LAYOUTS: dict[str, tuple[Mapping[str, int], tuple[int | None, ...]]] = {
    "dp of 2": ({"data": 2}, (None,)),
    "rows of 2": ({"data": 2}, (0,)),
    "columns of 3": ({"data": 3}, (1,)),
    "rows of 4": ({"data": 4}, (0,)),
    "columns of 2 pairs": ({"replica": 2, "data": 2}, (None, 1)),
    "rows and columns of 2": ({"data": 2, "model": 2}, (1, 0)),
}


def bits(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Tensor of random bits, infinities and NaN of every kind among them."""
    generator = torch.Generator().manual_seed(seed)
    empty = torch.empty(shape, dtype=dtype)
    raw = torch.randint(0, 256, (empty.numel() * empty.element_size(),), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape) if dtype != torch.bool else (raw > 127).view(shape)


def whole_state(seed: int) -> Any:
    """State with odd sizes, dims of fewer elements than ranks, scalars, codes and leaves without an element."""
    trainable = {
        "w": bits(7, 5, dtype=torch.float32, seed=seed),
        "expert.w": bits(3, 5, 6, dtype=torch.bfloat16, seed=seed + 1),
        "small": bits(3, 2, dtype=torch.float16, seed=seed + 2),
        "norm": bits(11, dtype=torch.float32, seed=seed + 3),
        "q": QInt8(bits(6, 9, dtype=torch.int8, seed=seed + 4), bits(6, 1, dtype=torch.float32, seed=seed + 5)),
        "delta": Delta(bits(2, 9, dtype=torch.float32, seed=seed + 6), bits(13, 2, dtype=torch.float32, seed=seed + 7)),
        "empty": torch.empty(0, 4),
        "mask": bits(5, 3, dtype=torch.bool, seed=seed + 8),
    }
    return {"trainable": trainable, "opt_state": (None, torch.tensor(7 + seed), [bits(1, 1, dtype=torch.float64, seed=seed)])}


def own_state(whole: Any, layout: str) -> Any:
    """Parts of this rank of the matrices of a state; vectors and scalars stay whole."""
    mesh, cuts = LAYOUTS[layout]
    from torch.distributed.tensor import Replicate, Shard

    placed = [Replicate() if cut is None else Shard(cut) for cut in cuts]
    ranks = device_mesh(mesh, "cpu")
    return tree.map(lambda x: shard_leaf(x, placed, ranks) if x.ndim > 1 else x, whole)


def these_ranks() -> Ranks:
    """Ranks of the default process group."""
    return Ranks(dist.get_rank(), dist.get_world_size())


def save_parts(folder: Path, seed: int, layout: str) -> None:
    """Save a state as step `seed`, in the parts of a layout."""
    save_state(folder, seed, own_state(whole_state(seed), layout), {"cursor": [seed]}, None, these_ranks())


def differences(folder: Path, layout: str) -> list[str]:
    """Leaves of all states in a folder that this rank does not get as they were saved, in the parts of a layout."""
    wrong = []
    for path in list_states(folder):
        seed = int(path.name.removeprefix("step-"))
        like = own_state(tree.map(torch.zeros_like, whole_state(seed)), layout)
        wanted = own_state(whole_state(seed), layout)
        state, meta = load_state(path, like, these_ranks())
        if meta["cursor"] != [seed]:
            wrong.append(f"{path}: {meta}")
        for (name, x), y, z in zip(tree.items(state), tree.leaves(wanted), tree.leaves(like), strict=True):
            same_kind = is_sharded(x) == is_sharded(z) and (not is_sharded(x) or x.placements == z.placements)  # pyright: ignore
            if not same_kind or not same_bits(local_parts(x), local_parts(y)):
                wrong.append(f"{path}: {name}")
    return wrong


def same_bits(x: Tensor, y: Tensor) -> bool:
    """True for tensors of one shape, dtype and content, where NaN equals itself."""
    if x.shape != y.shape or x.dtype != y.dtype or not x.is_contiguous():
        return False
    return torch.equal(x.flatten().view(torch.uint8), y.flatten().view(torch.uint8))


def failing_saves(folder: Path, at_rank: int, code: int, in_background: bool) -> list[tuple[str, list[int]]]:
    """(error, steps that are there afterwards) of saves whose k-th operation fails on one rank, for every k."""
    ranks, layout = these_ranks(), "rows of 2"
    outcomes = []
    for k in range(1, 100):
        place = folder / str(k)
        for step in (1, 2):
            save_parts(place, step, layout)
        state, error, faults = own_state(whole_state(3), layout), "", None
        with pytest.MonkeyPatch.context() as patch:
            if ranks.rank == at_rank:
                faults = Faults(patch, k, OSError(code, os.strerror(code)))
            try:
                with state_writer(ranks, in_background=in_background) as writer:
                    assert writer is not None
                    writer.save(place, 3, state, {"cursor": [3]}, 9)
                    state = None  # what is written is a copy
            except (OSError, ValueError) as caught:
                error = f"{type(caught).__name__}: {caught}"
        ranks.barrier()
        steps = [int(path.name.removeprefix("step-")) for path in list_states(place)]
        outcomes.append((error, steps if not differences(place, layout) else []))
        if ranks.any(faults is not None and faults.left > 0):
            return outcomes
    raise AssertionError("every operation failed")


def load_error(folder: Path, layout: str) -> str:
    """What a load of the newest state says on this rank."""
    path = list_states(folder)[-1]
    like = own_state(whole_state(int(path.name.removeprefix("step-"))), layout)
    try:
        load_state(path, like, these_ranks())
    except ValueError as error:
        return str(error)
    return ""


def steps_from(folder: Path, batches: Mapping[int, Any], plan: Plan | None, mesh: Mapping[str, int]) -> list[float]:
    """Losses of the steps of full training that batches hold by number, from the newest state in a folder or the first
    weights; the last step is saved. A batch is cut evenly into the rows of each rank."""
    ranks, case = these_ranks(), Case(SMALL, trains="full")
    params: Any = random_params(SMALL)
    if plan is not None:
        params = shard(params, dims(SMALL), plan, device_mesh(mesh, "cpu"))
    frozen, trainable = split_trainable(params, ("*",))
    step = step_of(case, None, frozen, trainable)
    state = step.init(trainable)
    if found := list_states(folder):
        state, _ = load_state(found[-1], state, ranks)
    losses = []
    for batch in batches.values():
        rows = tree.map(lambda x: x.chunk(ranks.size)[ranks.rank], batch)
        state, metrics = step.update(frozen, state, rows)
        losses.append(float(metrics["loss_nats"]))
    save_state(folder, max(batches), state, {}, None, ranks)
    return losses


def save_apart(folder: Path) -> str:
    """What a save says on ranks that each have a folder of their own."""
    ranks = these_ranks()
    try:
        save_state(folder / str(ranks.rank), 1, {"x": torch.ones(2)}, {}, ranks=ranks)
    except ValueError as error:
        return str(error)
    return ""
