"""Adapters trained at once against the same adapters one after another, and gradients of single examples against a loop.

    python bench/sweep.py [compile] [accelerator]

Random Llamas, LoRA of rank 8 on all linears, AdamW with clipping; whole optimizer steps, half of the tokens labelled. Both ways
take their steps by turns in one process; CPU time (on a GPU wall time), median and spread of 5. "of the limit": the time that the
matmuls of the frozen weights would take at the rate of a large one, measured between the steps, over what a way takes. With
"compile" the first case of each model is taken with compiled blocks as well, and the better of both counts for either way.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from roof import card, synchronize

from minitune import hardware, tree
from minitune.algorithms import sweep
from minitune.algorithms.supervised import sft
from minitune.autodiff.value_and_grad import per_example, value_and_grad
from minitune.lora import Lora
from minitune.losses.token import CrossEntropy
from minitune.models import Model
from minitune.models.compile import wrap
from minitune.models.families import llama
from minitune.optim.adamw import AdamW
from minitune.optim.transforms import ClipByGlobalNorm, chain
from minitune.programs.allocator import keep_freed
from minitune.steps import train_step
from minitune.types import Batch, TrainState

RULE = Lora(8, 16.0, ("*_proj.weight",))
REPEATS = 5
CASES = [  # d_model, layers, vocabulary; dtype; adapters, rows, tokens: the first of each is compiled where that is asked for
    ((256, 6, 8192), torch.float32, [(8, 1, 96), (8, 1, 24), (2, 1, 96), (4, 1, 256), (2, 4, 256)]),
    ((256, 6, 8192), torch.bfloat16, [(8, 1, 96), (16, 1, 32), (4, 1, 256), (2, 4, 256)]),
    ((64, 4, 1024), torch.float32, [(8, 1, 96), (8, 1, 24), (2, 4, 256)]),
    ((64, 4, 1024), torch.bfloat16, [(8, 1, 96)]),
    ((512, 3, 32000), torch.float32, [(4, 1, 128)]),
    ((512, 3, 32000), torch.bfloat16, [(4, 1, 128), (3, 2, 200)]),
]


def shape(d_model: int, n_layers: int, vocab_size: int) -> llama.Config:
    heads = max(1, d_model // 64)
    sizes = {"n_heads": heads, "n_kv_heads": heads, "d_head": d_model // heads, "d_ff": d_model * 8 // 3}
    return llama.Config(n_layers=n_layers, d_model=d_model, vocab_size=vocab_size, **sizes)


def both(
    config: llama.Config, n: int, rows: int, length: int, dtype: torch.dtype, compile_blocks: bool, device: str
) -> dict[str, Callable]:
    model = Model(llama.FAMILY, config)
    params = {name: w.to(device, dtype) for name, w in model.init(0).items()}
    tokens = torch.randint(0, config.vocab_size, (n, rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    target_mask = torch.arange(length, device=device).expand_as(tokens) >= length // 2
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.int32), target_mask)
    optimizers = [chain(ClipByGlobalNorm(1.0), AdamW(lr=1e-3 * (i + 1))) for i in range(n)]
    deltas = [RULE.init(params, i) for i in range(n)]
    stacked = sweep.stack(deltas)
    single, folded = (model._replace(block_transform=wrap(print)) if compile_blocks else model for _ in range(2))
    alone = [train_step(sft(single, RULE), o, micro_batch=rows, donate=True) for o in optimizers]
    states = [o.init(d) for o, d in zip(optimizers, deltas, strict=True)]
    alone_states = [step.init(d) for step, d in zip(alone, deltas, strict=True)]
    step = sweep.sweep_step(folded, CrossEntropy(), [RULE] * n, optimizers, micro_batch=rows, donate=True)

    def loop() -> None:
        for i in range(n):
            alone[i].update(params, alone_states[i], Batch(*(x[i] for x in batch)))

    return {"one after another": loop, "at once": lambda: step.update(params, TrainState(stacked, states), batch)}


def examples(config: llama.Config, n: int, length: int, device: str) -> dict[str, Callable]:
    model = Model(llama.FAMILY, config)
    params = {name: w.to(device) for name, w in model.init(0).items()}
    tokens = torch.randint(0, config.vocab_size, (n, length), generator=torch.Generator().manual_seed(0)).to(device)
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.int32), torch.ones_like(tokens, dtype=torch.bool))
    deltas, objective = RULE.init(params, 0), sft(model, RULE)

    def of_row(leaves: tree.Tree, row: Batch) -> object:
        return objective(leaves, params, tree.map(lambda x: x[None], row))[0]

    def loop() -> None:
        each = [value_and_grad(lambda t, i=i: of_row(t, Batch(*(x[i] for x in batch))))(deltas)[1] for i in range(n)]
        tree.map(lambda *g: torch.stack(g), *each)

    whole = value_and_grad(lambda t: objective(t, params, batch)[0])
    return {
        "a loop": loop,
        "per_example": lambda: per_example(of_row, chunk=n)(deltas, batch),
        "one summed gradient": lambda: whole(deltas),
    }


def measured(ways: dict[str, Callable], device: str) -> dict[str, tuple[float, float]]:
    """(median, spread) of each way's time [s], taken by turns: of the CPU, or the wall's where a GPU works."""

    def clock() -> float:
        synchronize(device)
        return time.process_time() if device == "cpu" else time.perf_counter()

    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(REPEATS + 2):
        for name, way in ways.items():
            started = clock()
            way()
            times[name] += [clock() - started] if i > 1 else []
    return {name: (statistics.median(spent), max(spent) - min(spent)) for name, spent in times.items()}


def flops(config: llama.Config, tokens: int, n_targets: int) -> float:
    """Of a LoRA step's frozen matmuls, forward and activation gradient: blocks, but for the gradient of what enters the first
    one, and the head on labelled rows."""
    square, body = config.d_model**2, config.n_layers * (4 * config.d_model**2 + 3 * config.d_model * config.d_ff)
    return (4 * body - 6 * square) * tokens + 4 * config.vocab_size * config.d_model * n_targets


def row(config: llama.Config, n: int, rows: int, length: int, dtype: torch.dtype, compile_blocks: bool, device: str) -> str:
    a, b = torch.randn(2, 1024, 1024, device=device).to(dtype)
    at = (config, n, rows, length, dtype)
    ways: dict[Any, Callable] = {(name, c): way for c in {False, compile_blocks} for name, way in both(*at, c, device).items()}
    timings: dict[Any, tuple[float, float]] = measured({**ways, "limit": lambda: a @ b}, device)
    limit = flops(config, n * rows * length, n * rows * (length - length // 2)) * timings["limit"][0] / (2 * 1024**3)
    loop, once = (min(timings[key] for key in ways if key[0] == name) for name in ("one after another", "at once"))
    quicker = [c for name, c in ways if timings[name, c] in (loop, once)]
    shape = f"{config.n_layers} x {config.d_model}, {config.vocab_size} | {str(dtype).removeprefix('torch.')}"
    times = f"{loop[0]:.3f} / {loop[1]:.3f} | {once[0]:.3f} / {once[1]:.3f} | {loop[0] / once[0]:.2f}"
    how = ", ".join("compiled" if c else "eager" for c in quicker) if compile_blocks else "eager"
    return f"| {shape} | {n} x {rows} x {length} | {how} | {times} | {limit / loop[0]:.0%} | {limit / once[0]:.0%} |"


def main(words: Sequence[str]) -> None:
    keep_freed()  # as a program does
    device = (hardware.accelerator() or "cpu") if "accelerator" in words else "cpu"
    where = f"CPU, {torch.get_num_threads()} threads" if device == "cpu" else card(device)
    print(f"torch {torch.__version__}, {where}")
    columns = ["layers x d_model, vocabulary", "dtype", "adapters x rows x tokens", "blocks", "one after another, s / spread"]
    columns += ["at once", "ratio", "one after another, of the limit", "at once"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for sizes, dtype, cases in CASES:
        for i, case in enumerate(cases):
            print(row(shape(*sizes), *case, dtype, "compile" in words and i == 0, device), flush=True)
    print("\n| 8 examples of 96 tokens, 6 layers, d_model 256 | time, s | spread, s | ratio |\n|---|---|---|---|")
    timings = measured(examples(shape(256, 6, 8192), 8, 96, device), device)
    for name, (middle, spread) in timings.items():
        print(f"| {name} | {middle:.3f} | {spread:.3f} | {middle / timings['a loop'][0]:.2f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
