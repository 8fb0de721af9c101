"""What saving costs a training: steps that wait for it, and a model folder that ranks write from their parts.

    python bench/saving.py steps [--mib 256] [--runs 3]        a save every fourth step, at once and in the background
    python bench/saving.py folder [--model NAME] [--runs 3]    a folder of a model that two ranks hold in bfloat16, half each

Steps are products of matrices on one thread; the writing has another one. Memory is the highest of the process (VmHWM of /proc,
from a new mark on) above what it had before; pages of a mapped file count.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shared_states import highest_memory, mark_memory

from minitune import tree
from minitune.checkpoint.hf_folder import FolderExtras, save_folder
from minitune.checkpoint.state_writer import state_writer
from minitune.io.paths import locate
from minitune.models.open import open_config
from minitune.models.weights import dims
from minitune.sharding.mesh import device_mesh
from minitune.sharding.parts import local_parts
from minitune.sharding.placements import placements, shard_leaf
from minitune.sharding.plans import named_plan
from minitune.sharding.ranks import ALONE, Ranks

MIB = 2**20
N_STEPS, SAVE_EVERY = 16, 4


def steps(mib: int, in_background: bool, folder: Path) -> dict[str, float]:
    """Seconds that training waits for a save, seconds of all steps, and MiB of memory that saving takes."""
    state = {str(i): torch.full((1024, 1024), float(i)) for i in range(mib // 4)}
    x, stalls = torch.randn(1024, 1024), list[float]()
    mark_memory()
    before, start = highest_memory(), time.perf_counter()
    with state_writer(ALONE, in_background=in_background) as writer:
        assert writer is not None
        for step in range(1, N_STEPS + 1):
            for _ in range(mib // 64):
                x = torch.nn.functional.normalize(x @ state["0"] + x)
            if step % SAVE_EVERY == 0:
                begun = time.perf_counter()
                writer.save(folder, step, state, {}, 1)
                stalls.append(time.perf_counter() - begun)
    total = time.perf_counter() - start
    return {"stall": statistics.median(stalls), "total": total, "memory": (highest_memory() - before) / MIB}


def folder_of_parts(name: str, folder: Path) -> dict[str, float]:
    """Seconds and MiB of memory that this rank needs beside its parts, of so many MiB, to write a model folder."""
    dist.init_process_group("gloo")
    ranks, model = Ranks(dist.get_rank(), dist.get_world_size()), open_config(locate(name))
    mesh, plan = device_mesh({"data": ranks.size}, "cpu"), named_plan("fsdp")
    named, params = dims(model.config), dict[str, Any]()
    for i, (key, shape) in enumerate(model.shapes().items()):
        w = torch.full(shape, float(i), dtype=torch.bfloat16)
        params[key] = shard_leaf(w, placements(key, shape, named[key], plan, {"data": ranks.size}), mesh)
    ranks.barrier()
    mark_memory()
    before, start = highest_memory(), time.perf_counter()
    save_folder(folder / "model", params, model, FolderExtras(locate("demo"), []), ranks=ranks)
    ranks.barrier()
    growth, own = highest_memory() - before, tree.n_bytes([local_parts(x) for x in params.values()])
    return {"own": own / MIB, "memory": growth / MIB, "total": time.perf_counter() - start}


def run(words: list[str], n: int) -> list[dict[str, float]]:
    """Figures of fresh processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(n):
        own = {"RANK": str(rank), "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, *words]
        processes.append(subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE))
    return [json.loads(process.communicate()[0]) for process in processes]


def main() -> None:
    """Print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "folder"))
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--model", default="configs/models/llama-3.2-1b.toml")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--background", action="store_true")
    args = parser.parse_args()
    if args.folder is not None:
        one = steps(args.mib, args.background, args.folder) if args.what == "steps" else folder_of_parts(args.model, args.folder)
        sys.stdout.write(json.dumps(one))
        return
    ways = ([], ["--background"]) if args.what == "steps" else ([],)
    for way in ways:
        runs = []
        for _ in range(args.runs):
            with tempfile.TemporaryDirectory() as place:
                words = [args.what, "--mib", str(args.mib), "--model", args.model, "--folder", place, *way]
                runs.append(max(run(words, 1 if args.what == "steps" else 2), key=lambda one: one["memory"]))
        for key in runs[0]:
            values = sorted(one[key] for one in runs)
            print(f"{args.what} {' '.join(way)} {key}: {statistics.median(values):.3f} ({values[0]:.3f} to {values[-1]:.3f})")


if __name__ == "__main__":
    main()
