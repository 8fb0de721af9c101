"""The peak memory of training steps beside the floor that `python -m minitune plan` prints.

    python bench/memory.py [WORD ...]          all rows, or those whose words are all there, e.g. `full bfloat16`
    python bench/memory.py --toy               the same rows of a tiny shape, in seconds: does it run?

A 124.7M Llama (configs/models/llama-125m.toml with 4 key heads), 4 rows of 512 tokens, all of them targets, in one micro-batch;
DPO 2 pairs. LoRA of rank 8 on all linear weights, QLoRA over NF4. Every row in a process of its own, its second step measured:
the most bytes of torch's CPU allocator at once, from the profiler's records, which miss no tensor however short it lives.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from minitune import models, tree
from minitune.algorithms.objective import split_trainable
from minitune.algorithms.preference import preference
from minitune.algorithms.supervised import sft
from minitune.lora import Lora
from minitune.losses.preference import Dpo
from minitune.losses.token import CrossEntropy
from minitune.models import Model
from minitune.nn.dropout import seeded
from minitune.optim.adamw import AdamW
from minitune.optim.transforms import ClipByGlobalNorm, chain
from minitune.planning.memory import peak_memory
from minitune.planning.step_spec import StepSpec
from minitune.quant.rules import Quantization
from minitune.quant.schemes import NF4
from minitune.steps import train_step
from minitune.types import Batch, Pairs, Params

SHAPE = Path(__file__).parents[1] / "configs/models/llama-125m.toml"
TOY = {"n_layers": 4, "n_heads": 2, "d_model": 128, "d_ff": 352, "vocab_size": 1024}
TARGETS = ("*_proj.weight",)
HEADER = ("training", "dtype", "blocks computed again", "floor, MiB", "measured, MiB", "measured / floor")


def rows(vocab_size: int, n_rows: int, n_tokens: int) -> Batch:
    """Rows of one document each, every token a target."""
    tokens = torch.randint(0, vocab_size, (n_rows, n_tokens), generator=torch.Generator().manual_seed(0))
    return Batch(tokens, torch.ones_like(tokens, dtype=torch.int32), torch.ones_like(tokens, dtype=torch.bool))


def step_and_run(
    kind: str, model: Model, params: Params, n_rows: int, n_tokens: int, targets: tuple[str, ...] = TARGETS, **how: Any
) -> tuple[StepSpec, Callable[[], Any]]:
    """(a step as its costs are counted, the same step as a function to run).

    how: micro_batch, trained (a dtype), optimizers, dropout.
    """
    rule, micro = Lora(8, 16.0, targets, dropout=how.get("dropout", 0.0)), how.get("micro_batch", n_rows)
    lora = None if kind == "full" else rule
    if kind == "qlora":
        params = Quantization(NF4(), targets).quantize(params)
    if lora is None:
        params, trainable = split_trainable(params, ("*",), dtype=how.get("trained", torch.float32))
    else:
        trainable = lora.init(params, 0)
    loss, batch = CrossEntropy(), rows(model.config.vocab_size, n_rows, n_tokens)
    objective, at_once = sft(model, lora, loss), micro
    if kind == "dpo":
        loss, batch, at_once = Dpo(), Pairs(batch, batch), 2 * micro
        objective = preference(model, lora, loss, {})
    batch = seeded(batch, 0, 0) if rule.dropout else batch
    optimizer = chain(ClipByGlobalNorm(1.0), *how.get("optimizers", (AdamW(lr=1e-3),)))
    run = train_step(objective, optimizer, micro_batch=micro, donate=True)
    state = run.init(trainable)
    where = torch.device("cpu"), at_once, n_tokens, n_rows // micro
    step = StepSpec(model, params, trainable, lora, optimizer, loss, *where)
    return step, lambda: run.update(params, state, batch)


def peak_bytes(step: StepSpec, run: Callable[[], Any]) -> int:
    """The most bytes of tensors at once during a step: those that it is given, and what torch's allocator gives out meanwhile."""
    run()  # what torch sets up on a first call is no part of a step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    weights = [w for name, w in step.params.items() if not isinstance(step.trainable.get(name), torch.Tensor)]
    rows_of_batch = step.n_rows * step.n_micro_batches * step.n_tokens * 13  # int64 ids, int32 segments, a mask
    return peak + tree.n_bytes((weights, step.trainable, step.optimizer.init(step.trainable))) + rows_of_batch


def measured(kind: str, dtype: str, again: bool, toy: bool) -> dict[str, float]:
    """Floor and measured peak of one row, in bytes."""
    model = models.open_config(SHAPE)
    fields = {**{name: getattr(model.config, name) for name in model.config.__struct_fields__}, "n_kv_heads": 4}
    config = type(model.config)(**{**fields, **({**TOY, "n_kv_heads": 1} if toy else {})})
    model = model._replace(config=config, n_remat=config.n_layers if again else 0)
    params = {name: w.to(getattr(torch, dtype)) for name, w in model.init(0).items()}
    step, run = step_and_run(kind, model, params, 2 if kind == "dpo" else 4, 128 if toy else 512)
    return {"floor": sum(peak_memory(step).values()), "measured": peak_bytes(step, run)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--toy", action="store_true", help="a tiny shape, in this process")
    parser.add_argument("--row", action="store_true", help="of a worker: one row")
    args = parser.parse_args()
    if args.row:
        kind, dtype, again = args.words
        print(json.dumps(measured(kind, dtype, again == "all", args.toy)))
        return
    print(f"torch {torch.__version__}, CPU\n| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for row in product(("lora", "full", "qlora", "dpo"), ("float32", "bfloat16"), ("none", "all")):
        if not set(args.words) <= set(row):
            continue
        if args.toy:
            result = measured(*row[:2], row[2] == "all", toy=True)
        else:
            words = [sys.executable, __file__, "--row", *row]
            result = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        sizes = [f"{result[name] / 2**20:,.0f}" for name in ("floor", "measured")]
        share = f"{result['measured'] / result['floor']:.3f}"
        print(f"| {' | '.join([*row, *sizes, share])} |", flush=True)


if __name__ == "__main__":
    main()
