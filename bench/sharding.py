"""Memory of a rank: bytes of parameters and optimizer state, and the peak of the process, by the number of ranks.

python bench/sharding.py [--model configs/models/llama-125m.toml] [--ranks 1 2 4]
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minitune import tree
from minitune.algorithms.objective import split_trainable
from minitune.models import open_config
from minitune.models.weights import dims
from minitune.optim.adamw import AdamW
from minitune.sharding.mesh import device_mesh
from minitune.sharding.parts import local_parts
from minitune.sharding.placements import axis_sizes, placements, shard_leaf
from minitune.sharding.plans import named_plan
from minitune.steps import sft_step
from minitune.types import Batch

TOKENS = 256


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=Path("configs/models/llama-125m.toml"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--store", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.store is not None:
        run_rank(words)
        return
    print("| ranks | parameters and state of a rank, MiB | of one process | peak of a rank, MiB |\n|---|---|---|---|")
    alone = None
    for n in words.ranks:
        rows = [list(map(float, line.split())) for line in outputs(words.model, n)]
        held, peak = (max(column) for column in zip(*rows, strict=True))
        alone = alone or held
        print(f"| {n} | {held:,.0f} | {held / alone:.3f} | {peak:,.0f} |", flush=True)


def outputs(model: Path, n: int) -> list[str]:
    """What each of n ranks prints."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--model", str(model), "--store", f"{folder}/store"]
        started = [
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(n), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            )
            for rank in range(n)
        ]
        printed = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            raise SystemExit("bench: a rank failed; its error is above")
        return printed


def run_rank(words: Any) -> None:
    """Train two steps of all weights on this rank, and print MiB: what it holds, and its peak."""
    rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{words.store}", rank=rank, world_size=n)
    mesh, plan = device_mesh({"data": n}, "cpu"), named_plan("fsdp")
    model = open_config(words.model)._replace(n_remat=10_000)
    shapes, meaning = model.shapes(), dims(model.config)
    generator = torch.Generator().manual_seed(0)
    params: dict[str, Any] = {}
    for name, shape in shapes.items():  # one whole leaf at a time
        whole = 0.02 * torch.randn(shape, generator=generator)
        params[name] = shard_leaf(whole, placements(name, shape, meaning[name], plan, axis_sizes(mesh)), mesh)
    frozen, trainable = split_trainable(params, ("*",))
    del params
    step = sft_step(model, None, AdamW(lr=1e-4), donate=True)
    state = step.init(trainable)
    del trainable
    tokens = torch.randint(model.config.vocab_size, (1, TOKENS), generator=generator)
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.int32), torch.ones_like(tokens, dtype=torch.bool))
    for _ in range(2):
        state, _ = step.update(frozen, state, batch)
    held = sum(part.untyped_storage().nbytes() for part in tree.leaves(local_parts(state)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(held / 2**20, peak / 2**20)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
