"""Weights that a folder holds as codes, dequantized: FP8 with scales, and bitsandbytes' NF4; those
of compressed-tensors and of torchao by compressed_base.py and torchao_base.py.

DeepSeek-AI 2024, arXiv 2412.19437, section 3.3; Dettmers et al. 2023, arXiv 2305.14314.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from minitune.checkpoint import compressed_base, torchao_base
from minitune.errors import InputError, quoted
from minitune.quant import nf4
from minitune.quant.tensors import QNF4

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FP8_BLOCK = 128  # rows and columns of a weight that share a scale
SCALES = (".weight_scale_inv", ".weight_scale")  # both are multiplied by
UNUSED = (".activation_scale", ".input_scale")  # of activations, which stay in their dtype here
NF4_STATE = ".weight.quant_state.bitsandbytes__nf4"
NF4_SCALES = (
    ".weight.quant_map",
    ".weight.absmax",
    ".weight.nested_absmax",
    ".weight.nested_quant_map",
)
NF4_PARTS = (*NF4_SCALES, NF4_STATE)


class _NF4State(msgspec.Struct):
    """State of a weight that bitsandbytes saves beside its tensors."""

    shape: list[int]
    blocksize: int
    quant_type: str = "nf4"
    nested_blocksize: int = 256
    nested_offset: float = 0.0


def owner(name: str) -> str:
    """Weight that a stored tensor is a part of, or else the name itself."""
    parts = (*SCALES, *UNUSED, *NF4_PARTS, *compressed_base.PARTS, *torchao_base.PARTS)
    part = next((part for part in parts if name.endswith(part)), None)
    return name if part is None else f"{name.removesuffix(part)}.weight"


def once_quantized(names: Collection[str]) -> frozenset[str]:
    """Weights that stored tensors hold as NF4 with scales that are not quantized a second time."""
    stems = [name.removesuffix(NF4_STATE) for name in names if name.endswith(NF4_STATE)]
    return frozenset(
        f"{stem}.weight" for stem in stems if f"{stem}.weight.nested_absmax" not in names
    )


def dequantized(
    name: str,
    parts: Mapping[str, Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    folder: Path,
) -> Tensor:
    """Weight of a shape from its stored parts by name; InputError for parts that do not fit it."""
    stem = name.removesuffix(".weight")
    w = parts.get(name)
    by_ending = {part.removeprefix(stem): x for part, x in parts.items()}
    if torchao_base.is_torchao(by_ending):
        whole = torchao_base.dequantized(by_ending, shape, dtype)
    elif compressed_base.is_compressed(by_ending):
        whole = compressed_base.dequantized(by_ending, shape, dtype)
    elif w is not None and w.dtype in FP8:
        scale = next((parts[f"{stem}{end}"] for end in SCALES if f"{stem}{end}" in parts), None)
        whole = None if tuple(w.shape) != shape else _from_fp8(w, scale)
    elif w is not None and w.dtype == torch.uint8 and f"{stem}{NF4_STATE}" in parts:
        named = {end: parts.get(f"{stem}{end}") for end in NF4_PARTS}
        whole = _from_nf4(w, named, shape)
    else:
        whole = None
    if whole is None:
        found = {part: [str(x.dtype).removeprefix("torch."), *x.shape] for part, x in parts.items()}
        raise InputError(
            f"checkpoint: {folder} holds {name} {list(shape)} as {quoted(found)}, expected "
            "floating point, FP8 with its scales, bitsandbytes' NF4, symmetric codes of "
            "compressed-tensors or unpacked ones of torchao; take the unquantized folder"
        )
    return whole.to(dtype)


def nf4_codes(name: str, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> QNF4 | None:
    """Codes and scales of a weight as bitsandbytes saved them; None where a QNF4 can't hold them.

    It holds bitsandbytes' own blocks and tables, and an even number of weights in a row.
    """
    stem = name.removesuffix(".weight")
    state, codes = _nf4_state(parts.get(f"{stem}{NF4_STATE}")), parts.get(name)
    table, absmax, nested, levels = (parts.get(f"{stem}{end}") for end in NF4_SCALES)
    if state is None or codes is None or table is None or absmax is None:
        return None
    n = math.prod(shape)
    fits = state.shape == list(shape) and len(shape) == 2 and shape[-1] % 2 == 0
    if not fits or 2 * codes.numel() != n or absmax.numel() != -(-n // nf4.BLOCK):
        return None
    if state.blocksize != nf4.BLOCK or not torch.equal(table.float(), nf4.LEVELS):
        return None
    packed = codes.view(shape[0], -1)
    if absmax.dtype != torch.uint8:
        return nf4.with_scales(packed, absmax.float(), torch.zeros(0), torch.zeros(()))
    if nested is None or levels is None or not torch.equal(levels.float(), nf4.DYNAMIC_MAP):
        return None
    if state.nested_blocksize != nf4.NESTED_BLOCK:
        return None
    if nested.numel() != -(-absmax.numel() // nf4.NESTED_BLOCK):
        return None
    return nf4.with_scales(packed, absmax, nested.float(), torch.tensor(state.nested_offset))


def _nf4_state(raw: Tensor | None) -> _NF4State | None:
    """State of an NF4 weight from its JSON bytes; None if there is none that can be read."""
    try:
        text = bytes(raw.tolist()) if raw is not None else b""
        state = msgspec.json.decode(text, type=_NF4State)
    except (msgspec.DecodeError, ValueError):
        return None
    return state if state.quant_type == "nf4" else None


def _from_fp8(w: Tensor, scale: Tensor | None) -> Tensor | None:
    """w * scale: one scale for all, a row or a block of 128 x 128; None where it does not fit."""
    wide = w.to(torch.float32)
    if scale is None or scale.numel() == 1:
        return wide if scale is None else wide * scale.to(torch.float32).reshape(())
    scale = scale.to(torch.float32)
    if scale.shape in ((w.shape[0],), (w.shape[0], 1)):
        return wide * scale.reshape(-1, 1)
    if scale.shape != tuple(-(-size // FP8_BLOCK) for size in w.shape):
        return None
    by_row = scale.repeat_interleave(FP8_BLOCK, 0)[: w.shape[0]]
    return wide * by_row.repeat_interleave(FP8_BLOCK, 1)[:, : w.shape[1]]


def _from_nf4(
    codes: UInt8[Tensor, "*half"], parts: Mapping[str, Tensor | None], shape: tuple[int, ...]
) -> Float[Tensor, "*shape"] | None:
    """table[code] * absmax of the code's block; None where the parts do not fit the shape."""
    state, table, absmax = _nf4_state(parts[NF4_STATE]), *(parts[end] for end in NF4_SCALES[:2])
    n = math.prod(shape)
    if state is None or state.shape != list(shape) or state.blocksize < 1:
        return None
    if 2 * codes.numel() != n + n % 2:
        return None
    if table is None or absmax is None or table.numel() != 16:
        return None
    if absmax.dtype == torch.uint8:  # the scales are quantized themselves
        nested, levels = parts[".weight.nested_absmax"], parts[".weight.nested_quant_map"]
        if nested is None or levels is None or levels.numel() != 256 or state.nested_blocksize < 1:
            return None
        per_block = nested.repeat_interleave(state.nested_blocksize)[: absmax.numel()]
        absmax = levels[absmax.int()] * per_block + state.nested_offset
    if absmax.numel() != -(-n // state.blocksize):
        return None
    pairs = codes.flatten().int()
    values = torch.stack([table[pairs >> 4], table[pairs & 15]], dim=-1).flatten()[:n]
    return (values * absmax.repeat_interleave(state.blocksize)[:n]).reshape(shape)
