"""Time and memory of one optimizer step: minitune's donated step against torch.optim, AdamW and Muon.

    python bench/optim.py [elements] [leaves]

All ways take their steps by turns in one process; CPU time, median and spread of 7. Memory is measured in a process for each way.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from minitune import host, tree
from minitune.optim import eight_bit, muon, rounding, transforms
from minitune.optim.adamw import AdamW
from minitune.optim.apply import apply_gradients
from minitune.optim.schedules import Cosine, ScaleBySchedule
from minitune.optim.transforms import Chain, ClipByGlobalNorm

RATES = {"lr": 1e-3, "weight_decay": 0.1}
REPEATS = 7


def random_tree(n: int, leaves: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    n_rows = max(k for k in range(1, math.isqrt(n // leaves) + 1) if n // leaves % k == 0)  # as square as it can be
    return {f"w{i}": torch.randn(n_rows, n // leaves // n_rows, generator=generator).to(dtype) for i in range(leaves)}


def ours(optimizer: object, n: int, leaves: int, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    params, grads = random_tree(n, leaves, dtype), random_tree(n, leaves, dtype)
    states = [optimizer.init(params)]
    one = torch.tensor(1.0)

    def step() -> None:
        norm = tree.norm(grads)
        how = {"divisor": one, "norm": norm, "is_finite": one > 0, "donate": True}
        states[0] = apply_gradients(optimizer, grads, states[0], params, **how)[1]

    return step


def theirs(n: int, leaves: int, kind: type = torch.optim.AdamW, **how: object) -> Callable[[], None]:
    params = [x.requires_grad_() for x in random_tree(n, leaves).values()]
    for p, g in zip(params, random_tree(n, leaves).values(), strict=True):
        p.grad = g
    optimizer = kind(params, **RATES, **how)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def by_definition(n: int, leaves: int) -> Callable[[], None]:
    optimizer, params, grads = chain(), random_tree(n, leaves), random_tree(n, leaves)
    state = optimizer.init(params)
    is_finite = torch.tensor(True)

    def step() -> None:
        updates, after = optimizer.update(tree.map(lambda g: g / 1.0, grads), state, params)
        new = tree.map(lambda p, u: torch.where(is_finite, p + u, p), params, updates)
        tree.donate((params, state), (new, tree.map(lambda old, new: torch.where(is_finite, new, old), state, after)))

    return step


def chain(*more: object, kind: type = AdamW) -> Chain:
    return transforms.chain(ClipByGlobalNorm(1.0), kind(**RATES), ScaleBySchedule(Cosine(), 1000), *more)


WAYS = {
    "torch.optim.AdamW(fused=True) + clip": lambda n, k: theirs(n, k, fused=True),
    "torch.optim.AdamW(foreach=True) + clip": lambda n, k: theirs(n, k, foreach=True),
    "minitune, by definition": by_definition,
    "minitune, donated": lambda n, k: ours(chain(), n, k),
    "minitune adamw8bit": lambda n, k: ours(chain(kind=eight_bit.AdamW8bit), n, k),
    "torch.optim.Muon + clip": lambda n, k: theirs(n, k, torch.optim.Muon),
    "minitune muon": lambda n, k: ours(chain(kind=muon.Muon), n, k),
    "minitune bfloat16, stochastic": lambda n, k: ours(chain(rounding.RoundStochastically(0)), n, k, torch.bfloat16),
}


def main() -> None:
    n, leaves = (int(float(word)) for word in (*sys.argv[1:3], "1e7", "64")[:2])
    if len(sys.argv) == 4:
        before = host.peak_bytes()
        step = WAYS[sys.argv[3]](n, leaves)
        for _ in range(2):
            step()
        print(json.dumps((host.peak_bytes() - before) / 2**20))
        return
    steps = {name: way(n, leaves) for name, way in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for i in range(REPEATS + 1):
        for name, step in steps.items():
            started = time.process_time()
            step()
            times[name] += [time.process_time() - started] if i else []
    base = statistics.median(times["torch.optim.AdamW(fused=True) + clip"])
    print(f"{n:,} elements in {leaves} leaves, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| way | CPU time, ms (median) | spread, ms | ratio | MiB, parameters and gradients included |\n|---|---|---|---|---|")
    for name, spent in times.items():
        words = [sys.executable, __file__, str(n), str(leaves), name]
        mib = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        middle = statistics.median(spent)
        print(f"| {name} | {1e3 * middle:.2f} | {1e3 * (max(spent) - min(spent)):.2f} | {middle / base:.2f} | {mib:.0f} |")


if __name__ == "__main__":
    main()
