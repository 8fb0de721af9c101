"""Hugging Face folders: weights read and written, with config.json and the tokenizer's files."""

import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitune import tree
from minitune.checkpoint import quantized_base
from minitune.checkpoint.carried import CODED, Carried, carried, write_text_files
from minitune.checkpoint.generation_config import generation_config, with_end_ids
from minitune.checkpoint.tensors import opened_tensors, save_tensors
from minitune.checkpoint.weight_files import weight_files
from minitune.errors import InputError
from minitune.io.atomic import require_room, write_json
from minitune.io.paths import locate
from minitune.io.results import result_folder
from minitune.io.safetensors_header import INDEX, SINGLE
from minitune.models import fused_experts, hf_quantized
from minitune.models.hf_multimodal import text_config, text_name
from minitune.models.model import Model
from minitune.models.open import config_json
from minitune.models.open import open as open_model
from minitune.quant import mxfp4
from minitune.types import Params

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SHARD_BYTES = 5 * 10**9
NO_KEYS: Mapping[str, Any] = MappingProxyType({})


class FolderExtras(NamedTuple):
    """Files and settings that a complete Hugging Face folder has besides its weights."""

    tokenizer: Path  # the folder whose tokenizer files are copied, byte for byte
    stop_ids: Sequence[int]  # the end-of-turn tokens that were trained, which join eos_token_id
    template: str | None = None  # written where the tokenizer's folder ships none
    source: Path | None = None  # whose config.json and generation_config.json pass through; made anew without


def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[Model, dict[str, Tensor]]:
    """Model and weights of a Hugging Face folder, given its path or "demo" for the embedded model; InputError as for load_params.

    Weights are memory-mapped where they are stored in dtype, and copied where they are not.
    """
    folder = locate(name)
    model = open_model(folder)
    return model, load_params(folder, model.shapes(), dtype)


def load_params(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Weights of a Hugging Face folder, memory-mapped: a tensor is read when it is first used.

    `shapes` is what the model expects; dtype None keeps what is stored, or bfloat16 for FP8, NF4
    and MXFP4, which are dequantized. InputError names file and tensor for anything missing,
    unexpected, of another shape or cut short, and for a head that is not the embedding it is tied
    to. A tied head that the file repeats, buffers and the weights that see images are left out.
    """
    params: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}  # of weights that are stored as codes, and a tied head
    fused = fused_experts.places(shapes)
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
    params |= _dequantized(parts, shapes, folder, dtype or torch.bfloat16)
    _require_all(folder, params, shapes)
    if head is not None:
        _require_tied(head, params[EMBEDDING], folder)
    return {name: params[name] for name in shapes}


def check_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """InputError for what `load_params` refuses and the files' headers show; no weight is read."""
    found: set[str] = set()
    fused = fused_experts.places(shapes)
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
    """True for a part of a weight that is stored as codes, and for the repeated head of a tied model."""
    if name in shapes:
        return file.get_slice(stored).get_dtype() in CODED
    whole_names = (mxfp4.whole_name(name), quantized_base.owner(name))
    return name == HEAD or any(whole in shapes for whole in whole_names)


def _dequantized(
    parts: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Weights in floating point from all their parts."""
    packed = {name: w for name, w in parts.items() if name not in shapes and mxfp4.whole_name(name) in shapes}
    by_weight: dict[str, list[str]] = {}
    for name in parts:
        if name not in packed:
            by_weight.setdefault(quantized_base.owner(name), []).append(name)
    whole = {
        name: quantized_base.dequantized(name, {part: parts[part] for part in own}, shapes[name], dtype, folder)
        for name, own in by_weight.items()
    }
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


def save_folder(
    folder: Path,
    params: Params,
    model: Model,
    extras: FolderExtras,
    *,
    shard_bytes: int = SHARD_BYTES,
    config_keys: Mapping[str, Any] = NO_KEYS,
) -> None:
    """Write a complete Hugging Face folder: config, weights (with an index when sharded), generation config and tokenizer files.

    In a config.json that passes through, nothing is touched but the dtype and config_keys, which a quantized format has for the
    tensors that it passes as params: such a folder holds the text model alone. Any other holds
    what the source has beside it, untouched. InputError, before anything is written, if the disk
    is too small.
    """
    beside = Carried() if extras.source is None or config_keys else carried(extras.source)
    config = {**_config_json(extras, model, params, beside), **config_keys}
    named = {beside.stored_names.get(name, name): w for name, w in params.items()}
    params = {**named, **beside.tensors}
    require_room(folder, tree.n_bytes(params), "the weights")
    with result_folder(folder) as aside:
        write_json(aside / "config.json", config)
        write_json(aside / "generation_config.json", generation_config_json(extras))
        _write_weights(aside, params, shard_bytes)
        write_text_files(aside, extras.tokenizer, extras.template)
        for file in beside.files:
            shutil.copyfile(file, aside / file.name)


def _write_weights(folder: Path, params: Params, shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    for name, w in params.items():
        if shards[-1] and tree.n_bytes(shards[-1]) + tree.n_bytes(w) > shard_bytes:
            shards.append({})
        shards[-1][name] = w
    if len(shards) == 1:
        save_tensors(folder / SINGLE, shards[0])
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = {"total_size": tree.n_bytes(params), "total_parameters": sum(w.numel() for w in params.values())}
    write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})


def _config_json(extras: FolderExtras, model: Model, params: Params, beside: Carried) -> dict[str, Any]:
    dtype = str(next(w.dtype for w in params.values() if w.is_floating_point()))
    dtype = dtype.removeprefix("torch.")
    if extras.source is None:
        # written out: an absent id is that of the family's own vocabulary,
        # and transformers refuses a padding id beyond this one
        ends = {"eos_token_id": [*extras.stop_ids] or None}
        ids = {"bos_token_id": None, **ends, "pad_token_id": None}
        return {**model.family.to_hf(model.config), **ids, "dtype": dtype, "torch_dtype": dtype}
    hf = config_json(extras.source)
    if not beside.tensors:
        return _passed_through(text_config(hf), dtype)
    inner = hf.get("text_config")
    texts = {"text_config": _passed_through(inner, dtype, added=False)} if inner else {}
    return {**_passed_through(hf, dtype), **texts}


def _passed_through(hf: Mapping[str, Any], dtype: str, *, added: bool = True) -> dict[str, Any]:
    """Content of a config.json for dense weights of a dtype, which is added where none is said."""
    keys = [key for key in ("dtype", "torch_dtype") if key in hf]
    keys = keys or ["dtype", "torch_dtype"] * added
    # what was packed is written unpacked, and the Python files that auto_map names are not carried
    dense = {key: x for key, x in hf.items() if key not in (*hf_quantized.KEYS, "auto_map")}
    return {**dense, **dict.fromkeys(keys, dtype)}


def generation_config_json(extras: FolderExtras) -> dict[str, Any]:
    """Generation config of the source, if any, that ends an answer where training did too."""
    generation = {} if extras.source is None else generation_config(extras.source)
    return with_end_ids(generation, extras.stop_ids)
