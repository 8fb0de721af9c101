"""Linear maps of experts over rows sorted by expert: ways to compute one, by shape.

    python bench/moe.py

`segments` is what minitune.nn.moe does: F.linear on each expert that has rows. `grouped_mm` is torch's kernel, on one tensor of
all experts or on a stack of single ones, which is how most checkpoints keep them; `padded bmm` gives every expert as many rows as
the busiest has. Ways take turns; times are milliseconds of a forward, and of one with the gradient of the rows, minimum of
REPEATS.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

REPEATS = 5
SHAPES = ((8, 1024, 2048, 1024), (64, 512, 256, 1024), (128, 512, 256, 64), (128, 1024, 512, 8))  # experts, in, out, rows


def segments(x: Tensor, w: list[Tensor], counts: Tensor) -> Tensor:
    sizes = counts.tolist()
    return torch.cat([F.linear(rows, one) for rows, one in zip(x.split(sizes), w, strict=True) if len(rows)])


def grouped(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    return F.grouped_mm(x, w.transpose(1, 2), offs=counts.cumsum(0).int())


def padded(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    real = torch.arange(int(counts.max())) < counts[:, None]
    rows = x.new_zeros(*real.shape, x.shape[1]).masked_scatter(real[..., None], x)
    return torch.bmm(rows, w.transpose(1, 2))[real]


def seconds(run: Callable[[Tensor], Tensor], x: Tensor, trained: bool) -> float:
    x = x.clone().requires_grad_(trained)
    started = time.perf_counter()
    y = run(x)
    if trained:
        torch.autograd.grad(y, x, torch.ones_like(y))
    return time.perf_counter() - started


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; forward / with gradient, ms")
    for dtype in (torch.float32, torch.bfloat16):
        for n_experts, d_in, d_out, n_rows in SHAPES:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(n_rows, d_in, generator=generator).to(dtype)
            w = torch.randn(n_experts, d_out, d_in, generator=generator).to(dtype)
            each = [one.clone() for one in w]
            odds = torch.randn(n_experts, generator=generator).softmax(0)
            counts = torch.bincount(torch.multinomial(odds, n_rows, True, generator=generator), minlength=n_experts)
            ways = {
                "segments": lambda x, w=each, counts=counts: segments(x, w, counts),
                "grouped_mm": lambda x, w=w, counts=counts: grouped(x, w, counts),
                "grouped_mm, stacking": lambda x, w=each, counts=counts: grouped(x, torch.stack(w), counts),
                "padded bmm": lambda x, w=w, counts=counts: padded(x, w, counts),
            }
            times: dict[tuple[str, bool], list[float]] = {(name, trained): [] for name in ways for trained in (False, True)}
            for _ in range(REPEATS):
                for (name, trained), milliseconds in times.items():
                    milliseconds.append(1e3 * seconds(ways[name], x, trained))
            shown = (f"{name} {min(times[name, False]):.2f} / {min(times[name, True]):.2f}" for name in ways)
            print(
                f"{str(dtype).removeprefix('torch.')}, {n_experts} x {d_in} -> {d_out}, {n_rows} rows | {' | '.join(shown)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
