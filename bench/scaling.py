"""How a LoRA step scales: tokens a micro-batch, layers, vocabulary, adapters at once; one of them changed at a time.

    python bench/scaling.py [--toy]

bfloat16 Llamas of random weights, LoRA of rank 8 on all linears, AdamW, rows of two documents, every token a target, eager.
Tokens for each second of CPU time over all threads, median and spread of 5 steps; the share of the limit is the step's FLOPs
(minitune.planning.memory) at the best of 20 matmuls of 2048^3, measured before each row in the same process; the floor is plan's.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from roof import gemm_flops_per_s

from minitune.algorithms import sweep
from minitune.algorithms.supervised import sft
from minitune.lora import Lora
from minitune.losses.token import CrossEntropy
from minitune.models import Model
from minitune.models.families import llama
from minitune.optim.adamw import AdamW
from minitune.planning import memory
from minitune.planning.flops import flops_per_token
from minitune.planning.step_spec import StepSpec
from minitune.programs.allocator import keep_freed
from minitune.steps import train_step
from minitune.types import Batch, TrainState

RULE = Lora(8, 16.0, ("*_proj.weight",))
BASE = (12, 32000, 1, 4, 512)  # layers, vocabulary, adapters, rows, tokens a row
CHANGES = {
    "tokens": [(12, 32000, 1, 1, 128), (12, 32000, 1, 2, 256), BASE, (12, 32000, 1, 1, 2048), (12, 32000, 1, 8, 512)],
    "layers": [(3, 32000, 1, 4, 512), (24, 32000, 1, 4, 512)],
    "vocabulary": [(12, 4000, 1, 4, 512), (12, 128000, 1, 4, 512)],
    "adapters": [(12, 32000, n, 1, 128) for n in (2, 4, 8)],
}
TOY = {"adapters": [(2, 300, n, 1, 16) for n in (1, 2)]}


def step_of(case: tuple[int, int, int, int, int], d_model: int) -> tuple[Callable[[], object], StepSpec]:
    """(a step of all adapters as a function to run, the same as its costs are counted, of one adapter)."""
    n_layers, vocab_size, n, rows, length = case
    heads = {"n_heads": d_model // 64, "n_kv_heads": max(1, d_model // 192), "d_head": 64}
    config = llama.Config(n_layers=n_layers, d_model=d_model, d_ff=d_model * 8 // 3, vocab_size=vocab_size, **heads)
    model = Model(llama.FAMILY, config)
    params = {name: w.bfloat16() for name, w in model.init(0).items()}
    tokens = torch.randint(0, vocab_size, (n, rows, length), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(length) * 2 // length + 1).to(torch.int32).expand_as(tokens)
    batch, optimizer = Batch(tokens, segments, torch.ones_like(tokens, dtype=torch.bool)), AdamW(lr=1e-4)
    deltas = [RULE.init(params, i) for i in range(n)]
    counted = StepSpec(model, params, deltas[0], RULE, optimizer, CrossEntropy(), torch.device("cpu"), rows, length)
    if n == 1:
        step = train_step(sft(model, RULE), optimizer, micro_batch=rows, donate=True)
        state = step.init(deltas[0])
        alone = Batch(*(x[0] for x in batch))
        return lambda: step.update(params, state, alone), counted
    states = [optimizer.init(one) for one in deltas]
    at_once = sweep.sweep_step(model, CrossEntropy(), [RULE] * n, [optimizer] * n, micro_batch=rows, donate=True)
    stacked = sweep.stack(deltas)
    return lambda: at_once.update(params, TrainState(stacked, states), batch), counted


def lines(toy: bool) -> Iterator[str]:
    """The rows of the table."""
    for what, cases in (TOY if toy else CHANGES).items():
        for case in cases:
            n_layers, vocab_size, n, rows, length = case
            limit = gemm_flops_per_s(torch.bfloat16, 64 if toy else 2048, 20)[1]
            run, counted = step_of(case, 64 if toy else 768)
            times = []
            for i in range(7):
                started = time.process_time()
                run()
                times += [time.process_time() - started] if i > 1 else []
            tokens, middle = n * rows * length, statistics.median(times)
            per_token = flops_per_token(counted.model, counted.trainable, length / 2)
            floor = f"{sum(memory.peak_memory(counted).values()) / 2**20:,.0f}" if n == 1 else ""
            rate = f"{tokens / middle:,.0f} ±{(tokens / min(times) - tokens / max(times)) / 2:,.0f}"
            share = per_token * tokens / middle / (limit / torch.get_num_threads())
            yield f"| {what} | {n_layers} | {vocab_size:,} | {n} | {rows} x {length} | {rate} | {share:.0%} | {floor} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny shapes, in seconds: does it run?")
    args = parser.parse_args()
    keep_freed()  # as a program does
    columns = [
        "changed",
        "layers",
        "vocabulary",
        "adapters",
        "rows x tokens",
        "tokens a core-second",
        "of the limit",
        "floor, MiB",
    ]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for line in lines(args.toy):
        print(line, flush=True)


if __name__ == "__main__":
    main()
