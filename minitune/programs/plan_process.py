"""Memory of a process that trains on a CPU, beside the tensors of its step."""

import torch

from minitune import hardware
from minitune.planning.mesh import Mesh
from minitune.planning.step_spec import Parts
from minitune.programs.allocator import KERNELS

MIB = 2**20
# Fitted to the LoRA rows of "Plans beside runs" in bench/RESULTS.md, under Linux: Python, torch,
# and the libraries that a first step loads
LIBRARY_BYTES = 200 * MIB
FLOAT32_BYTES = 20 * MIB  # that products of float32 take beside their tensors
BFLOAT16_BYTES = 66 * MIB  # that products of bfloat16 take, beside the kernels
# of one kernel that oneDNN keeps for bfloat16 products, with AMX and without
AMX_KERNEL_BYTES, KERNEL_BYTES = 1.6 * MIB, 0.5 * MIB
# of process groups, where there are several ranks, and of DTensor, where they hold parts: fitted to
# LoRA on two ranks
GROUP_BYTES, DTENSOR_BYTES = 30 * MIB, 60 * MIB
# of holes between blocks, for every byte of these parts: what lives for a moment is freed between
# what stays for the backward, and the next moment's, of another size, does not fit there
HOLES = {"transient": 4.3, "activations": 0.65}


def process_bytes(device: torch.device, dtype: torch.dtype, mesh: Mesh) -> int:
    """Bytes of a process beside the step that it takes with weights of this dtype, as one rank of a
    mesh; on an accelerator they are not in its memory.
    """
    if device.type != "cpu":
        return 0
    n_bytes = LIBRARY_BYTES
    if mesh.n_ranks > 1:
        n_bytes = n_bytes + GROUP_BYTES + (DTENSOR_BYTES if mesh.plan else 0)
    if hardware.product_dtype(dtype, device) != torch.bfloat16:
        return n_bytes + FLOAT32_BYTES
    has_amx = torch.cpu.get_capabilities().get("amx_bf16", False)
    of_kernel = AMX_KERNEL_BYTES if has_amx else KERNEL_BYTES
    return n_bytes + BFLOAT16_BYTES + round(int(KERNELS) * of_kernel)


def hole_bytes(device: torch.device, parts: Parts) -> int:
    """Bytes of holes between blocks on a CPU."""
    if device.type != "cpu":
        return 0
    return round(sum(holes * parts.get(name, 0) for name, holes in HOLES.items()))
