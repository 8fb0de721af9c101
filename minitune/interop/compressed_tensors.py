"""Quantized Hugging Face folders in the compressed-tensors format, which transformers and vLLM
read.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor, int32, tensor, uint8

from minitune.checkpoint.hf_folder import FolderExtras, save_folder
from minitune.errors import InputError
from minitune.models.model import Model
from minitune.models.weights import head_name
from minitune.quant import float4
from minitune.quant.tensors import QMXFP4, QNF4, QNVFP4, QFloat8, QInt4, QInt8
from minitune.types import Params

Activations = Literal["none", "int8"]
CompressedWeight = QInt8 | QFloat8 | QInt4 | QMXFP4 | QNVFP4
KINDS = "int8, int4, float8, mxfp4 or nvfp4"
SCALE_DTYPES = {"mxfp4": "torch.uint8", "nvfp4": "torch.float8_e4m3fn"}
# linear maps of the same input, which vLLM makes one layer of
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Scheme(NamedTuple):
    """Storage of a group of weights: group_size None is one scale an output channel."""

    kind: Literal["int4", "int8", "float8", "mxfp4", "nvfp4"]
    group_size: int | None
    activations: Literal["none", "int8", "float8"] = "none"

    @property
    def format(self) -> str:
        """Name that the format has for weights that are stored so."""
        if self.kind in ("mxfp4", "nvfp4"):
            return f"{self.kind}-pack-quantized"
        return {"none": "pack-quantized", "int8": "int-quantized", "float8": "float-quantized"}[
            self.activations
        ]

    @property
    def strategy(self) -> str:
        """Which weights share a scale, as the format calls it."""
        if self.kind == "nvfp4":
            return "tensor_group"
        return "channel" if self.group_size is None else "group"

    @property
    def described(self) -> str:
        """Words for the storage of weights, and for what becomes of activations."""
        kept = "activations stay as they are"
        rounded = f"each token's activations are rounded to {self.activations}"
        return f"{self.kind}: {kept if self.activations == 'none' else rounded}"


def save(
    folder: Path,
    params: Params,
    model: Model,
    extras: FolderExtras,
    *,
    activations: Activations,
) -> None:
    """Write a complete Hugging Face folder whose QInt4 leaves are W4A16 and whose QInt8 leaves are
    W8A16, or, with activations "int8", W8A8: every token's activations are rounded to int8 with a
    scale of their own while the model runs. QFloat8 leaves are W8A8 in 8-bit floats, as they are
    where minitune multiplies them; QMXFP4 and QNVFP4 leaves are 4-bit floats, and activations stay.

    Scales of integers and of 8-bit floats are stored in the dtype of the unquantized weights.
    InputError for NF4 leaves and where there is nothing to quantize. vLLM fuses q, k, v and gate,
    up: it refuses a folder in which the parts of one such layer have different schemes.
    """
    check(params, activations)
    dtype = next(w.dtype for w in params.values() if isinstance(w, Tensor))
    tensors: dict[str, Tensor] = {}
    schemes: dict[_Scheme, list[str]] = {}
    for name, w in with_shared_divisors(params).items():
        if isinstance(w, Tensor):
            tensors[name] = w
            continue
        module, scheme = name.removesuffix(".weight"), _scheme(name, w, activations)
        schemes.setdefault(scheme, []).append(module)
        tensors |= stored(module, w, scheme.activations) | _stored_scales(module, w, dtype)
    config = {"quantization_config": _config(schemes, unquantized(params, model))}
    save_folder(folder, tensors, model, extras, config_keys=config)


def check(params: Params, activations: Activations) -> None:
    """InputError for what `save` would refuse, given leaves on any device, meta too."""
    quantized = {name: w for name, w in params.items() if not isinstance(w, Tensor)}
    schemes = [_scheme(name, w, activations) for name, w in quantized.items()]
    if not schemes:
        raise InputError(
            f"compressed_tensors: no weight is quantized, expected {KINDS} leaves; "
            "put a quantize stage before this one"
        )
    if activations == "int8" and not any(scheme.activations == "int8" for scheme in schemes):
        raise InputError(
            "compressed_tensors: activations = 'int8' but no weight is int8, expected int8 "
            "weights with them; quantize to int8"
        )


def is_expert(name: str) -> bool:
    """True for a weight of one of the experts of a mixture, or of all of them."""
    return ".experts." in name


def described(params: Params, activations: Activations) -> list[str]:
    """Lines on each group of weights: how it is stored, and what becomes of its activations."""
    schemes = Counter(
        _scheme(name, w, activations) for name, w in params.items() if not isinstance(w, Tensor)
    )
    return [f"{n} weights of {scheme.described}" for scheme, n in schemes.items()]


def notes(params: Params) -> list[str]:
    """Packages that will not load the folder."""
    experts = {name: w for name, w in params.items() if is_expert(name)}
    dense = next((name for name, w in experts.items() if isinstance(w, Tensor)), None)
    if dense is None:
        return []
    return [f"{dense} is not quantized: transformers loads no such folder unless all experts are"]


def _scheme(name: str, w: Any, activations: Activations) -> _Scheme:
    if isinstance(w, QInt8):
        return _Scheme("int8", None, activations)
    if isinstance(w, QFloat8):
        return _Scheme("float8", None, "float8")
    if isinstance(w, QInt4):
        return _Scheme("int4", w.shape[1] // w.scale.shape[1])
    if isinstance(w, QMXFP4):
        return _Scheme("mxfp4", float4.MX_GROUP)
    if isinstance(w, QNVFP4):
        return _Scheme("nvfp4", float4.NV_GROUP)
    kind = "NF4" if isinstance(w, QNF4) else type(w).__name__
    raise InputError(
        f"compressed_tensors: {name} is {kind}, expected {KINDS}; "
        "write NF4 in the format 'bitsandbytes', or quantize to int4"
    )


def with_shared_divisors(params: Params) -> Params:
    """Parameters, the NVFP4 leaves that vLLM joins to one layer with the same divisor.

    It takes one for all of them. Divisors are powers of two, so that a scale that is divided by
    another one is the same number, unless it is too small for it.
    """
    shared: dict[str, Any] = {}
    for name in params:
        stem, _, last = name.removesuffix(".weight").rpartition(".")
        parts = next((parts for parts in JOINED if last == parts[0]), ())
        joined = {n: params.get(n) for n in (f"{stem}.{part}.weight" for part in parts)}
        leaves = {n: w for n, w in joined.items() if isinstance(w, QNVFP4)}
        if leaves:
            divisor = torch.stack([leaf.divisor for leaf in leaves.values()]).amin()
            shared |= {n: _divided_by(leaf, divisor) for n, leaf in leaves.items()}
    return {**params, **shared}


def _divided_by(w: QNVFP4, divisor: Tensor) -> QNVFP4:
    """Leaf with another divisor of its scales."""
    scale = w.scale.float() * (divisor / w.divisor)
    return QNVFP4(w.codes, scale.to(w.scale.dtype), divisor)


def stored(module: str, w: CompressedWeight, activations: str) -> dict[str, Tensor]:
    """Codes of one linear layer under the format's names: as they are, or integers packed into
    int32 as value + 2^(bits - 1), the first in the lowest bits.
    """
    if activations != "none":
        return {f"{module}.weight": w.codes}
    if isinstance(w, QMXFP4 | QNVFP4):
        return {f"{module}.weight_packed": w.codes}
    # QInt4 has these bytes already, and for int8 they are the codes with the sign bit flipped
    rows = w.codes if isinstance(w, QInt4) else w.codes.view(uint8) ^ 0x80
    return {f"{module}.weight_packed": _words(rows), f"{module}.weight_shape": tensor(w.shape)}


def _stored_scales(module: str, w: CompressedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Scales of one linear layer under the format's names."""
    name = f"{module}.weight_scale"
    if isinstance(w, QNVFP4):
        return {name: w.scale, f"{module}.weight_global_scale": w.divisor.float().reshape(1)}
    return {name: w.scale if isinstance(w, QMXFP4) else w.scale.to(dtype)}


def _words(rows: UInt8[Tensor, "out bytes"]) -> Int[Tensor, "out words"]:
    """Bytes of each row as little-endian int32, the last one filled up with zeros."""
    return F.pad(rows, (0, -rows.shape[1] % 4)).contiguous().view(int32)


def unquantized(params: Params, model: Model) -> list[str]:
    """Linear layers that stay as they are; a tied head is one, although it has no weight of its
    own.
    """
    embedding = "model.embed_tokens.weight"
    linears = [
        name
        for name, w in params.items()
        if isinstance(w, Tensor) and w.ndim == 2 and name != embedding
    ]
    return [name.removesuffix(".weight") for name in linears] + ["lm_head"] * (
        head_name(model.config) == embedding
    )


def _config(schemes: Mapping[_Scheme, list[str]], ignore: list[str]) -> dict[str, Any]:
    formats = {scheme.format for scheme in schemes}
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(schemes) == 1 else modules,
            "weights": _rounding(scheme, scheme.strategy),
            "input_activations": _rounding(scheme, "token")
            if scheme.activations != "none"
            else None,
            "output_activations": None,
            "format": scheme.format,
        }
        for i, (scheme, modules) in enumerate(schemes.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": next(iter(formats)) if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": groups,
    }


def _rounding(scheme: _Scheme, strategy: str) -> dict[str, Any]:
    """Numbers of a scheme as the format has them, of its weights or, by token, of activations."""
    is_float4 = scheme.kind in SCALE_DTYPES
    dtype = SCALE_DTYPES.get(scheme.kind)
    return {
        "num_bits": 4 if is_float4 or scheme.kind == "int4" else 8,
        "type": "int" if scheme.kind in ("int4", "int8") else "float",
        "symmetric": True,
        "strategy": strategy,
        "group_size": scheme.group_size,
        "dynamic": strategy == "token",
        "observer": None if strategy == "token" else "minmax",
        "actorder": None,
        "block_structure": None,
        "observer_kwargs": {},
        **({"scale_dtype": dtype, "zp_dtype": dtype} if is_float4 else {}),
    }
