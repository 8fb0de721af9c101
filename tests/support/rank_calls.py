"""Functions by which the pool of ranks is tested."""

import time

import torch
import torch.distributed as dist


def sum_of(x: float) -> tuple[int, int, float]:
    """(rank, ranks, sum over all of rank + x)."""
    total = torch.tensor(dist.get_rank() + x)
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), float(total)


def fail_on(rank: int) -> None:
    """Raise on one rank while the others wait for it in a collective."""
    if dist.get_rank() == rank:
        raise ValueError("this one")
    dist.all_reduce(torch.zeros(1))


def wait_for_rank_1() -> None:
    """Wait on rank 0 in a collective that rank 1 takes no part in."""
    if dist.get_rank() == 1:
        time.sleep(600)
    dist.all_reduce(torch.zeros(1))
