"""Hugging Face folders: weights read and written, with config.json and the tokenizer's files."""

import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitune import tree
from minitune.checkpoint.generation_config import generation_config, with_end_ids
from minitune.checkpoint.tensors import opened_tensors, save_tensors
from minitune.errors import InputError
from minitune.io.atomic import require_room, write_json
from minitune.io.paths import locate
from minitune.io.results import result_folder
from minitune.io.safetensors_header import INDEX, SINGLE, read_weight_map
from minitune.models.hf_multimodal import text_config, text_name
from minitune.models.model import Model
from minitune.models.open import config_json
from minitune.models.open import open as open_model
from minitune.quant import mxfp4
from minitune.text.tokenizer import TOKENIZER_FILES
from minitune.types import Params

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
    """The weights of a Hugging Face folder, memory-mapped: a tensor is read when it is first used, and no tensor twice.

    `shapes` is what the model expects; dtype None keeps what is stored, or bfloat16 for MXFP4, which is unpacked. InputError
    names file and tensor for anything missing, unexpected, of another shape or cut short. A tied head that the file repeats,
    buffers and the weights that see images are left out.
    """
    params: dict[str, Tensor] = {}
    packed: dict[str, Tensor] = {}
    for path, promised in weight_files(folder).items():
        with opened_tensors(path) as file:
            stored_names = file.keys()
            absent = sorted(promised - frozenset(stored_names))
            if absent:
                raise InputError(f"checkpoint: {path} lacks {absent[0]}, which {INDEX} says it holds; download both again")
            for stored in stored_names:
                name = text_name(stored)
                if name is None or name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in shapes):
                    continue
                if name not in shapes and mxfp4.whole_name(name) in shapes:
                    packed[name] = file.get_tensor(stored)
                    continue
                if name in params:
                    raise InputError(f"checkpoint: {path} holds {name}, which a file before it holds too; download both again")
                w = _checked_weight(file, stored, name, path, shapes)
                params[name] = w if dtype is None else w.to(dtype)

    params |= mxfp4.unpacked(packed, shapes, folder, dtype or torch.bfloat16)
    _require_all(folder, params, shapes)
    return {name: params[name] for name in shapes}


def check_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """InputError for what `load_params` refuses and the files' headers show; no weight is read."""
    found: set[str] = set()
    is_packed = False
    for path in weight_files(folder):
        with opened_tensors(path) as file:
            for stored in file.keys():  # noqa: SIM118
                name = text_name(stored)
                found.add(name or stored)
                if name is not None and name not in shapes:
                    is_packed = is_packed or mxfp4.whole_name(name) in shapes
                    continue
                if name is not None:
                    _require_shape(file, stored, name, path, shapes[name])
    if not is_packed:
        _require_all(folder, found, shapes)


def _checked_weight(file: Any, stored: str, name: str, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """A stored tensor that is a weight of the model: known by name, of its shape, and in floating point."""
    if name not in shapes:
        raise InputError(f"checkpoint: {path} holds {name}, which this model does not have; is config.json of another model?")
    _require_shape(file, stored, name, path, shapes[name])
    w = file.get_tensor(stored)
    if not w.is_floating_point():
        raise InputError(f"checkpoint: {path} holds {name} as {w.dtype}, expected floating point; quantized folders are not read")
    return w


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
    tensors that it passes as params. InputError, before anything is written, if the disk is too small.
    """
    require_room(folder, tree.n_bytes(params), "the weights")
    with result_folder(folder) as aside:
        write_json(aside / "config.json", {**_config_json(extras, model, params), **config_keys})
        write_json(aside / "generation_config.json", _generation_config_json(extras))
        _write_weights(aside, params, shard_bytes)
        for name in TOKENIZER_FILES:
            if (extras.tokenizer / name).is_file():
                shutil.copyfile(extras.tokenizer / name, aside / name)
        if extras.template is not None:
            (aside / "chat_template.jinja").write_text(extras.template, encoding="utf-8")


def weight_files(folder: Path) -> dict[Path, frozenset[str]]:
    """The files that hold a model's weights, and what the index says is in each (nothing, where there is no index).

    InputError for a folder without weights, an index that can't be read, and one that points nowhere or out of the folder.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise InputError(f"checkpoint: {folder} holds neither {SINGLE} nor {INDEX}, expected one of them")
        return {folder / SINGLE: frozenset()}
    file_of = read_weight_map(folder, "checkpoint", "download it again")
    for name in sorted(set(file_of.values())):
        if Path(name).name != name or len(name) > 200:
            raise InputError(f"checkpoint: {index} points to {name[:200]!r}, expected a file name in its own folder")
        if not (folder / name).is_file():
            raise InputError(f"checkpoint: {folder / name} does not exist, but {INDEX} points to it; download the missing shard")
    by_file = sorted((file, name) for name, file in file_of.items())
    return {folder / file: frozenset(name for _, name in group) for file, group in groupby(by_file, lambda pair: pair[0])}


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


def _config_json(extras: FolderExtras, model: Model, params: Params) -> dict[str, Any]:
    dtype = str(next(w.dtype for w in params.values() if w.is_floating_point())).removeprefix("torch.")
    if extras.source is None:
        # written out: an absent id is that of the family's own vocabulary,
        # and transformers refuses a padding id beyond this one
        ids = {"bos_token_id": None, "eos_token_id": [*extras.stop_ids] or None, "pad_token_id": None}
        return {**model.family.to_hf(model.config), **ids, "dtype": dtype, "torch_dtype": dtype}
    hf = text_config(config_json(extras.source))
    keys = [key for key in ("dtype", "torch_dtype") if key in hf] or ["dtype", "torch_dtype"]
    dense = {key: value for key, value in hf.items() if key != "quantization_config"}  # what was packed is written unpacked
    return {**dense, **dict.fromkeys(keys, dtype)}


def _generation_config_json(extras: FolderExtras) -> dict[str, Any]:
    generation = {} if extras.source is None else generation_config(extras.source)
    return with_end_ids(generation, extras.stop_ids)
