"""The plan of a training stage: the floor of its memory beside what a step really takes, and its floating-point operations."""

from typing import Any

import pytest
import torch
from models_for_tests import random_params
from torch.profiler import ProfilerActivity, profile

from minitune import advance, costs, losses, objectives, ops, optim, quant, tree
from minitune.lora import Lora
from minitune.models import Model, gemma2, llama, mixtral
from minitune.models.experts import Experts
from minitune.steps import train_step
from minitune.types import Batch, Pairs

SIZES = {"n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "d_model": 90, "d_head": 14, "d_ff": 262, "vocab_size": 1031}
LLAMA = Model(llama, llama.Config(**SIZES))
BROAD = Model(llama, llama.Config(**{**SIZES, "vocab_size": 7919}))
TIED = Model(llama, llama.Config(**{**SIZES, "vocab_size": 7919}, tie_embeddings=True))
WIDE_HEADS = {**SIZES, "n_heads": 2, "n_kv_heads": 1, "d_head": 46}  # as wide beside d_model as they are in the real ones
GEMMA = Model(gemma2, gemma2.Config(**WIDE_HEADS, tie_embeddings=True, window=200))
MIXTRAL = Model(mixtral, mixtral.Config(**SIZES, experts=Experts(n_experts=5, n_active=2, d_ff=98, names="mixtral")))
ROUNDED = (optim.AdamW(lr=1e-3), optim.RoundStochastically(0))


def rows(model: Model, n_rows: int, n_tokens: int) -> Batch:
    """Rows of one document each, every token a target."""
    tokens = torch.randint(0, model.config.vocab_size, (n_rows, n_tokens), generator=torch.Generator().manual_seed(0))
    return Batch(tokens, torch.ones_like(tokens, dtype=torch.int32), torch.ones_like(tokens, dtype=torch.bool))


def step_and_run(kind: str, model: Model, dtype: torch.dtype, n_rows: int, n_tokens: int, **how: Any) -> tuple[costs.Step, Any]:
    """(a step as the plan sees it, the same step as a function to run)."""
    params = {name: w.to(dtype) / 20 for name, w in random_params(model.config).items()}
    rule = Lora(8, 16.0, ("*_proj.weight", "*.w?.weight") if model is MIXTRAL else ("*_proj.weight",))
    lora, micro = None if kind == "full" else rule, how.get("micro_batch", n_rows)
    if kind == "qlora":
        params = quant.Quantization(quant.NF4(), rule.targets).quantize(params)
    if lora is None:
        params, trainable = objectives.full(params, ("*",), dtype=how.get("trained", torch.float32))
    else:
        trainable = lora.init(params, 0)
    loss, batch = losses.CrossEntropy(), rows(model, n_rows, n_tokens)
    objective = objectives.sft(model, loss, lora)
    if kind == "dpo":
        loss, batch = losses.Dpo(), Pairs(batch, batch)
        objective = objectives.preference(model, loss, lora, {})
    optimizer = optim.chain(optim.ClipByGlobalNorm(1.0), *how.get("optimizers", (optim.AdamW(lr=1e-3),)))
    state = optimizer.init(trainable)
    run = train_step(objective, optimizer, micro_batch=micro, donate=True)
    at_once = micro * (2 if kind == "dpo" else 1)
    step = costs.Step(model, params, trainable, lora, optimizer, loss, torch.device("cpu"), at_once, n_tokens, n_rows // micro)
    return step, lambda: run(params, trainable, state, batch)


def peak_bytes(run: Any) -> int:
    """The most bytes that torch's allocator holds at once of what it gives out during a run, from its own records."""
    run()  # what torch sets up on a first call is no part of a step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def share_of_floor(kind: str, model: Model, dtype: torch.dtype, n_rows: int, n_tokens: int, **how: Any) -> float:
    """Measured peak over the floor."""
    step, run = step_and_run(kind, model, dtype, n_rows, n_tokens, **how)
    there = [leaf for leaf in tree.leaves((step.params, step.trainable)) if not leaf.is_meta]
    before = tree.n_bytes(there) + tree.n_bytes(step.optimizer.init(step.trainable)) + n_rows * n_tokens * 13
    return (before + peak_bytes(run)) / sum(costs.floor(step).values())


CASES = {  # kind, model, dtype, rows, tokens a row, logits that the head holds at a time, and what else is not as usual
    "lora": ("lora", LLAMA, torch.float32, 3, 131, 2**14, {}),
    "lora in bfloat16": ("lora", LLAMA, torch.bfloat16, 5, 83, 2**14, {}),
    "lora, blocks again": ("lora", LLAMA._replace(n_remat=3), torch.float32, 3, 131, 2**14, {}),
    "lora, two blocks again": ("lora", LLAMA._replace(n_remat=2), torch.bfloat16, 2, 211, 2**14, {}),
    "lora, fullest at the head": ("lora", LLAMA, torch.float32, 3, 131, 2**22, {}),
    "full": ("full", LLAMA, torch.float32, 3, 131, 2**14, {}),
    "full in bfloat16": ("full", LLAMA, torch.bfloat16, 3, 131, 2**14, {}),
    "full, blocks again": ("full", LLAMA._replace(n_remat=3), torch.bfloat16, 3, 131, 2**14, {}),
    "full, micro-batches": ("full", LLAMA, torch.float32, 3, 131, 2**14, {"micro_batch": 1}),
    "full, a large head": ("full", BROAD, torch.float32, 3, 61, 2**14, {}),
    "full, a large tied head": ("full", TIED, torch.bfloat16, 3, 61, 2**14, {}),
    "full, rounded": ("full", LLAMA, torch.bfloat16, 3, 131, 2**14, {"trained": torch.bfloat16, "optimizers": ROUNDED}),
    "full, 8 bits": ("full", LLAMA, torch.bfloat16, 3, 131, 2**14, {"optimizers": (optim.AdamW8bit(lr=1e-3),)}),
    "full, momentum": ("full", LLAMA, torch.float32, 3, 131, 2**14, {"optimizers": (optim.SGD(lr=1e-3, momentum=0.9),)}),
    "qlora": ("qlora", LLAMA, torch.float32, 3, 131, 2**14, {}),
    "qlora in bfloat16, blocks again": ("qlora", LLAMA._replace(n_remat=3), torch.bfloat16, 3, 131, 2**14, {}),
    "dpo": ("dpo", LLAMA, torch.float32, 2, 131, 2**14, {}),
    "dpo in bfloat16, blocks again": ("dpo", LLAMA._replace(n_remat=3), torch.bfloat16, 2, 131, 2**14, {}),
    "gemma": ("lora", GEMMA, torch.float32, 3, 131, 2**14, {}),
    "gemma in bfloat16": ("full", GEMMA, torch.bfloat16, 3, 131, 2**14, {}),
    "experts": ("lora", MIXTRAL, torch.float32, 3, 131, 2**14, {}),
    "experts in bfloat16, full": ("full", MIXTRAL, torch.bfloat16, 3, 131, 2**14, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_no_more_memory_than_its_floor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunks of the head and of the optimizer are made small, as they are beside a real model."""
    *case, chunk, how = CASES[name]
    monkeypatch.setattr(ops, "HEAD_CHUNK", chunk)
    monkeypatch.setattr(advance, "FUSED_ELEMENTS", {"cpu": 2**14})
    monkeypatch.setattr(advance, "PIECE_ELEMENTS", {"cpu": 2**12})
    assert 0.9 <= share_of_floor(*case, **how) <= 1.1
