"""Quantized linear maps: time of one x W^T by way and number of rows, time to quantize, and what rounding costs.

    python bench/quant.py [d_out d_in]

Ways take turns, so that a busy moment of the machine hits all of them; times are milliseconds, minimum / median of REPEATS.
`decoded` builds the weight from its codes at each use, as training does; `packed` is torch's kernel for few rows.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.algorithms.gptq import gptq_weight
from minitune.quant.schemes import NF4, Int4, Int8, Scheme, dequantize, packed, quantize
from minitune.quant.tensors import QTensor

REPEATS = 11
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
WARM = 2


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def timed(ways: dict[str, Callable[[], object]]) -> dict[str, str]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(WARM + REPEATS):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: f"{min(t[WARM:]):.2f} / {statistics.median(t[WARM:]):.2f}" for name, t in times.items()}


def table(rows: dict[str, dict[str, str]], corner: str) -> None:
    columns = list(next(iter(rows.values())))
    print(f"| {corner} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(row.values())} |", flush=True)
    print()


def decoded(x: Tensor, q: QTensor) -> Tensor:
    return F.linear(x, dequantize(q, x.dtype))


def main() -> None:
    d_out, d_in = [int(word) for word in sys.argv[1:3]] or [2048, 2048]
    w = 0.02 * normal(d_out, d_in, seed=0)
    dense = w.bfloat16()
    leaves = {name: quantize(w, scheme) for name, scheme in (("int8", Int8()), ("int4", Int4()), ("nf4", NF4()))}
    q8, q4 = leaves["int8"], packed(leaves)["int4"]
    print(f"{d_out} x {d_in}, torch {torch.__version__}, {torch.get_num_threads()} threads, bfloat16 x\n")
    with torch.no_grad():
        rows = {}
        for n in ROWS:
            x = normal(n, d_in, seed=n).bfloat16()
            ways: dict[str, Callable[[], object]] = {"dense bfloat16": lambda x=x: F.linear(x, dense)}
            ways |= {f"{name} decoded": lambda x=x, q=q: decoded(x, q) for name, q in leaves.items()}
            ways["int8 packed"] = lambda x=x: torch.ops.aten._weight_int8pack_mm(x, q8.codes, q8.scale.flatten().to(x.dtype))
            ways["int4 packed"] = lambda x=x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, q4.codes, 32, q4.scales)
            rows[str(n)] = timed(ways)
        table(rows, "rows")
        table({"quantize": timed({name: lambda s=s: quantize(w, s) for name, s in SCHEMES.items()})}, "ms")
        x = normal(512, 16, seed=1) @ normal(16, 512, seed=2) + 0.3 * normal(512, 512, seed=3)
        table({name: errors(w[:256, :512], x, scheme) for name, scheme in SCHEMES.items()}, "relative squared error")


SCHEMES = {"int8": Int8(), "int4 of 32": Int4(32), "int4 of 64": Int4(64), "int4 of 128": Int4(128), "nf4": NF4()}


def errors(w: Tensor, x: Tensor, scheme: Scheme) -> dict[str, str]:
    def of(change: Tensor, whole: Tensor) -> str:
        return f"{float(change.square().mean() / whole.square().mean()):.2e}"

    nearest = dequantize(quantize(w, scheme), torch.float32)
    row = {"weights, nearest": of(nearest - w, w), "weights, nearest, fixed scale": "-"}
    row |= {"outputs, nearest": of(x @ (nearest - w).T, x @ w.T), "outputs, GPTQ": "-"}
    if isinstance(scheme, Int4):
        groups = w.unflatten(1, (-1, scheme.group))
        scale = groups.abs().amax(-1, keepdim=True) / 7.5
        row["weights, nearest, fixed scale"] = of((scheme.levels(groups, scale) * scale - groups).flatten(1), w)
    if not isinstance(scheme, NF4):
        q = dequantize(gptq_weight(w, x.T @ x, scheme, 0.01), torch.float32)
        row["outputs, GPTQ"] = of(x @ (q - w).T, x @ w.T)
    return row


if __name__ == "__main__":
    main()
