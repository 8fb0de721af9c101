"""Rank of a run that saves a state, and then another one, amid which the process of one rank ends: FOLDER RANK."""

import hashlib
import os
import sys
from pathlib import Path

import torch.distributed as dist

from minitune.errors import RankLostError
from support.sharded_states import save_parts

folder, dying = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo")
save_parts(folder, 1, "rows of 2")
if dist.get_rank() == dying:

    class Ending:
        """Hash whose third piece the process does not survive."""

        def __init__(self) -> None:
            self.n = 0

        def update(self, _: object) -> None:
            """Count a piece."""
            self.n += 1
            if self.n == 3:
                os._exit(0)  # well, so that the other one is not ended too

    hashlib.sha256 = lambda *_: Ending()  # type: ignore[assignment]
try:
    save_parts(folder, 2, "rows of 2")
    print("saved", flush=True)
except RankLostError:
    print("lost a rank", flush=True)
os._exit(0)
