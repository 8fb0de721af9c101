"""Quantized Hugging Face folders as torchao saves them, which transformers opens by
TorchAoConfig.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitune.checkpoint.hf_folder import FolderExtras, save_folder
from minitune.checkpoint.torchao_base import CODES, SCALE, ZERO_POINT
from minitune.errors import InputError
from minitune.interop.compressed_tensors import Activations, is_expert, unquantized
from minitune.models.model import Model
from minitune.quant.levels import levels_of
from minitune.quant.tensors import QInt4, QInt8
from minitune.types import Params

VERSION = 2  # of torchao's classes of configs


def save(
    folder: Path, params: Params, model: Model, extras: FolderExtras, *, activations: Activations
) -> None:
    """Write a complete Hugging Face folder whose QInt8 leaves are torchao's Int8Tensor and whose
    QInt4 leaves are its IntxUnpackedToInt8Tensor, which holds a 4-bit code in each byte.

    activations "int8": every token's activations are rounded to int8 while the model runs. The
    package torchao itself is not needed. InputError for leaves of other kinds, and without one.
    """
    check(params)
    dtype = next(w.dtype for w in params.values() if isinstance(w, Tensor))
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, dict[str, Any]] = {}
    for name, w in params.items():
        kinds[name] = {"_type": "Tensor"}
        tensors[name] = w
        if isinstance(w, QInt8 | QInt4):
            del tensors[name]
            kinds[name] = _tensor_type(w, dtype, activations)
            tensors |= _stored(name.removesuffix(".weight"), w, dtype)
    first = next(w for w in params.values() if isinstance(w, QInt8 | QInt4))
    config = {
        "quant_method": "torchao",
        "quant_type": {"default": _rule(first, activations)},
        "modules_to_not_convert": unquantized(params, model),
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }
    header = {name: json.dumps(kind) for name, kind in kinds.items()}
    header["tensor_names"] = json.dumps(list(kinds))
    keys = {"quantization_config": config}
    save_folder(folder, tensors, model, extras, config_keys=keys, metadata=header)


def check(params: Params) -> None:
    """InputError for what `save` would refuse, given leaves on any device, meta too."""
    quantized = {name: w for name, w in params.items() if not isinstance(w, Tensor)}
    for name, w in quantized.items():
        if not isinstance(w, QInt8 | QInt4):
            kind = type(w).__name__.removeprefix("Q").lower()
            raise InputError(
                f"torchao: {name} is {kind}, expected int8 or int4; write it in another format, or "
                "quantize to int8 or int4"
            )
        if is_expert(name):
            raise InputError(
                f"torchao: {name} is quantized, expected dense experts: transformers joins those "
                "of a layer and can't join codes; keep = ['*.experts.*'] in the quantize stage"
            )
    if not quantized:
        raise InputError(
            "torchao: no weight is quantized, expected int8 or int4 leaves; put a quantize stage "
            "before this one"
        )


def _stored(module: str, w: QInt8 | QInt4, dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes, scales and zero points of one linear layer under torchao's names."""
    scale = w.scale.to(dtype)
    zero_point = torch.zeros_like(scale, dtype=torch.int8)
    parts = {CODES: levels_of(w, w.codes), SCALE: scale, ZERO_POINT: zero_point}
    return {f"{module}{end}": x for end, x in parts.items()}


def _tensor_type(w: QInt8 | QInt4, dtype: torch.dtype, activations: Activations) -> dict[str, Any]:
    """Class of torchao that holds a weight, with its fields."""
    group = w.shape[1] // w.scale.shape[1]
    fields = {"block_size": [1, group], "dtype": _dtype(str(dtype).removeprefix("torch."))}
    if isinstance(w, QInt4):
        rounded = None if activations == "none" else "int8_asym_per_token"
        target = {"target_dtype": _dtype("int4"), "activation_quantization": rounded}
        names = ["qdata", "scale", "zero_point"]
        return {
            "_type": "IntxUnpackedToInt8Tensor",
            "_data": {**target, **fields},
            "_tensor_data_names": names,
        }
    rounding = {
        "_type": "QuantizeTensorToInt8Kwargs",
        "_data": {
            "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
            "mapping_type": _choice("MappingType", "SYMMETRIC"),
            "reduce_range": False,
        },
    }
    how = {"act_quant_kwargs": None if activations == "none" else rounding, "reduce_range": False}
    names = ["zero_point", "qdata", "scale"]
    return {"_type": "Int8Tensor", "_data": {**how, **fields}, "_tensor_data_names": names}


def _rule(w: QInt8 | QInt4, activations: Activations) -> dict[str, Any]:
    """Config of torchao that would quantize a weight so."""
    by_row = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    if isinstance(w, QInt8) and activations == "none":
        how: dict[str, Any] = {"granularity": by_row, "set_inductor_config": True}
        return _config("Int8WeightOnlyConfig", how)
    if isinstance(w, QInt8):
        how = {"granularity": by_row, "act_mapping_type": _choice("MappingType", "SYMMETRIC")}
        return _config("Int8DynamicActivationInt8WeightConfig", how)
    size = w.shape[1] // w.scale.shape[1]
    by_group = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": size}}
    symmetric = _choice("MappingType", "SYMMETRIC")
    if activations == "none":
        how = {"granularity": by_group, "mapping_type": symmetric, "weight_dtype": _dtype("int4")}
        return _config("IntxWeightOnlyConfig", how)
    how = {"weight_granularity": by_group, "weight_mapping_type": symmetric}
    how |= {"act_mapping_type": _choice("MappingType", "ASYMMETRIC")}
    return _config("Int8DynamicActivationIntxWeightConfig", {**how, "weight_dtype": _dtype("int4")})


def _config(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {"_type": name, "_version": VERSION, "_data": fields}


def _dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


def _choice(name: str, value: str) -> dict[str, str]:
    """Value of an enumeration."""
    return {"_type": name, "_data": value}
