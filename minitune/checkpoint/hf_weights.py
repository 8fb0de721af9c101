"""Weights of a Hugging Face folder, as they are stored there or dequantized."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitune.checkpoint import quantized_base
from minitune.checkpoint.carried import CODED
from minitune.checkpoint.tensors import file_slices, opened_tensors
from minitune.checkpoint.weight_files import weight_files
from minitune.errors import InputError
from minitune.io.safetensors_header import INDEX
from minitune.models import fused_experts
from minitune.models.hf_multimodal import text_name
from minitune.quant import mxfp4
from minitune.sharding.offloaded import FileSlice
from minitune.types import Params

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load_params(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Weights of a Hugging Face folder, memory-mapped: a tensor is read when it is first used.

    `shapes` is what the model expects; dtype None keeps what is stored, or bfloat16 for FP8, NF4
    and MXFP4, which are dequantized. InputError names file and tensor for anything missing,
    unexpected, of another shape or cut short, and for a head that is not the embedding it is tied
    to. A tied head that the file repeats, buffers and the weights that see images are left out.
    """
    return dict(_read(folder, shapes, dtype, ()))


def load_base(folder: Path, shapes: Mapping[str, tuple[int, ...]], kept: Collection[str]) -> Params:
    """Weights as `load_params` gives them, but codes for those of `kept` that are stored as NF4.

    These are bitsandbytes' own codes and scales, bit for bit.
    """
    return _read(folder, shapes, None, kept)


def _read(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | None,
    kept: Collection[str],
) -> Params:
    """Weights by name; those of `kept` that are stored as NF4 codes are left as codes."""
    params: dict[str, Any] = {}
    parts: dict[str, Tensor] = {}  # of weights that are stored as codes, and a tied head
    fused = fused_experts.weights_by_parameter(shapes)
    for path, promised in weight_files(folder).items():
        with opened_tensors(path) as file:
            absent = sorted(promised - frozenset(file.keys()))
            if absent:
                what = f"{path} lacks {absent[0]}, which {INDEX} says it holds"
                raise InputError(f"checkpoint: {what}; download both again")
            for stored, name in _text_tensors(file.keys()).items():
                if _is_part(file, stored, name, shapes):
                    parts[name] = file.get_tensor(stored)
                    continue
                for one, w in _checked_weights(file, stored, name, path, shapes, fused).items():
                    if one in params:
                        what = f"{path} holds {name}, which a file before it holds too"
                        raise InputError(f"checkpoint: {what}; download both again")
                    params[one] = w if dtype is None else w.to(dtype)

    head = None if HEAD in shapes else parts.pop(HEAD, None)
    params |= _from_parts(parts, shapes, folder, dtype or torch.bfloat16, kept)
    _require_all(folder, params, shapes)
    if head is not None:
        _require_tied(head, params[EMBEDDING], folder)
    return {name: params[name] for name in shapes}


def weight_slices(folder: Path, names: Collection[str]) -> dict[str, FileSlice]:
    """Weights of these names as they lie in the files of a folder; none is read.

    InputError for one that is no tensor of its own in floating point there.
    """
    found = {}
    for path in weight_files(folder):
        slices = file_slices(path)
        for stored, name in _text_tensors(slices).items():
            dtype = slices[stored].dtype
            if name in names and dtype.is_floating_point and dtype.itemsize > 1:
                found[name] = slices[stored]
    missing = next((name for name in sorted(names) if name not in found), None)
    if missing is not None:
        raise InputError(
            f"checkpoint: {folder} holds {missing} as codes or within another tensor, expected a "
            'tensor of its own to read at each use; take offload = "host", or save the model anew'
        )
    return found


def once_quantized(folder: Path) -> frozenset[str]:
    """Weights of a folder in NF4 whose scales are not quantized a second time; none is read."""
    names: set[str] = set()
    for path in weight_files(folder):
        with opened_tensors(path) as file:
            names |= set(_text_tensors(file.keys()).values())
    return quantized_base.once_quantized(names)


def check_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """InputError for what `load_params` refuses and the files' headers show; no weight is read."""
    found: set[str] = set()
    fused = fused_experts.weights_by_parameter(shapes)
    for path in weight_files(folder):
        with opened_tensors(path) as file:
            for stored, name in _text_tensors(file.keys()).items():
                if _is_part(file, stored, name, shapes):
                    found.add(quantized_base.owner(mxfp4.whole_name(name)))
                else:
                    _require_fit(file, stored, name, path, shapes, fused)
                    found |= {name, *fused.get(name, ())}
    _require_all(folder, found, shapes)


def _text_tensors(stored_names: Iterable[str]) -> dict[str, str]:
    """Names of the text model's weights by the names that a file has them under."""
    names: dict[str, str] = {}
    for stored in stored_names:
        name = text_name(stored)
        if name is not None and not name.endswith("rotary_emb.inv_freq"):
            names[stored] = name
    return names


def _is_part(file: Any, stored: str, name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """True for a part of a weight that is stored as codes, and for a tied head that is repeated."""
    if name in shapes:
        return file.get_slice(stored).get_dtype() in CODED
    whole_names = (mxfp4.whole_name(name), quantized_base.owner(name))
    return name == HEAD or any(whole in shapes for whole in whole_names)


def _from_parts(
    parts: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    dtype: torch.dtype,
    kept: Collection[str],
) -> Params:
    """Weights from all their parts: in floating point, but for those of `kept` that are NF4."""
    others = {name: w for name, w in parts.items() if name not in shapes}
    packed = {name: w for name, w in others.items() if mxfp4.whole_name(name) in shapes}
    by_weight: dict[str, list[str]] = {}
    for name in parts:
        if name not in packed:
            by_weight.setdefault(quantized_base.owner(name), []).append(name)
    whole: dict[str, Any] = {}
    for name, own in by_weight.items():
        mine = {part: parts[part] for part in own}
        codes = quantized_base.nf4_codes(name, mine, shapes[name]) if name in kept else None
        if codes is None:
            whole[name] = quantized_base.dequantized(name, mine, shapes[name], dtype, folder)
        else:
            whole[name] = codes
    return {**mxfp4.unpacked(packed, shapes, folder, dtype), **whole}


def _require_tied(head: Tensor, embedding: Tensor, folder: Path) -> None:
    """InputError unless the head that a tied model's folder repeats is its embedding."""
    if head.shape != embedding.shape or not torch.equal(head.to(embedding.dtype), embedding):
        raise InputError(
            f"checkpoint: {folder} holds {HEAD}, which differs from the embedding, but its "
            "config.json has tie_word_embeddings = true, expected one of both; set it to false to "
            "keep the head"
        )


def _checked_weights(
    file: Any,
    stored: str,
    name: str,
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    fused: Mapping[str, Sequence[str]],
) -> dict[str, Tensor]:
    """Stored tensor by the name of the weight that it is, or its parts where it holds experts.

    InputError unless it is known by name, of its shape, and floating point.
    """
    _require_fit(file, stored, name, path, shapes, fused)
    w = file.get_tensor(stored)
    if not w.is_floating_point():
        what = f"{path} holds {name} as {w.dtype}, expected floating point"
        raise InputError(f"checkpoint: {what}; take a folder of unquantized weights")
    return {name: w} if name in shapes else fused_experts.unfused(name, w, fused[name])


def _require_fit(
    file: Any,
    stored: str,
    name: str,
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    fused: Mapping[str, Sequence[str]],
) -> None:
    """InputError unless a stored tensor is a weight of the model, or holds experts of it."""
    if name in shapes:
        expected = shapes[name]
    elif name in fused:
        expected = fused_experts.fused_shape(name, fused[name], shapes[fused[name][0]])
    else:
        what = f"{path} holds {name}, which this model does not have"
        raise InputError(f"checkpoint: {what}; is config.json of another model?")
    _require_shape(file, stored, name, path, expected)


def _require_shape(file: Any, stored: str, name: str, path: Path, expected: Sequence[int]) -> None:
    shape = list(file.get_slice(stored).get_shape())
    if shape != list(expected):
        what = f"{path} holds {name} of shape {shape}"
        raise InputError(f"checkpoint: {what}, expected {list(expected)} from config.json")


def _require_all(folder: Path, found: Collection[str], names: Iterable[str]) -> None:
    missing = [name for name in names if name not in found]
    if missing:
        what = f"{folder} lacks {missing[0]} and {len(missing) - 1} more weights"
        raise InputError(f"checkpoint: {what} that config.json calls for")
