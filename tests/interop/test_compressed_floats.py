"""Folders of 4 and 8-bit floats as compressed-tensors, transformers and this package itself read them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitune import checkpoint, models
from minitune.errors import InputError
from minitune.interop.compressed_tensors import with_shared_divisors
from minitune.models import Model
from minitune.models.families import llama
from minitune.quant.schemes import MXFP4, NVFP4, Float8, Int4, Int8, Scheme, dequantize, quantize
from minitune.quant.tensors import QNVFP4, QInt4, QInt8
from support.models import random_params
from support.programs import evaluation, run
from support.quantized import CONFIG, TOKENS, is_linear, logits_of_transformers, save_compressed

FLOATS: dict[str, Scheme] = {"float8": Float8(), "mxfp4": MXFP4(), "nvfp4": NVFP4()}
ALL: dict[str, Scheme] = {"int4": Int4(32), "int8": Int8(), "int4 of 64": Int4(64), **FLOATS}
MIXED = {"q_proj": "nvfp4", "k_proj": "nvfp4", "v_proj": "nvfp4", "o_proj": "int4", "down_proj": "mxfp4"}


def leaves(kind: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Random model with its linear weights as codes of a kind, or of several; as a folder holds them."""

    def leaf(name: str, w: Tensor) -> Any:
        if not is_linear(name):
            return w
        return quantize(w, ALL[MIXED.get(name.split(".")[-2], "int8") if kind == "mixed" else kind])

    return with_shared_divisors({name: leaf(name, w) for name, w in random_params(CONFIG, dtype=dtype).items()})


def dense(w: Any, dtype: torch.dtype) -> Tensor:
    return w if isinstance(w, Tensor) else dequantize(w, dtype)


@pytest.mark.parametrize("kind", [*ALL, "mixed"])
def test_the_package_decompresses_every_weight_to_the_same_numbers(kind: str, tmp_path: Path) -> None:
    params = leaves(kind)
    folder = save_compressed(tmp_path, params)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    groups = [QuantizationScheme.model_validate(group) for group in config["config_groups"].values()]
    n_compared = 0
    for name, w in params.items():
        if isinstance(w, Tensor):
            continue
        module = name.removesuffix(".weight")
        group = next(g for g in groups if g.targets == ["Linear"] or module in g.targets)
        state = {key.removeprefix(f"{module}."): x for key, x in tensors.items() if key.startswith(f"{module}.")}
        theirs = BaseCompressor.get_value_from_registry(group.format).decompress(state, group)["weight"]
        assert torch.equal(theirs, dequantize(w, theirs.dtype)), name
        assert theirs.dtype == torch.bfloat16
        n_compared += 1
    assert n_compared == 14


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4", "mixed"])
def test_transformers_computes_the_same_logits(kind: str, tmp_path: Path) -> None:
    # the package decodes 4-bit floats to bfloat16, whatever the dtype of the others
    params = leaves(kind)
    folder = save_compressed(tmp_path, params)
    wanted = Model(llama.FAMILY, CONFIG).forward({n: dense(w, torch.bfloat16).float() for n, w in params.items()}, TOKENS)
    logits = logits_of_transformers(folder, TOKENS).float()
    torch.testing.assert_close(logits, wanted, rtol=0, atol=0.04 * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "activations"), [*((kind, "none") for kind in (*ALL, "mixed")), ("int8", "int8"), ("mixed", "int8")]
)
def test_a_folder_is_read_back_as_what_it_stands_for(kind: str, activations: str, dtype: torch.dtype, tmp_path: Path) -> None:
    params = leaves(kind, dtype)
    folder = save_compressed(tmp_path, params, activations=activations)
    model = models.open(folder)
    assert model.config == CONFIG
    checkpoint.check_weights(folder, model.shapes())
    read = checkpoint.load_params(folder, model.shapes(), dtype)
    assert read.keys() == params.keys()
    for name, w in params.items():
        assert torch.equal(read[name], dense(w, dtype)), name


def test_weights_that_are_served_as_one_share_their_divisor() -> None:
    """vLLM takes one for q, k and v, and one for gate and up: each weight stands for the same as before."""
    sizes = {"q_proj": 1.0, "k_proj": 0.04, "v_proj": 3.0, "gate_proj": 0.5, "up_proj": 0.1}
    params = {
        name: quantize(w * sizes.get(name.split(".")[-2], 1.0), NVFP4()) if is_linear(name) else w
        for name, w in random_params(CONFIG).items()
    }
    shared = with_shared_divisors(params)
    layer = "model.layers.1"
    divisors = {name: float(w.divisor) for name, w in shared.items() if isinstance(w, QNVFP4) and name.startswith(layer)}
    for stem, parts in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
        before = {float(params[f"{layer}.{stem}.{part}.weight"].divisor) for part in parts}
        assert {divisors[f"{layer}.{stem}.{part}.weight"] for part in parts} == {min(before)}
        assert len(before) > 1
    for name, w in shared.items():
        assert torch.equal(dense(w, torch.float32), dense(params[name], torch.float32)), name


def test_codes_that_are_not_symmetric_are_refused(tmp_path: Path) -> None:
    folder = save_compressed(tmp_path, leaves("int4"))
    model = models.open(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    zeros = {f"{name}.weight_zero_point": torch.zeros(16, 2, dtype=torch.int32)}
    save_file({**tensors, **zeros}, folder / "model.safetensors")
    with pytest.raises(
        InputError, match=r"up_proj\.weight \[128, 64\] as .*expected floating point, FP8 .* compressed-tensors; take"
    ):
        checkpoint.load_params(folder, model.shapes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for change in ({"symmetric": False}, {"num_bits": 2}):
        rules = {"weights": {**config["quantization_config"]["config_groups"]["group_0"]["weights"], **change}}
        odd = {**config["quantization_config"], "config_groups": {"group_0": rules}}
        with pytest.raises(
            InputError, match=r"quantized as 'compressed-tensors pack-quantized', expected plain weights, FP8 .* take"
        ):
            models.from_hf({**config, "quantization_config": odd})


def test_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for kind in ("int4", "int8", "mxfp4", "nvfp4"):
        (tmp_path / kind).mkdir()
        folder = save_compressed(tmp_path / kind, leaves(kind))
        tensors = load_file(folder / "model.safetensors")
        scale = "model.layers.1.self_attn.k_proj.weight_scale"
        save_file({**tensors, scale: tensors[scale][:, :1].repeat(1, 3).contiguous()}, folder / "model.safetensors")
        with pytest.raises(InputError, match=r"checkpoint: .* holds model\.layers\.1\.self_attn\.k_proj\.weight \[32, 64\] as"):
            checkpoint.load_params(folder, models.open(folder).shapes())


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_a_program_quantizes_exports_and_goes_on_from_there(kind: str, tiny: Path, tmp_path: Path) -> None:
    quantized = f'[[stage]]\nop = "quantize"\nscheme = {{ kind = "{kind}" }}\n' + evaluation("after")
    exported = '[[stage]]\nop = "export"\nformat = "compressed-tensors"\n'
    summary = run(tmp_path, tiny, quantized + exported)
    again = run(tmp_path, tiny, evaluation("after"), f"model.path={tmp_path / 'p/compressed-tensors'}", name="again")
    assert again["after"]["loss_nats"] == pytest.approx(summary["after"]["loss_nats"], rel=2e-2)
    assert 0 < summary["quantize"]["bytes_after"] < summary["quantize"]["bytes_before"]
    run(tmp_path, tiny, quantized + '[[stage]]\nop = "export"\nformat = "gguf"\n', name="gguf")


def test_int_leaves_are_the_same_codes_again(tmp_path: Path) -> None:
    """Codes and scales of a folder, quantized anew, are those that it holds."""
    for kind, leaf in (("int4", QInt4), ("int8", QInt8)):
        params = leaves(kind, torch.float32)
        (tmp_path / kind).mkdir()
        folder = save_compressed(tmp_path / kind, params)
        read = checkpoint.load_params(folder, models.open(folder).shapes(), torch.float32)
        for name, w in params.items():
            if isinstance(w, leaf):
                assert all(map(torch.equal, quantize(read[name], ALL[kind]), w)), name
