"""Facts about the processor or accelerator that a tensor lies on; all questions of that kind are asked here."""

import os

import torch

BFLOAT16_EXTENSIONS = ("avx512_bf16", "amx_bf16", "bf16")  # of x86 and, the last, of Arm
LIMITED_TO_AVX2 = {"ATEN_CPU_CAPABILITY": ("avx2", "default"), "ONEDNN_MAX_CPU_ISA": ("AVX2", "AVX", "SSE41")}


def multiplies_bfloat16(device: torch.device) -> bool:
    """True if the device has matrix products of bfloat16 in hardware.

    On CUDA that is Ampere and later; on a CPU it is AVX512-BF16, AMX or Arm's extension, unless the
    environment variables ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA tell torch to use none of them.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if any(os.environ.get(name) in values for name, values in LIMITED_TO_AVX2.items()):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in BFLOAT16_EXTENSIONS)


def is_asynchronous(device: torch.device) -> bool:
    """True if operations are queued on the device, so that reading a value makes the host wait for all before it."""
    return device.type != "cpu"


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device lacks it: on Apple's GPUs, and on some of Intel's."""
    if device.type == "mps":
        return torch.float32
    if device.type == "xpu" and not getattr(torch.xpu.get_device_properties(device), "has_fp64", False):
        return torch.float32
    return torch.float64
