"""Folders as people bring them: names with what torch puts before them, fields left out, files that are not whole."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitune import checkpoint, models
from minitune.checkpoint.hf_folder import load
from minitune.errors import InputError
from support.models import SMALL, random_params, save_reference

PARAMS = random_params(SMALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_reference(SMALL, PARAMS, tmp_path / "model")
    return tmp_path / "model"


def assert_read(folder: Path) -> None:
    _, params = load(str(folder))
    assert params.keys() == PARAMS.keys()
    assert all(w.equal(PARAMS[name]) for name, w in params.items())
    checkpoint.check_weights(folder, models.open(folder).shapes())


RENAMED: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "data parallelism": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "without its head": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("kind", RENAMED)
def test_names_with_what_torch_puts_before_them_are_read(kind: str, folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    save_file({RENAMED[kind](name): w for name, w in stored.items()}, folder / "model.safetensors")
    assert_read(folder)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype", "architectures", "transformers_version", "rope_parameters"])
def test_fields_that_are_left_out_are_not_missed(field: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config["rope_parameters"]
    more = {"rope_theta": rope["rope_theta"]} if field == "rope_parameters" else {}
    config = {key: value for key, value in config.items() if key != field} | more
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert_read(folder)


def test_metadata_of_null_is_read(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (n_bytes,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + n_bytes])
    header.pop("__metadata__", None)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n_bytes :])
    assert_read(folder)


def test_norms_in_another_precision_are_read_as_they_are(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    save_file({n: w.half() if w.ndim == 1 else w for n, w in stored.items()}, folder / "model.safetensors")
    params = checkpoint.load_params(folder, models.open(folder).shapes())
    assert {w.dtype for w in params.values()} == {torch.float16, torch.float32}
    assert all(w.equal(PARAMS[n].half() if w.ndim == 1 else PARAMS[n]) for n, w in params.items())


def sharded(folder: Path, second: dict[str, torch.Tensor], weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file(second, folder / "b.safetensors")
    index = {"weight_map": {**dict.fromkeys(PARAMS, "a.safetensors"), **weight_map}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    sharded(folder, {"model.norm.weight": PARAMS["model.norm.weight"] + 1}, {"model.norm.weight": "b.safetensors"})
    with pytest.raises(InputError, match=r"b\.safetensors holds model\.norm\.weight, which a file before it holds too; download"):
        checkpoint.load_params(folder, models.open(folder).shapes())


def test_a_shard_that_is_missing_is_named(folder: Path) -> None:
    sharded(folder, {"model.norm.weight": PARAMS["model.norm.weight"]}, {"model.norm.weight": "b.safetensors"})
    (folder / "b.safetensors").unlink()
    for read in (checkpoint.load_params, checkpoint.check_weights):
        with pytest.raises(InputError, match=r"b\.safetensors does not exist, but .* points to it; download the missing shard"):
            read(folder, models.open(folder).shapes())
