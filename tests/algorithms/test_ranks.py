"""Several processes take the step that one process takes on all their rows."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from minitune import tree
from minitune.algorithms.supervised import sft
from minitune.lora import Lora
from minitune.models import Model
from minitune.models.families import llama
from minitune.optim.sgd import SGD
from minitune.sharding.collectives import sum_over_ranks
from minitune.steps import train_step
from minitune.types import Batch, Mean, TrainState
from support.models import SMALL, random_batch, random_params

RULE = Lora(rank=2, alpha=4.0, targets=("*.self_attn.*_proj.weight",))
OPTIMIZER = SGD(lr=0.5)


def one_step(batch: Batch) -> tree.Tree:
    params = random_params(SMALL)
    deltas = RULE.init(params, 0)
    step = train_step(sft(Model(llama.FAMILY, SMALL), RULE), OPTIMIZER, micro_batch=1)
    return step.update(params, TrainState(deltas, OPTIMIZER.init(deltas)), batch)


def rows_of_rank(batch: Batch, rank: int, world_size: int) -> Batch:
    """Uneven on purpose: rank 0 has one row, and on the last rank every token is masked."""
    cuts = [0, 1, *range(3, 3 + world_size - 2), batch.tokens.shape[0]]
    rows = tree.map(lambda x: x[cuts[rank] : cuts[rank + 1]], batch)
    return rows._replace(loss_mask=torch.zeros_like(rows.loss_mask)) if rank == world_size - 1 else rows


def run_rank(rank: int, world_size: int, port: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    (new, _), metrics = one_step(rows_of_rank(random_batch(SMALL, 6, 11), rank, world_size))
    mean = sum_over_ranks(Mean(torch.tensor(float(rank)), torch.tensor(1.0)))
    torch.save({**dict(tree.items((new, metrics))), "mean": mean.value()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_step_on_uneven_ranks_equals_one_process(world_size: int, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run_rank, args=(world_size, port, tmp_path), nprocs=world_size)
    batch = random_batch(SMALL, 6, 11)
    masks = [rows_of_rank(batch, rank, world_size).loss_mask for rank in range(world_size)]
    (new, _), metrics = one_step(batch._replace(loss_mask=torch.cat(masks)))
    wanted = dict(tree.items((new, metrics)))
    for rank in range(world_size):
        on_rank = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert float(on_rank.pop("mean")) == pytest.approx((world_size - 1) / 2)
        assert on_rank.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(on_rank[name], wanted[name], rtol=1e-5, atol=1e-6)
