"""Adapters trained at once against the same adapters one after another, and gradients of single examples against a loop.

    python bench/sweep.py [compile]

The same random Llama, LoRA of rank 8 on all linears, AdamW with clipping; whole optimizer steps. Both ways take their steps by
turns in one process; CPU time, median and spread of 5. "of the limit": the CPU time that the matmuls of the step would take at
the rate of a large one, measured between the steps, over the time at once.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

from minitune import optim, sweep, tree
from minitune.grad import per_example, value_and_grad
from minitune.lora import Lora
from minitune.losses import CrossEntropy
from minitune.models import Model, llama
from minitune.objectives import sft
from minitune.steps import train_step
from minitune.types import Batch

RULE = Lora(8, 16.0, ("*_proj.weight",))
REPEATS = 5


def shape(d_model: int, n_layers: int, vocab_size: int) -> llama.Config:
    heads = max(1, d_model // 64)
    sizes = {"n_heads": heads, "n_kv_heads": heads, "d_head": d_model // heads, "d_ff": d_model * 8 // 3}
    return llama.Config(n_layers=n_layers, d_model=d_model, vocab_size=vocab_size, **sizes)


def once(wrap: Callable) -> Callable:
    """wrap, but of the first block only: every later one is the same block, and what was compiled serves it."""
    kept: list[Callable] = []

    def wrapped(block: Callable) -> Callable:
        kept.extend([wrap(block)] * (not kept))
        return kept[0]

    return wrapped


def both(config: llama.Config, n: int, rows: int, length: int, dtype: torch.dtype, compiled: bool) -> dict[str, Callable]:
    model = Model(llama, config)
    params = {name: w.to(dtype) for name, w in model.init(0).items()}
    tokens = torch.randint(0, config.vocab_size, (n, rows, length), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.int32), torch.ones_like(tokens, dtype=torch.bool))
    batch = batch._replace(loss_mask=torch.arange(length).expand_as(tokens) >= length // 2)
    optimizers = [optim.chain(optim.ClipByGlobalNorm(1.0), optim.AdamW(lr=1e-3 * (i + 1))) for i in range(n)]
    deltas = [RULE.init(params, i) for i in range(n)]
    stacked, wrap = sweep.stack(deltas), torch.compile if compiled else lambda f: f
    alone = [
        train_step(sft(m, CrossEntropy(), RULE), o, micro_batch=rows, donate=True)
        for m in [model._replace(wrap=once(wrap))]
        for o in optimizers
    ]
    states = [o.init(d) for o, d in zip(optimizers, deltas, strict=True)]
    own = [o.init(d) for o, d in zip(optimizers, deltas, strict=True)]
    folded = model._replace(wrap=once(wrap))
    step = sweep.sweep_step(folded, CrossEntropy(), [RULE] * n, optimizers, micro_batch=rows, donate=True)

    def loop() -> None:
        for i in range(n):
            alone[i](params, deltas[i], own[i], Batch(*(x[i] for x in batch)))

    return {"one after another": loop, "at once": lambda: step(params, stacked, states, batch)}


def examples(config: llama.Config, n: int, length: int) -> dict[str, Callable]:
    model = Model(llama, config)
    params = model.init(0)
    tokens = torch.randint(0, config.vocab_size, (n, length), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.int32), torch.ones_like(tokens, dtype=torch.bool))
    deltas, objective = RULE.init(params, 0), sft(model, CrossEntropy(), RULE)

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


def measured(ways: dict[str, Callable]) -> dict[str, tuple[float, float]]:
    """(median, spread) of each way's CPU time [s], taken by turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(REPEATS + 2):
        for name, way in ways.items():
            started = time.process_time()
            way()
            times[name] += [time.process_time() - started] if i > 1 else []
    return {name: (statistics.median(spent), max(spent) - min(spent)) for name, spent in times.items()}


def flops(config: llama.Config, tokens: int, labelled: int) -> float:
    """Of a LoRA step: forward and activation gradient of every frozen matmul, the head on labelled rows and its recompute."""
    body = config.n_layers * (4 * config.d_model**2 + 3 * config.d_model * config.d_ff)
    return 4 * body * tokens + 6 * config.vocab_size * config.d_model * labelled


def main(words: Sequence[str]) -> None:
    compiled = "compile" in words
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {'blocks compiled' if compiled else 'eager'}")
    print("| model | adapters x rows x tokens | one after another, s | spread | at once, s | spread | ratio | of the limit |")
    print("|---|---|---|---|---|---|---|---|")
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    cases = [(8, 1, 96), (8, 1, 24), (2, 1, 96), (8, 1, 256)]
    for d_model, n_layers, vocab in ((256, 6, 8192), (64, 4, 1024)):
        config = shape(d_model, n_layers, vocab)
        for n, rows, length in cases[: 1 if compiled else None]:
            found = measured({**both(config, n, rows, length, torch.float32, compiled), "limit": lambda: a @ b})
            (before, spread), (after, narrow) = found["one after another"], found["at once"]
            rate = 2 * 1024**3 / found["limit"][0]
            limit = flops(config, n * rows * length, n * rows * length // 2) / rate / after
            print(
                f"| {n_layers} layers, d_model {d_model}, float32 | {n} x {rows} x {length} | {before:.3f} | {spread:.3f} "
                f"| {after:.3f} | {narrow:.3f} | {before / after:.2f} | {limit:.0%} |",
                flush=True,
            )
    if not compiled:
        print("\n| 8 examples of 96 tokens, 6 layers, d_model 256 | CPU time, s | spread, s | ratio |\n|---|---|---|---|")
        found = measured(examples(shape(256, 6, 8192), 8, 96))
        for name, (middle, spread) in found.items():
            print(f"| {name} | {middle:.3f} | {spread:.3f} | {middle / found['a loop'][0]:.2f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
