"""Memory of a process that trains on a CPU, beside the tensors of its step."""

import torch

from minitune import hardware
from minitune.planning.step_spec import Parts
from minitune.programs.allocator import KEPT, KERNELS

MIB = 2**20
# Fitted to the demo's LoRA rows of "Plans beside runs" in bench/RESULTS.md, under Linux: Python,
# torch, the libraries that a first step loads, and what the C library lays out around them
LIBRARY_BYTES = 292 * MIB
# of one kernel that oneDNN keeps for bfloat16 products, with AMX and without
AMX_KERNEL_BYTES, KERNEL_BYTES = 1.6 * MIB, 0.5 * MIB
FLOAT32_BYTES = 20 * MIB  # that products of float32 take beside their tensors
# of holes between blocks, for every byte that comes and goes in a step
HOLES = 0.84
COME_AND_GO = ("gradients", "transient", "activations")


def process_bytes(device: torch.device, dtype: torch.dtype) -> int:
    """Bytes of a process beside the step that it takes with weights of this dtype; on an
    accelerator they are not in its memory.
    """
    if device.type != "cpu":
        return 0
    if hardware.product_dtype(dtype, device) != torch.bfloat16:
        return LIBRARY_BYTES + FLOAT32_BYTES
    has_amx = torch.cpu.get_capabilities().get("amx_bf16", False)
    of_kernel = AMX_KERNEL_BYTES if has_amx else KERNEL_BYTES
    return LIBRARY_BYTES + round(int(KERNELS) * of_kernel)


def hole_bytes(device: torch.device, parts: Parts) -> int:
    """Bytes of holes between blocks on a CPU: at most what the C library is allowed to keep."""
    if device.type != "cpu":
        return 0
    come_and_go = sum(parts.get(name, 0) for name in COME_AND_GO)
    return min(KEPT, round(HOLES * come_and_go))
