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


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of activations for weights of `dtype`: float32 in place of a bfloat16 that the device does not multiply.

    torch emulates such products, about fifty times slower than those of float32.
    """
    return torch.float32 if dtype == torch.bfloat16 and not multiplies_bfloat16(device) else dtype
