"""NF4 in Hugging Face folders as transformers and bitsandbytes save it: 4-bit codes with doubly
quantized scales (QLoRA).
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitune.checkpoint.hf_folder import FolderExtras, save_folder
from minitune.errors import InputError
from minitune.interop.compressed_tensors import is_expert, unquantized
from minitune.models.model import Model
from minitune.quant import nf4
from minitune.quant.tensors import QNF4
from minitune.types import Params


def save(
    folder: Path,
    params: Params,
    model: Model,
    extras: FolderExtras,
) -> None:
    """Write a complete Hugging Face folder whose QNF4 leaves transformers loads as bitsandbytes
    layers.

    The layers compute in the dtype of the unquantized weights. InputError for leaves of other
    kinds, and without an NF4 one.
    """
    check(params)
    dtype = next(w.dtype for w in params.values() if isinstance(w, Tensor))
    tensors: dict[str, Tensor] = {}
    for name, w in params.items():
        tensors |= stored(name, w, dtype) if isinstance(w, QNF4) else {name: w}
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": not _is_single(params),
        "llm_int8_skip_modules": unquantized(params, model),
    }
    save_folder(folder, tensors, model, extras, config_keys={"quantization_config": config})


def check(params: Params) -> None:
    """InputError for what `save` would refuse, given leaves on any device, meta too."""
    for name, w in params.items():
        if not isinstance(w, Tensor | QNF4):
            kind = type(w).__name__.removeprefix("Q").lower()
            other = "write it in the format 'compressed-tensors'"
            raise InputError(f"bitsandbytes: {name} is {kind}, expected NF4; {other}")
    codes = [name for name, w in params.items() if isinstance(w, QNF4)]
    expert = next((name for name in codes if is_expert(name)), None)
    if expert is not None:
        raise InputError(
            f"bitsandbytes: {expert} is NF4, expected dense experts: transformers joins those of a "
            "layer and can't join codes; keep = ['*.experts.*'] in the quantize stage"
        )
    if not codes:
        missing = "bitsandbytes: no weight is quantized, expected NF4 leaves"
        raise InputError(f"{missing}; put a quantize stage before this one")


def stored(name: str, w: QNF4, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of one weight under bitsandbytes' names; what is no tensor is JSON bytes; dtype is
    what it dequantizes to.
    """
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": nf4.BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(w.shape),
    }
    scales = {f"{name}.absmax": w.absmax.flatten(), f"{name}.quant_map": torch.tensor(nf4.TABLE)}
    if not w.absmax.is_floating_point():
        state |= {
            "nested_blocksize": nf4.NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": w.offset.item(),
        }
        scales |= {
            f"{name}.nested_absmax": w.nested_absmax,
            f"{name}.nested_quant_map": nf4.DYNAMIC_MAP,
        }
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    key = f"{name}.quant_state.bitsandbytes__nf4"
    return {name: w.codes.reshape(-1, 1), **scales, key: text}


def _is_single(params: Params) -> bool:
    """True if no scale of an NF4 weight is quantized itself."""
    codes = [w for w in params.values() if isinstance(w, QNF4)]
    return all(w.absmax.is_floating_point() for w in codes)
