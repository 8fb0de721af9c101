"""Hugging Face folders: weights read and written, with config.json and the tokenizer's files."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitune import tree
from minitune.checkpoint.carried import Carried, carried, write_text_files
from minitune.checkpoint.generation_config import generation_config, with_end_ids
from minitune.checkpoint.hf_weights import load_params
from minitune.checkpoint.tensors import NONE_MADE, MadeTensors, save_tensors, serialized
from minitune.io.atomic import require_room, write_json
from minitune.io.paths import locate
from minitune.io.results import result_folder
from minitune.io.safetensors_header import INDEX, NO_METADATA, SINGLE
from minitune.models import hf_quantized
from minitune.models.hf_multimodal import text_config
from minitune.models.model import Model
from minitune.models.open import config_json
from minitune.models.open import open as open_model
from minitune.sharding.ranks import ALONE, Ranks
from minitune.types import Counting, Params, uncounted

SHARD_BYTES = 5 * 10**9
NO_KEYS: Mapping[str, Any] = MappingProxyType({})


class FolderExtras(NamedTuple):
    """Files and settings that a complete Hugging Face folder has besides its weights."""

    tokenizer: Path  # the folder whose tokenizer files are copied, byte for byte
    stop_ids: Sequence[int]  # the end-of-turn tokens that were trained, which join eos_token_id
    template: str | None = None  # written where the tokenizer's folder ships none
    # whose config.json and generation_config.json pass through; made anew without
    source: Path | None = None
    counting: Counting = uncounted  # of the tensors that are written


def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[Model, dict[str, Tensor]]:
    """Model and weights of a Hugging Face folder, given its path or "demo" for the embedded model;
    InputError as for load_params.

    Weights are memory-mapped where they are stored in dtype, and copied where they are not.
    """
    folder = locate(name)
    model = open_model(folder)
    return model, load_params(folder, model.shapes(), dtype)


def save_folder(
    folder: Path,
    params: Params,
    model: Model,
    extras: FolderExtras,
    *,
    shard_bytes: int = SHARD_BYTES,
    config_keys: Mapping[str, Any] = NO_KEYS,
    metadata: Mapping[str, str] = NO_METADATA,
    made: MadeTensors = NONE_MADE,
    ranks: Ranks = ALONE,
) -> None:
    """Write a complete Hugging Face folder: config, weights (with an index when sharded),
    generation config and tokenizer files.

    In a config.json that passes through, nothing is touched but the dtype and config_keys, which a
    quantized format has for the tensors that it passes as params: such a folder holds the text
    model alone. Any other holds what the source has beside it, untouched. metadata: texts in the
    headers of the weights' files. InputError, before anything is written, if the disk is too small.

    made: what makes a weight that is about to be written, where params have its shape and dtype
    alone. ranks: all call it if they hold weights in parts, joined one by one; the first writes.
    """
    others = Carried() if extras.source is None or config_keys else carried(extras.source)
    config = {**_config_json(extras, model, params, others), **config_keys}
    stored_names = {name: others.stored_names.get(name, name) for name in params}
    made = {stored_names[name]: make for name, make in made.items()}
    params = {**{stored_names[name]: w for name, w in params.items()}, **others.tensors}
    shards = _shards(params, shard_bytes)
    if not ranks.is_first:
        _take_part(shards, made)
        return
    require_room(folder, tree.n_bytes(params), "the weights")
    with result_folder(folder) as aside:
        with extras.counting(len(params)) as on_tensor:
            how = {"on_tensor": on_tensor, "metadata": metadata, "made": made}
            _write_weights(aside, shards, partial(save_tensors, **how))
        _write_configs(aside, config, extras)
        for file in others.files:
            shutil.copyfile(file, aside / file.name)


def _take_part(shards: Sequence[Params], made: MadeTensors) -> None:
    """Make the weights of shards that another rank writes, which needs every rank's parts."""
    for shard in shards:
        for _ in serialized(shard, made=made):
            pass


def write_beside_weights(folder: Path, params: Params, model: Model, extras: FolderExtras) -> None:
    """Write all of a Hugging Face folder of the text model but its weights, whose dtype params
    have.
    """
    _write_configs(folder, _config_json(extras, model, params, Carried()), extras)


def _write_configs(folder: Path, config: Mapping[str, Any], extras: FolderExtras) -> None:
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config_json(extras))
    write_text_files(folder, extras.tokenizer, extras.template)


def _shards(params: Mapping[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    """Tensors of each file."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, w in params.items():
        if shards[-1] and tree.n_bytes(shards[-1]) + tree.n_bytes(w) > shard_bytes:
            shards.append({})
        shards[-1][name] = w
    return shards


def _write_weights(
    folder: Path, shards: Sequence[Mapping[str, Tensor]], write: Callable[..., None]
) -> None:
    if len(shards) == 1:
        write(folder / SINGLE, shards[0])
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = {
        "total_size": sum(map(tree.n_bytes, shards)),
        "total_parameters": sum(w.numel() for shard in shards for w in shard.values()),
    }
    write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})


def _config_json(
    extras: FolderExtras, model: Model, params: Params, others: Carried
) -> dict[str, Any]:
    dtype = str(next(w.dtype for w in params.values() if w.is_floating_point()))
    dtype = dtype.removeprefix("torch.")
    if extras.source is None:
        # written out: an absent id is that of the family's own vocabulary,
        # and transformers refuses a padding id beyond this one
        ends = {"eos_token_id": [*extras.stop_ids] or None}
        ids = {"bos_token_id": None, **ends, "pad_token_id": None}
        return {**model.family.to_hf(model.config), **ids, "dtype": dtype, "torch_dtype": dtype}
    hf = config_json(extras.source)
    if not others.tensors:
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
