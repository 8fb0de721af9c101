"""Memory and time of saving and loading a training state that ranks share.

    python bench/shared_states.py [--mib 512] [--runs 3]     a state of so many MiB in all, each row in fresh processes

Most memory that a rank had at once (VmHWM of /proc, from a new mark on) above what it had before, against the bytes of its own
parts; pages of a mapped file count. Saving has its parts in memory already, so it needs a share of them more; loading makes them.
Matrices of 4 MiB and a few vectors of 1 MiB that all ranks hold.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard

from minitune import tree
from minitune.checkpoint.state import load_state, save_state
from minitune.sharding.mesh import device_mesh, n_ranks
from minitune.sharding.parts import local_parts
from minitune.sharding.placements import shard_leaf
from minitune.sharding.ranks import Ranks

MIB = 2**20
# what is done, by how many ranks along each axis, and the dim that each axis cuts
ROWS: tuple[tuple[str, Mapping[str, int], tuple[int | None, ...]], ...] = (
    ("save", {"data": 2}, (0,)),
    ("load", {"data": 2}, (0,)),
    ("load", {"data": 2}, (1,)),
    ("load", {"data": 1}, (0,)),
    ("load", {"replica": 2, "data": 2}, (None, 0)),
    ("load", {"data": 4}, (0,)),
)


def state_of(mib: int, mesh: Mapping[str, int], cuts: tuple[int | None, ...]) -> dict[str, Any]:
    """Parts of this rank, made one leaf at a time."""
    ranks = device_mesh(mesh, "cpu")
    placed = [Replicate() if cut is None else Shard(cut) for cut in cuts]
    matrices = {f"layers.{i}.weight": shard_leaf(torch.full((1024, 1024), float(i)), placed, ranks) for i in range(mib // 4)}
    return matrices | {f"layers.{i}.norm": torch.full((MIB // 4,), float(i)) for i in range(4)}


def mark_memory() -> None:
    """Let the highest memory of this process begin anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def highest_memory() -> int:
    """Most bytes of this process since the mark."""
    return 1024 * int(re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text("utf-8"), re.MULTILINE)[0])


def measured(row: int, mib: int, folder: Path) -> dict[str, float]:
    """Figures of this rank."""
    kind, mesh, cuts = ROWS[row]
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    state = state_of(mib, mesh, cuts)
    # once, so that what is imported and allocated at the first call is there
    save_state(folder / f"small-{row}", 1, {"x": torch.zeros(4, 4)}, {}, ranks=ranks)
    load_state(folder / f"small-{row}" / "step-00000001", {"x": torch.zeros(4, 4)}, ranks)
    ranks.barrier()
    mark_memory()
    before, start = highest_memory(), time.perf_counter()
    if kind == "save":
        save_state(folder, 1, state, {}, None, ranks)
    else:
        loaded, _ = load_state(folder / "step-00000001", state, ranks)
    time_s, growth = time.perf_counter() - start, highest_memory() - before
    if kind == "load":
        assert all(
            torch.equal(x, y) for x, y in zip(map(local_parts, loaded.values()), map(local_parts, state.values()), strict=True)
        )
    own = tree.n_bytes([local_parts(x) for x in state.values()])
    return {"own": own / MIB, "growth": growth / MIB, "time_s": time_s}


def run_row(row: int, mib: int, folder: Path) -> list[dict[str, float]]:
    """Figures of each rank of a row, in fresh processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    n, processes = n_ranks(ROWS[row][1]), []
    for rank in range(n):
        own = {"RANK": str(rank), "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--row", str(row), "--mib", str(mib), "--folder", str(folder)]
        processes.append(subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE))
    outputs = [process.communicate()[0] for process in processes]
    return [json.loads(output) for output in outputs]


def main() -> None:
    """Print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--row", type=int)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.row is not None:
        sys.stdout.write(json.dumps(measured(args.row, args.mib, args.folder)))
        return
    columns = ("what", "mesh, cuts", "own parts, MiB", "more memory, MiB", "ratio, worst rank", "time, s", "spread, s")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with tempfile.TemporaryDirectory() as folder:
        for row, (kind, mesh, cuts) in enumerate(ROWS):
            runs = [run_row(row, args.mib, Path(folder)) for _ in range(args.runs)]
            worst = [max(ranks, key=lambda one: one["growth"] / one["own"]) for ranks in runs]
            times = [max(one["time_s"] for one in ranks) for ranks in runs]
            growth = statistics.median(one["growth"] for one in worst)
            ratio = statistics.median(one["growth"] / one["own"] for one in worst)
            print(
                f"| {kind} | {dict(mesh)}, {cuts} | {worst[0]['own']:.0f} | {growth:.1f} | {ratio:.3f} |"
                f" {statistics.median(times):.2f} | {max(times) - min(times):.2f} |"
            )


if __name__ == "__main__":
    main()
