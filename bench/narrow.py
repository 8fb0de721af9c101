"""bfloat16 beside float32 on a processor that multiplies no bfloat16: CPU time of training, decoding and scoring.

    python bench/narrow.py [demo|mid] [repeats]
    python bench/narrow.py products

Both sides take turns in one process; a figure is the CPU time of float32 over that of bfloat16, so 1 is float32's speed: median
and spread (smallest .. largest) of the repeats. A processor with bfloat16 shows the same with the environment variables
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from minitune import hardware, models, steps
from minitune.algorithms import objective
from minitune.inference.generate import greedy
from minitune.lora import Lora
from minitune.losses.token import CrossEntropy
from minitune.models import Model
from minitune.models.families import llama
from minitune.optim.adamw import AdamW
from minitune.programs.allocator import keep_freed
from minitune.quant import widened
from minitune.quant.rules import Quantization
from minitune.quant.schemes import NF4, Int8
from minitune.types import Batch

MID = llama.Config(n_layers=2, n_heads=8, n_kv_heads=4, d_model=512, d_head=64, d_ff=1536, vocab_size=8192)
NEW_TOKENS = 16
SHAPES = ((256, 256), (1024, 1024), (2048, 2048), (4096, 4096), (11008, 4096), (4096, 11008))
ROWS = (1, 8, 64, 2048)
FLOATS = 2**25  # in the weights that a product goes through, so that none of them stays in a cache


def model_of(name: str) -> tuple[Model, dict[str, Any]]:
    if name == "mid":
        model = Model(llama.FAMILY, MID)
        return model, model.init(0)
    return models.load("demo")


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def ratios(wide: Callable[[], object], narrow: Callable[[], object], repeats: int) -> tuple[float, list[float]]:
    """(median CPU seconds of the wide side, the ratio of every repeat), after one turn of each that is not counted."""
    pairs = [(cpu_seconds(wide), cpu_seconds(narrow)) for _ in range(1 + repeats)][1:]
    return statistics.median(pair[0] for pair in pairs), [a / b for a, b in pairs]


def training(
    model: Model, params: Mapping[str, Any], rule: Lora | None, dtype: torch.dtype = torch.float32
) -> Callable[[], object]:
    tokens = torch.randint(0, model.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.int32), torch.ones_like(tokens, dtype=torch.bool))
    params, trainable = (params, rule.init(params, 0)) if rule else objective.split_trainable(params, ("*",), params, dtype)
    step = steps.sft_step(model, rule, AdamW(lr=1e-4), micro_batch=1)
    state = step.init(trainable)
    return lambda: step.update(params, state, batch)


def decoding(model: Model, params: Mapping[str, Any], rows: int) -> Callable[[], object]:
    prompts = [[1 + i, 2, 3] for i in range(rows)]
    return lambda: greedy(model, params, prompts, max_new_tokens=NEW_TOKENS, stop_ids=[])


def scoring(model: Model, params: Mapping[str, Any]) -> Callable[[], object]:
    tokens = torch.randint(0, model.config.vocab_size, (2, 256), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.int32), torch.ones_like(tokens, dtype=torch.bool))

    def score() -> object:
        with torch.no_grad():
            return model.token_losses(params, batch, CrossEntropy())

    return score


def workloads(name: str, repeats: int) -> None:
    model, wide = model_of(name)
    narrow = {key: w.bfloat16() for key, w in wide.items()}
    rule = Lora(8, 16.0, ("*_proj.weight",))
    codes = [Quantization(NF4()).quantize(params) for params in (wide, narrow)]
    int8 = [Quantization(Int8()).quantize(params) for params in (wide, narrow)]
    rows = {
        "LoRA step": [training(model, params, rule) for params in (wide, narrow)],
        "full step, float32 weights": [training(model, params, None) for params in (wide, narrow)],
        "full step, full.dtype = bfloat16": [training(model, wide, None), training(model, narrow, None, torch.bfloat16)],
        "QLoRA step (nf4)": [training(model, params, rule) for params in codes],
        "scoring": [scoring(model, params) for params in (wide, narrow)],
        "decoding, 1 row": [decoding(model, params, 1) for params in (wide, narrow)],
        "decoding, 8 rows": [decoding(model, params, 8) for params in (wide, narrow)],
        "decoding, 8 rows, int8": [decoding(model, params, 8) for params in int8],
    }
    print(f"| {name} | float32, CPU-s | float32 / bfloat16 | spread |\n|---|---|---|---|")
    for what, (left, right) in rows.items():
        seconds, speedups = ratios(left, right, repeats)
        print(
            f"| {what} | {seconds:.3f} | {statistics.median(speedups):.2f} | {min(speedups):.2f} .. {max(speedups):.2f} |",
            flush=True,
        )


def products() -> None:
    """Every weight whole, and in blocks of several sizes, beside a float32 weight; one row beside torch's bfloat16 kernel too."""
    sizes = [2**n for n in (17, 18, 19, 20)]
    print(f"| out x in | rows | whole | {' | '.join(f'blocks of {n}' for n in sizes)} | as it is |\n|{'---|' * (len(sizes) + 4)}")
    for d_out, d_in in SHAPES:
        weights = [torch.randn(d_out, d_in) for _ in range(max(2, FLOATS // (d_out * d_in)))]
        halves = [w.bfloat16() for w in weights]
        for n_rows in ROWS:
            x, speedups = torch.randn(n_rows, d_in), []

            def wide(x: torch.Tensor = x, weights: list[torch.Tensor] = weights) -> object:
                return [F.linear(x, w) for w in weights]

            def whole(x: torch.Tensor = x, halves: list[torch.Tensor] = halves) -> object:
                return [F.linear(x, w.float()) for w in halves]

            def blocks(n: int, x: torch.Tensor = x, halves: list[torch.Tensor] = halves) -> object:
                columns = max(widened.COLUMNS, n // x.shape[1])
                return [torch.cat([x @ some.T.float() for some in w.split(columns)], -1) for w in halves]

            def taken(x: torch.Tensor = x, halves: list[torch.Tensor] = halves) -> object:
                with torch.no_grad():
                    return [widened.linear(x, w) for w in halves]

            ways = [whole, *(lambda n=n, blocks=blocks: blocks(n) for n in sizes), taken]
            speedups = [f"{statistics.median(ratios(wide, way, 3)[1]):.2f}" for way in ways]
            print(f"| {d_out} x {d_in} | {n_rows} | {' | '.join(speedups)} |", flush=True)


def main() -> None:
    keep_freed()
    words = sys.argv[1:] or ["demo"]
    has = hardware.multiplies_bfloat16(torch.device("cpu"))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, bfloat16 in hardware: {has}\n")
    if words[0] == "products":
        products()
    else:
        workloads(words[0], int(words[1]) if len(words) > 1 else 7)


if __name__ == "__main__":
    main()
