"""NF4 in Hugging Face folders as transformers and bitsandbytes save it: 4-bit codes with doubly quantized scales (QLoRA)."""

import json
from pathlib import Path

import torch
from torch import Tensor

from minitune.checkpoint.hf_folder import FolderExtras, save_folder
from minitune.errors import InputError
from minitune.interop.compressed_tensors import unquantized
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
    """Write a complete Hugging Face folder whose QNF4 leaves transformers loads as bitsandbytes layers.

    The layers compute in the dtype of the unquantized weights. InputError for leaves of other kinds, and without an NF4 one.
    """
    dtype = next(w.dtype for w in params.values() if isinstance(w, Tensor))
    tensors: dict[str, Tensor] = {}
    for name, w in params.items():
        if not isinstance(w, Tensor | QNF4):
            raise InputError(
                f"bitsandbytes: {name} is {type(w).__name__.removeprefix('Q').lower()}, expected NF4; "
                "write it in the format 'compressed-tensors'"
            )
        tensors |= stored(name, w, dtype) if isinstance(w, QNF4) else {name: w}
    if len(tensors) == len(params):
        raise InputError("bitsandbytes: no weight is quantized, expected NF4 leaves; put a quantize stage before this one")
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": unquantized(params, model),
    }
    save_folder(folder, tensors, model, extras, config_keys={"quantization_config": config})


def stored(name: str, w: QNF4, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of one weight under bitsandbytes' names; what is no tensor is JSON bytes; dtype is what it dequantizes to."""
    state = {
        "quant_type": "nf4",
        "blocksize": nf4.BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(w.shape),
        "nested_blocksize": nf4.NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": w.offset.item(),
    }
    return {
        name: w.codes.reshape(-1, 1),
        f"{name}.absmax": w.absmax,
        f"{name}.quant_map": torch.tensor(nf4.TABLE),
        f"{name}.nested_absmax": w.nested_absmax,
        f"{name}.nested_quant_map": nf4.DYNAMIC_MAP,
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
