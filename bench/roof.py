"""The machine's limit, measured in the process that is compared with it."""

import statistics
import time

import torch


def gemm_flops_per_s(dtype: torch.dtype, n: int = 2048, repeats: int = 5, device: str = "cpu") -> tuple[float, float]:
    """(median, best) FLOP/s of an n x n x n matmul with the process's threads or on a GPU, after a warm-up."""
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    rates = []
    for i in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        if i:
            rates.append(2 * n**3 / (time.perf_counter() - started))
    return statistics.median(rates), max(rates)


def card(device: str) -> str:
    """Name of an accelerator, or CPU; MPS gives its chip no name."""
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    return named() if named is not None and device != "cpu" else device.upper()


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given; the CPU always has."""
    if device != "cpu":
        torch.accelerator.synchronize()
