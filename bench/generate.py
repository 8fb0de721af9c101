"""Milliseconds a decode step takes: the demo model and a random Llama of 125M parameters, eager and with the block compiled, with
dense and with quantized weights, for one prompt and, in float32, for eight.

    python bench/generate.py [demo] [125m]        torch's own thread count; OMP_NUM_THREADS changes it

Each step's time is measured where its tokens are read, behind a prompt of 64 tokens; the row gives the median of N_STEPS and
the tenth and ninetieth percentile. "first" is the time until all compilations were done; those that torch finds in its cache on
disk are quicker.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from minitune import models
from minitune.inference.generate import stream
from minitune.inference.sampling import Sampling
from minitune.io import paths
from minitune.models import Model
from minitune.models.families import llama
from minitune.quant.rules import Quantization
from minitune.quant.schemes import NF4, Int4, Int8, packed
from minitune.types import Params

N_STEPS = 40
N_PROMPT = 64
LLAMA_125M = llama.Config(
    n_layers=12, n_heads=12, n_kv_heads=4, d_model=768, d_head=64, d_ff=2560, vocab_size=32000, tie_embeddings=True
)
SCHEMES = {"int8, bfloat16": Int8(), "int4, bfloat16": Int4(), "nf4, bfloat16": NF4()}
WRAPS: dict[str, Callable[..., Any]] = {"eager": lambda f: f, "compiled": torch.compile}


def step_ms(model: Model, params: Params, n_rows: int) -> list[float]:
    """Times of decode steps after the first, in ms."""
    prompts: Sequence[Sequence[int]] = [[1 + i % 7 for i in range(N_PROMPT)] for _ in range(n_rows)]
    times = [time.perf_counter()]
    options: dict[str, Any] = {"sampling": Sampling(), "row_seeds": range(n_rows), "max_new_tokens": N_STEPS + 1}
    for tokens in stream(model, params, prompts, **options):
        tokens.tolist()
        times.append(time.perf_counter())
    return [1e3 * (b - a) for a, b in pairwise(times[1:])]


def rows(name: str, model: Model, leaves: Mapping[str, Params]) -> None:
    """Print a row for each kind of weights, way and batch."""
    for kind, params in leaves.items():
        for n_rows in (1, 8) if kind == "float32" else (1,):
            for way, wrap in WRAPS.items():
                torch.compiler.reset()
                started = time.perf_counter()
                step_ms(model._replace(block_transform=wrap), params, n_rows)
                first_s = time.perf_counter() - started
                times = step_ms(model._replace(block_transform=wrap), params, n_rows)
                low, _, _, _, middle, _, _, _, high = statistics.quantiles(times, n=10)
                print(
                    f"| {name} | {kind} | {n_rows} | {way} | {middle:.2f} | {low:.2f} - {high:.2f} | {first_s:.1f} |", flush=True
                )


def main() -> None:
    print("| model | weights | prompts | way | ms a step | 10 % - 90 % | first, s |")
    print("|---|---|---|---|---|---|---|")
    for name in sys.argv[1:] or ["demo", "125m"]:
        model = models.open(paths.locate("demo")) if name == "demo" else Model(llama.FAMILY, LLAMA_125M)
        dense = model.init(0)
        half = {key: w.bfloat16() for key, w in dense.items()}
        codes = {kind: packed(Quantization(scheme).quantize(half)) for kind, scheme in SCHEMES.items()}
        rows(name, model, {"float32": dense, "bfloat16": half} | codes)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
