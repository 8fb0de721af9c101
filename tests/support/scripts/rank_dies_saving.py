"""Rank of a run that saves a state, and then another one, amid which the process of one rank ends: FOLDER RANK HOW."""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

from minitune.checkpoint.state import save_state
from minitune.checkpoint.state_writer import state_writer
from minitune.errors import RankLostError
from minitune.sharding.mesh import device_mesh
from minitune.sharding.placements import shard_leaf
from minitune.sharding.ranks import Ranks

FOLDER, DYING, IN_BACKGROUND = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "in-background"


class Ending:
    """Hash whose third piece the process does not survive."""

    def __init__(self) -> None:
        self.n = 0

    def update(self, _: object) -> None:
        """Count a piece."""
        self.n += 1
        if self.n == 3:
            os._exit(0)  # well, so that the other rank is not ended too


dist.init_process_group("gloo")
ranks = Ranks(dist.get_rank(), dist.get_world_size())
mesh = device_mesh({"data": 2}, "cpu")
state: Any = {name: shard_leaf(torch.arange(35.0).view(7, 5), (Shard(0),), mesh) for name in "abc"}
save_state(FOLDER, 1, state, {}, ranks=ranks)
if ranks.rank == DYING:
    hashlib.sha256 = lambda *_: Ending()  # type: ignore[assignment]
try:
    with state_writer(ranks, in_background=IN_BACKGROUND) as writer:
        assert writer is not None
        writer.save(FOLDER, 2, state, {}, None)
    print("saved", flush=True)
except RankLostError:
    print("lost a rank", flush=True)
os._exit(0)
