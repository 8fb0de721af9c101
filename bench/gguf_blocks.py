"""K types of GGUF files: seconds to encode 100 million weights, and the weighted error, beside llama.cpp's own quantizer.

    python bench/gguf_blocks.py

The second half needs llama-cpp-python. One thread; both take turns; seconds are minimum / median of REPEATS.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from torch import Tensor

from minitune.interop.gguf import blocks, k_quants

REPEATS, ROWS, COLUMNS = 7, 1024, 4096


def library() -> ctypes.CDLL | None:
    """Library that llama.cpp quantizes with; None where it is not installed."""
    try:
        import llama_cpp
    except ImportError:
        return None
    ggml = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/libggml-base.*"))))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    return ggml


def theirs(ggml: ctypes.CDLL, w: Tensor, kind: str, importance: Tensor | None) -> Tensor:
    block = blocks.TYPES[kind]
    encoded = torch.empty(w.shape[0], w.shape[1] // block.size * block.n_bytes, dtype=torch.uint8)
    weights = None if importance is None else importance.data_ptr()
    ggml.ggml_quantize_chunk(block.id, w.data_ptr(), encoded.data_ptr(), 0, *w.shape, weights)
    return encoded


def seconds(ways: list[Callable[[], Tensor]], n_weights: int) -> list[str]:
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(REPEATS):
        for own, way in zip(times, ways, strict=True):
            started = time.perf_counter()
            way()
            own.append((time.perf_counter() - started) / n_weights * 1e8)
    return [f"{min(own):.1f} / {statistics.median(own):.1f}" for own in times]


def main() -> None:
    torch.set_num_threads(1)
    ggml, generator = library(), torch.Generator().manual_seed(0)
    w = 0.02 * torch.randn(ROWS, COLUMNS, generator=generator)
    columns = torch.exp(1.5 * torch.randn(COLUMNS, generator=generator))
    print(f"{ROWS} x {COLUMNS}, torch {torch.__version__}, one thread\n")
    print("| type | importance | s for 100 M | llama.cpp's | weighted error, as a share of llama.cpp's |\n|---|---|---|---|---|")
    for kind in ("Q4_K", "Q5_K", "Q6_K"):
        for importance in (None, columns):
            given = (w, kind, importance)
            ways = [lambda given=given: blocks.encode(*given)]
            if ggml is not None:
                ways.append(lambda given=given: theirs(ggml, *given))
            cells, share = seconds(ways, w.numel()), "-"
            if ggml is not None:
                values = [gguf.quants.dequantize(way().numpy(), gguf.GGMLQuantizationType[kind]) for way in ways]
                rows = None if importance is None else importance.expand(w.shape).reshape(-1, 256)
                weigh = k_quants.slope_weights if kind == "Q6_K" else k_quants.line_weights
                weights = weigh(w.view(-1, 256), rows).view(w.shape)
                errors = [float((weights * (torch.from_numpy(x) - w).square()).sum()) for x in values]
                share = f"{errors[0] / errors[1]:.3f}"
            print(
                f"| {kind} | {'given' if importance is not None else 'none'} | {' | '.join([*cells, '-'][:2])} | {share} |",
                flush=True,
            )


main()
