"""Peak memory and time of one LoRA gradient: minitune's value_and_grad against bare torch.autograd.grad and torch.func.

    python bench/grad_memory.py [n_layers] [d_model]

Each way runs in a process of its own, on the same random Llama, batch 4 x 256, float32, rank 8 on all linears.
Memory is the peak of the process above its peak before the gradient.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from minitune import host, tree
from minitune.autodiff.value_and_grad import value_and_grad
from minitune.lora import Lora
from minitune.losses.token import CrossEntropy
from minitune.models import Model
from minitune.models.families import llama
from minitune.types import Batch, Mean

REPEATS = 5


def bare(total: Callable, deltas: tree.Tree) -> tree.Tree:
    leaves = [x.detach().requires_grad_() for x in tree.leaves(deltas)]
    return torch.autograd.grad(total(tree.rebuild(deltas, leaves)).total, leaves)


WAYS = {
    "torch.autograd.grad": bare,
    "minitune value_and_grad": lambda total, deltas: value_and_grad(total)(deltas),
    "torch.func.grad_and_value": lambda total, deltas: torch.func.grad_and_value(lambda d: total(d).total)(deltas),
}


def peak_mib() -> float:
    return host.peak_bytes() / 2**20


def measure(way: str, n_layers: int, d_model: int) -> dict[str, float]:
    config = llama.Config(
        n_layers=n_layers,
        n_heads=d_model // 64,
        n_kv_heads=d_model // 64,
        d_model=d_model,
        d_head=64,
        d_ff=d_model * 8 // 3,
        vocab_size=8192,
    )
    model = Model(llama.FAMILY, config)
    params = model.init(0)
    rule = Lora(8, 16.0, ("*_proj.weight",))
    tokens = torch.randint(0, 8192, (4, 256), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.int32), torch.ones_like(tokens, dtype=torch.bool))

    def total(deltas: tree.Tree) -> Mean:
        return Mean.of(model.token_losses(rule.apply(params, deltas), batch, CrossEntropy()), batch.target_mask())

    deltas = rule.init(params, 0)
    before, times = peak_mib(), []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        WAYS[way](total, deltas)
        times.append(time.perf_counter() - started)
    return {"peak_mib": peak_mib() - before, "time_s": statistics.median(times[1:]), "spread_s": max(times[1:]) - min(times[1:])}


def main() -> None:
    shape = [int(word) for word in sys.argv[1:3]] or [6, 512]
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[3], *shape)))
        return
    rows = {}
    for way in WAYS:
        words = [sys.executable, __file__, *map(str, shape), way]
        rows[way] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    base = rows["torch.autograd.grad"]
    print(f"{shape[0]} layers, d_model {shape[1]}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| way | peak above base, MiB | ratio | time, s (median of 5) | spread, s | ratio |\n|---|---|---|---|---|---|")
    for way, row in rows.items():
        ratios = [row[key] / base[key] for key in ("peak_mib", "time_s")]
        print(
            f"| {way} | {row['peak_mib']:.0f} | {ratios[0]:.2f} | {row['time_s']:.2f} | {row['spread_s']:.2f} | {ratios[1]:.2f} |"
        )


if __name__ == "__main__":
    main()
