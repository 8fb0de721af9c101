"""One training step of an 8B Llama on one GPU: every weight, or LoRA over bfloat16, NF4 and 8-bit floats; eager and
compiled, recomputed and not.

    python bench/gpu.py [--budget-s 480] [--tokens N] [--head-chunk N]      about eight minutes on one GPU of 80 or 141 GB
    python bench/gpu.py --device cpu --toy                                  the same path in seconds and uncompiled: does it run?

Random bfloat16 weights in the shape of configs/models/llama-3.1-8b.toml, packed rows of 2,048 and 8,192 tokens, every token a
target. Each way of training has a process of its own, which measures the roof (the best of 20 matmuls) and then its variants,
the most wanted first; a variant that fails gives a row with the reason, and one that the time does not reach says so.
FLOPs a token: minitune.planning.flops.flops_per_token, with no block computed again: what the share of the roof counts.
Full: bfloat16 weights rounded to nearest and 8-bit Adam moments: float32 weights of 8B do not fit beside their gradients.
"""

import argparse
import gc
import json
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from roof import card, gemm_flops_per_s, synchronize

from minitune import hardware, host, models
from minitune.algorithms.supervised import sft
from minitune.autodiff import offload
from minitune.errors import InputError
from minitune.lora import Lora
from minitune.models import Model
from minitune.models.compile import wrap
from minitune.nn import head
from minitune.optim import eight_bit
from minitune.optim.adamw import AdamW
from minitune.optim.transforms import ClipByGlobalNorm, chain
from minitune.planning.flops import flops_per_token
from minitune.quant.rules import Quantization
from minitune.quant.schemes import NF4, Float8
from minitune.steps import train_step
from minitune.types import Batch, Params

SHAPE = Path(__file__).parents[1] / "configs/models/llama-3.1-8b.toml"
TOY = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": 64, "d_head": 16, "d_ff": 128, "vocab_size": 512}
KINDS = ("lora", "qlora", "float8", "full")
SCHEMES = {"qlora": NF4(), "float8": Float8()}
RULE = Lora(rank=16, alpha=32.0, targets=("*_proj.weight",))
WARM_UPS, STEPS = 2, 3
HEADER = ("training", "row, tokens", "compiled", "remat", "tokens/s", "of the roof", "peak, GiB", "remark")
REMATS = ("no", "yes", "host")  # the last keeps block inputs in the host's memory; on the CPU it is as "yes"
Variant = tuple[int, str, str]  # tokens a row, compiled, remat


def variants(toy: bool) -> list[Variant]:
    """All of them, those that say most first."""
    lengths, blocks = ((32, 128), ("no",)) if toy else ((2048, 8192), ("no", "yes"))
    return [(length, compile_blocks, remat) for remat, length, compile_blocks in product(REMATS, lengths, blocks)]


def opened(args: argparse.Namespace) -> tuple[Model, Params]:
    """(model, random bfloat16 weights made on the device)."""
    model = models.open_config(SHAPE)
    if args.toy:
        config = type(model.config)(**TOY)
        model = model._replace(config=config)
    generator = torch.Generator(device=args.device).manual_seed(0)

    def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=torch.bfloat16, device=args.device)
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=args.device)
        return drawn.normal_(0.0, 0.02, generator=generator)

    return model, {name: weight(name, shape) for name, shape in model.shapes().items()}


def packed_rows(vocab_size: int, n_tokens: int, length: int, device: str) -> tuple[Batch, float]:
    """(full rows of documents of an eighth to a half of a row, how many tokens a token's document has on average)."""
    generator = torch.Generator().manual_seed(0)
    rows = max(1, n_tokens // length)
    tokens = torch.randint(0, vocab_size, (rows, length), generator=generator)
    segment_ids, squares = torch.zeros_like(tokens), 0
    for row in segment_ids:
        start, number = 0, 1
        while start < length:
            n = min(length - start, int(torch.randint(length // 8, length // 2, (), generator=generator)))
            row[start : start + n] = number
            start, number, squares = start + n, number + 1, squares + n * n
    batch = Batch(tokens, segment_ids.to(torch.int32), torch.ones_like(tokens, dtype=torch.bool))
    return Batch(*(x.to(device) for x in batch)), squares / tokens.numel()


def start(kind: str, params: Params) -> tuple[Params, Any, Any, Any]:
    """(params, trainable, LoRA rule, optimizer) of a way of training."""
    if kind == "full":
        frozen = {name: w.to("meta") for name, w in params.items()}
        return frozen, dict(params), None, chain(ClipByGlobalNorm(1.0), eight_bit.AdamW8bit(lr=1e-5))
    return params, RULE.init(params, 0), RULE, chain(ClipByGlobalNorm(1.0), AdamW(lr=1e-4))


def arranged(model: Model, compile_blocks: str, remat: str, device: str) -> Model:
    """The model with its block compiled once for all layers and steps, every block computed again in the backward, or both."""
    if compile_blocks == "yes":
        model = model._replace(block_transform=wrap(print))
    if remat == "host" and hardware.capabilities(torch.device(device)).streams:
        model = model._replace(remat=offload.remat(offload.side_stream(torch.device(device))))
    return model if remat == "no" else model._replace(n_remat=model.config.n_layers)


def measured(kind: str, model: Model, params: Params, variant: Variant, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step (median), tokens and peak memory of one variant."""
    length, compile_blocks, remat = variant
    batch, companions = packed_rows(model.config.vocab_size, args.tokens, length, args.device)
    frozen, trainable, rule, optimizer = start(kind, params)
    objective = sft(arranged(model, compile_blocks, remat, args.device), rule)
    step = train_step(objective, optimizer, micro_batch=len(batch.tokens), donate=True)
    state, times = step.init(trainable), []
    n_warm_ups, n_steps = (1, 1) if args.toy else (WARM_UPS, STEPS)
    for i in range(n_warm_ups + n_steps):
        if i == n_warm_ups and hasattr(torch.get_device_module(args.device), "reset_peak_memory_stats"):
            torch.get_device_module(args.device).reset_peak_memory_stats()
        synchronize(args.device)
        started = time.perf_counter()
        state, metrics = step.update(frozen, state, batch)
        synchronize(args.device)
        times += [time.perf_counter() - started] if i >= n_warm_ups else []
    if float(metrics["skipped"]):
        raise InputError("a step was skipped: its gradient is not finite")
    device = torch.device(args.device)
    peak = hardware.peak_bytes(device) if hardware.is_accelerator(device) else host.peak_bytes()
    return {"time_s": statistics.median(times), "n_tokens": batch.tokens.numel(), "companions": companions, "peak": peak}


def run_kind(kind: str, args: argparse.Namespace) -> None:
    """One JSON line for the roof, and one a variant."""
    if args.head_chunk:
        head.HEAD_CHUNK = args.head_chunk
    n, repeats = (256, 2) if args.toy else (8192, 20)
    roof = gemm_flops_per_s(torch.bfloat16, n, repeats, args.device)[1]
    print(json.dumps({"card": card(args.device), "roof": roof}), flush=True)
    model, params = opened(args)
    if kind in SCHEMES:
        params = Quantization(SCHEMES[kind]).quantize(params)
    for variant in variants(args.toy):
        try:
            result = measured(kind, model, params, variant, args)
            flops = flops_per_token(model, start(kind, params)[1], result["companions"])
            speed = result["n_tokens"] / result["time_s"]
            print(json.dumps({"tokens_per_s": speed, "share": speed * flops / roof, "peak": result["peak"]}), flush=True)
        except Exception as error:  # whatever it is, it is this variant's row and not the end of the table
            reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}"
            print(json.dumps({"reason": reason.splitlines()[0][:120]}), flush=True)
        gc.collect()
        if variant[1] == "yes":
            torch.compiler.reset()
        if args.device != "cpu":
            torch.get_device_module(args.device).empty_cache()


def lines_of(words: list[str], until: float) -> Iterator[dict[str, Any]]:
    """What a process prints, a JSON object a line, until it ends or the clock says so; then why it stopped."""
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str | None] = queue.Queue()
    assert child.stdout is not None
    reader = threading.Thread(target=lambda out: ([lines.put(line) for line in out], lines.put(None)), args=(child.stdout,))
    reader.start()
    try:
        while (line := lines.get(timeout=max(0.01, until - time.monotonic()))) is not None:
            if line.startswith("{"):
                yield json.loads(line)
        yield {"reason": f"the process ended with {child.wait()}"}
    except queue.Empty:
        yield {"reason": "no time left"}
    finally:
        child.kill()
        reader.join()


def row(kind: str, variant: Variant, result: dict[str, Any]) -> str:
    length, *flags = variant
    words = [kind, f"{length:,}", *flags]
    if "reason" in result:
        words += ["", "", "", result["reason"].replace("|", "/")]
    else:
        words += [f"{result['tokens_per_s']:,.0f}", f"{result['share']:.1%}", f"{result['peak'] / 2**30:.1f}", ""]
    return f"| {' | '.join(words)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "xpu", "mps", "cpu"), default=hardware.accelerator() or "cuda")
    parser.add_argument("--toy", action="store_true", help="a tiny shape")
    parser.add_argument("--budget-s", type=float, default=480.0)
    parser.add_argument("--tokens", type=int, help="a step; default 16,384 above 100 GB of memory, else 8,192")
    parser.add_argument("--head-chunk", type=int, help="logits that the head holds at a time, in place of the library's own")
    parser.add_argument("--kind", choices=KINDS, help="of a worker")
    args = parser.parse_args()
    if args.device not in ("cpu", hardware.accelerator()):
        raise SystemExit(
            f"bench/gpu.py: torch finds no accelerator of type {args.device}; --device cpu --toy shows that the script runs"
        )
    if args.tokens is None:
        large = args.device != "cpu" and hardware.total_bytes(torch.device(args.device)) > 100e9
        args.tokens = 128 if args.toy else 16384 if large else 8192
    if args.kind:
        run_kind(args.kind, args)
        return
    began = time.monotonic()
    words = [sys.executable, __file__, *sys.argv[1:], "--tokens", str(args.tokens)]
    table, roofs = [], []
    for i, kind in enumerate(KINDS):
        until = began + args.budget_s * (i + 1) / len(KINDS)  # what one kind leaves over, the next ones have
        rows, missing, ended = 0, variants(args.toy), {"reason": "no time left"}
        for result in lines_of([*words, "--kind", kind], until):
            if "roof" in result:
                roofs.append(f"{result['card']}, {result['roof'] / 1e12:.3g} TFLOP/s in bfloat16")
            elif rows < len(missing):
                ended = result
                if result.get("reason") == "no time left" or "process ended" in result.get("reason", ""):
                    break
                table.append(row(kind, missing[rows], result))
                print(table[-1], file=sys.stderr, flush=True)
                rows += 1
        table += [row(kind, variant, ended) for variant in missing[rows:]]
    print(f"torch {torch.__version__}, {args.tokens:,} tokens a step; roof of each process: {'; '.join(roofs)}")
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    print("\n".join(table))


if __name__ == "__main__":
    main()
