"""Folders in the format of torchao: read back bit for bit here, and opened by transformers where torchao is installed."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from minitune.checkpoint import FolderExtras
from minitune.checkpoint.hf_weights import load_params
from minitune.checkpoint.torchao_base import dequantized
from minitune.errors import InputError
from minitune.interop import torchao
from minitune.models import Model
from minitune.models.families import llama
from minitune.models.open import open as open_model
from minitune.quant.schemes import NF4, quantize
from support.models import random_params, reference
from support.quantized import CONFIG, TOKENS, dense, folder_of, int4, int8, is_linear, logits_of_transformers

SCHEMES: dict[str, Callable[[str, Tensor], Any]] = {
    "int8": lambda name, w: int8(w) if is_linear(name) else w,
    "int4": lambda name, w: int4(w, 32) if is_linear(name) else w,
    "both": lambda name, w: int4(w, 32) if ".mlp." in name else int8(w) if is_linear(name) else w,
    "one layer": lambda name, w: int4(w, 16) if is_linear(name) and ".0." in name else w,
}
with_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def saved(tmp_path: Path, params: dict[str, Any], activations: str = "none") -> Path:
    extras = FolderExtras(folder_of(tmp_path), [3], template="{{ bos_token }}")
    torchao.save(tmp_path / "model", params, Model(llama.FAMILY, CONFIG), extras, activations=activations)
    return tmp_path / "model"


@pytest.mark.parametrize("name", SCHEMES)
def test_a_folder_is_a_base_whose_weights_are_the_codes(name: str, tmp_path: Path) -> None:
    params = {n: SCHEMES[name](n, w) for n, w in random_params(CONFIG).items()}
    folder = saved(tmp_path, params)
    model = open_model(folder)
    read = load_params(folder, model.shapes(), torch.float32)
    for n, w in params.items():
        torch.testing.assert_close(read[n], dense(w), rtol=1e-6, atol=0)


def test_names_and_metadata_are_those_of_torchao(tmp_path: Path) -> None:
    """As torchao 0.18 and transformers 5.24 write them for the same weights."""
    folder = saved(tmp_path, {n: SCHEMES["both"](n, w) for n, w in random_params(CONFIG).items()}, "int8")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    stem = "model.layers.0.self_attn.q_proj"
    assert {n for n in names if n.startswith(stem)} == {f"{stem}._weight_{part}" for part in ("qdata", "scale", "zero_point")}
    kind = json.loads(metadata[f"{stem}.weight"])
    assert (kind["_type"], kind["_tensor_data_names"]) == ("Int8Tensor", ["zero_point", "qdata", "scale"])
    kind = json.loads(metadata["model.layers.0.mlp.up_proj.weight"])
    assert kind == {
        "_type": "IntxUnpackedToInt8Tensor",
        "_data": {
            "target_dtype": {"_type": "torch.dtype", "_data": "int4"},
            "block_size": [1, 32],
            "dtype": {"_type": "torch.dtype", "_data": "float32"},
            "activation_quantization": "int8_asym_per_token",
        },
        "_tensor_data_names": ["qdata", "scale", "zero_point"],
    }
    assert json.loads(metadata["lm_head.weight"]) == {"_type": "Tensor"}
    assert set(json.loads(metadata["tensor_names"])) == {*Model(llama.FAMILY, CONFIG).shapes()}


def test_what_torchao_can_not_hold_is_refused(tmp_path: Path) -> None:
    params = random_params(CONFIG)
    with pytest.raises(InputError, match="torchao: no weight is quantized, expected int8 or int4 leaves"):
        torchao.check(params)
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(InputError, match=f"torchao: {name} is nf4, expected int8 or int4"):
        torchao.check({**params, name: quantize(params[name], NF4())})
    with pytest.raises(InputError, match=r"experts.0.w1.weight is quantized, expected dense experts: .*keep = "):
        torchao.check({"model.layers.0.block_sparse_moe.experts.0.w1.weight": int8(torch.ones(4, 4))})


def test_zero_points_are_subtracted_and_parts_that_do_not_fit_are_told() -> None:
    codes, scale = torch.tensor([[3, -1, 4, 5]], dtype=torch.int8), torch.tensor([[2.0, 0.5]])
    parts = {"._weight_qdata": codes, "._weight_scale": scale, "._weight_zero_point": torch.tensor([[1, -2]], dtype=torch.int8)}
    found = dequantized(parts, (1, 4), torch.float32)
    assert found is not None
    assert found.tolist() == [[4.0, -4.0, 3.0, 3.5]]
    assert dequantized(parts, (1, 8), torch.float32) is None
    assert dequantized({**parts, "._weight_scale": torch.ones(1, 3)}, (1, 4), torch.float32) is None
    assert dequantized({"._weight_qdata": codes}, (1, 4), torch.float32) is None


def test_another_layout_of_torchao_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, {n: SCHEMES["int4"](n, w) for n, w in random_params(CONFIG).items()})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"]["quant_type"]["default"]["_type"] = "Int4WeightOnlyConfig"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match="is quantized as 'torchao Int4WeightOnlyConfig', expected plain weights"):
        open_model(folder)


@with_torchao
@pytest.mark.soak
@pytest.mark.parametrize("activations", ["none", "int8"])
@pytest.mark.parametrize("name", SCHEMES)
def test_folders_load_in_transformers_with_the_same_logits(name: str, activations: str, tmp_path: Path) -> None:
    params = {n: SCHEMES[name](n, w) for n, w in random_params(CONFIG).items()}
    folder = saved(tmp_path, params, activations)
    wanted = Model(llama.FAMILY, CONFIG).forward({n: dense(w) for n, w in params.items()}, TOKENS)
    share = 1e-5 if activations == "none" else 0.1
    torch.testing.assert_close(logits_of_transformers(folder, TOKENS), wanted, rtol=0, atol=share * float(wanted.abs().max()))


@with_torchao
@pytest.mark.soak
@pytest.mark.parametrize("bits", [8, 4])
def test_a_folder_that_transformers_quantized_is_a_base(bits: int, tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import AutoModelForCausalLM, TorchAoConfig

    rule = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(32))
    reference(CONFIG, random_params(CONFIG)).save_pretrained(tmp_path / "plain")
    asked = TorchAoConfig(rule)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32, quantization_config=asked)
    theirs.save_pretrained(tmp_path / "theirs")
    model = open_model(tmp_path / "theirs")
    params = load_params(tmp_path / "theirs", model.shapes(), torch.float32)
    with torch.no_grad():
        wanted = theirs(TOKENS).logits
    torch.testing.assert_close(model.forward(params, TOKENS), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
