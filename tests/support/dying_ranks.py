"""Save of a state amid which the process of a rank ends."""

import hashlib
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

from minitune.checkpoint.state import save_state
from minitune.checkpoint.state_writer import state_writer
from minitune.errors import RankLostError
from minitune.sharding.mesh import device_mesh
from minitune.sharding.placements import shard_leaf
from minitune.sharding.ranks import Ranks


class Ending:
    """Hash whose third piece the process does not survive."""

    def __init__(self, *_: object) -> None:
        self.n = 0

    def update(self, _: object) -> None:
        """Count a piece."""
        self.n += 1
        if self.n == 3:
            os._exit(0)


def save_and_die(folder: Path, dying: int, in_background: bool, told: Path) -> None:
    """Save a state, and then another one, amid which one rank ends; the other one writes what it was told of that to a file."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    mesh = device_mesh({"data": 2}, "cpu")
    state: Any = {name: shard_leaf(torch.arange(35.0).view(7, 5), (Shard(0),), mesh) for name in "abc"}
    save_state(folder, 1, state, {}, ranks=ranks)
    with mock.patch.object(hashlib, "sha256", Ending if ranks.rank == dying else hashlib.sha256):
        try:
            with state_writer(ranks, in_background=in_background) as writer:
                assert writer is not None
                writer.save(folder, 2, state, {}, None)
            outcome = "saved"
        except RankLostError:
            outcome = "lost a rank"
        with told.open("a", encoding="utf-8") as file:
            file.write(f"rank {ranks.rank} {outcome}\n")
        os._exit(0)
