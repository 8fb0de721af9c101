"""Weights and training state on disk: safetensors and JSON only, written aside, synced and renamed: a crash loses nothing."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitune import tree
from minitune.models import Model, config_json
from minitune.tokenizer import TOKENIZER_FILES
from minitune.tree import Tree
from minitune.types import InputError, Params

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NO_KEYS: Mapping[str, Any] = MappingProxyType({})


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash at any instant, meets the old content or the new one and nothing between."""
    with atomic_file(path) as aside:
        aside.write_bytes(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when the block ends without an error."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        yield aside
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` when the block ends without an error; an older one is replaced."""
    aside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in sorted(aside.rglob("*")):
            _sync(file)
        _sync(aside)
        if path.exists():  # rename can't replace a folder that holds files; between these two lines only the aside copies exist
            old = path.with_name(f".{path.name}.old")
            path.rename(old)
            aside.rename(path)
            shutil.rmtree(old)
        else:
            aside.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_params(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights of a Hugging Face folder, memory-mapped: a tensor is read when it is first used, and no tensor twice.

    `shapes` is what the model expects; dtype None keeps what is stored. InputError names file and tensor for anything
    missing, unexpected, of another shape or cut short. A tied head that the file repeats and buffers are left out.
    """
    params: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no dict
                if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in shapes):
                    continue
                if name not in shapes:
                    raise InputError(
                        f"checkpoint: {path} holds {name}, which this model does not have; is config.json of another model?"
                    )
                found = tuple(file.get_slice(name).get_shape())
                if found != shapes[name]:
                    raise InputError(
                        f"checkpoint: {path} holds {name} of shape {list(found)}, expected {list(shapes[name])} from config.json"
                    )
                w = file.get_tensor(name)
                if not w.is_floating_point():
                    raise InputError(
                        f"checkpoint: {path} holds {name} as {w.dtype}, expected floating point; quantized folders are not read"
                    )
                params[name] = w if dtype is None else w.to(dtype)
    missing = [name for name in shapes if name not in params]
    if missing:
        raise InputError(
            f"checkpoint: {folder} lacks {missing[0]} and {len(missing) - 1} more weights that config.json calls for"
        )
    return {name: params[name] for name in shapes}


def save_folder(
    folder: Path,
    params: Params,
    model: Model,
    *,
    source: Path | None,
    tokenizer: Path,
    template: str | None,
    stop_ids: Sequence[int],
    shard_bytes: int = SHARD_BYTES,
    config_keys: Mapping[str, Any] = NO_KEYS,
) -> None:
    """Write a complete Hugging Face folder: config, weights (with an index when sharded), generation config and tokenizer files.

    config.json is the one of `source` with nothing touched but the dtype and config_keys, or made anew when source is None.
    `template` is written where the tokenizer folder ships none. stop_ids, the end-of-turn tokens that were trained, join
    eos_token_id. A quantized format passes the tensors that stand for its weights as params and says so in config_keys.
    """
    with atomic_folder(folder) as aside:
        _write_json(aside / "config.json", {**_config(source, model, params), **config_keys})
        _write_json(aside / "generation_config.json", _generation_config(source, stop_ids))
        _write_weights(aside, params, shard_bytes)
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, aside / name)
        if template is not None:
            (aside / "chat_template.jinja").write_text(template, encoding="utf-8")


def save_state(folder: Path, step: int, state: Tree, meta: Mapping[str, Any], keep: int = 2) -> Path:
    """Commit a training state as folder/step-N and drop all but the newest `keep`; a crash leaves the earlier ones whole."""
    path = folder / f"step-{step:08d}"
    with atomic_folder(path) as aside:
        save_tensors(aside / "state.safetensors", dict(tree.items(state)))
        digest = hashlib.sha256((aside / "state.safetensors").read_bytes()).hexdigest()
        _write_json(aside / "state.json", {"step": step, "sha256": digest, **meta})
    for old in committed(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def committed(folder: Path) -> list[Path]:
    """The training states in a folder, oldest first."""
    return sorted(folder.glob("step-*"))


def load_state(path: Path, like: Tree) -> tuple[Tree, dict[str, Any]]:
    """(state, meta) of a committed step, in the structure of `like`; InputError if a byte, name, shape or dtype differs."""
    try:
        meta = json.loads((path / "state.json").read_text(encoding="utf-8"))
        digest = hashlib.sha256((path / "state.safetensors").read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        raise InputError(f"checkpoint: {path} can't be read ({error}); remove it to continue from the step before") from None
    if digest != meta.get("sha256"):
        raise InputError(
            f"checkpoint: {path / 'state.safetensors'} does not match its sha256; remove {path} to continue from the step before"
        )
    tensors = load_tensors(path / "state.safetensors")
    wanted = dict(tree.items(like))
    odd = sorted(set(tensors) ^ set(wanted))
    if odd:
        raise InputError(
            f"checkpoint: {path} and this program differ in {odd[0]} (and {len(odd) - 1} more); it is of another program"
        )
    for name, leaf in wanted.items():
        found = tensors[name]
        if found.shape != leaf.shape or found.dtype != leaf.dtype:
            raise InputError(
                f"checkpoint: {path} holds {name} {found.dtype}{list(found.shape)}, expected {leaf.dtype}{list(leaf.shape)}"
            )
    # clones, because a memory-mapped file aligns tensors otherwise than a fresh one, and kernels then round otherwise
    return tree.rebuild(like, [tensors[name].clone().to(leaf.device) for name, leaf in wanted.items()]), meta


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors under their names; storage that two names share is written for each."""
    save_file({name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors leaves it readable by nobody else, which a shared folder of models can't use


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, memory-mapped; InputError if it is missing, cut short or no such file."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint: {path} is no whole safetensors file ({error}); download or save it again") from None


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"checkpoint: {folder / INDEX} has no readable weight_map ({error!r}); download it again") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise InputError(f"checkpoint: {folder / INDEX} points to {name!r}, expected a file name in its own folder")
            if not (folder / name).is_file():
                raise InputError(
                    f"checkpoint: {folder / name} does not exist, but {INDEX} points to it; download the missing shard"
                )
        return [folder / name for name in names]
    if not (folder / SINGLE).is_file():
        raise InputError(f"checkpoint: {folder} holds neither {SINGLE} nor {INDEX}, expected one of them")
    return [folder / SINGLE]


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
    _write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})


def _config(source: Path | None, model: Model, params: Params) -> dict[str, Any]:
    dtype = str(next(w.dtype for w in params.values() if w.is_floating_point())).removeprefix("torch.")
    if source is None:
        return {**model.family.to_hf(model.config), "dtype": dtype, "torch_dtype": dtype}
    hf = config_json(source)
    keys = [key for key in ("dtype", "torch_dtype") if key in hf] or ["dtype", "torch_dtype"]
    return {**hf, **dict.fromkeys(keys, dtype)}


def _generation_config(source: Path | None, stop_ids: Sequence[int]) -> dict[str, Any]:
    generation: dict[str, Any] = {}
    if source is not None and (source / "generation_config.json").is_file():
        generation = json.loads((source / "generation_config.json").read_text(encoding="utf-8"))
    known = generation.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    return {**generation, "eos_token_id": [*known, *(i for i in stop_ids if i not in known)]}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
