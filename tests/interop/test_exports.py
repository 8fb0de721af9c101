"""Quantized folders and files as other programs read them: the same weights, the same logits, the same bytes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from minitune.checkpoint import FolderExtras
from minitune.errors import InputError
from minitune.interop import bitsandbytes as nf4_layout
from minitune.interop import compressed_tensors
from minitune.models import Model, block
from minitune.models.families import llama
from minitune.quant.nf4 import with_scales
from minitune.quant.schemes import Int8, quantize
from minitune.quant.tensors import QNF4, QInt4, QInt8
from support.experts import small_experts
from support.models import model_of, random_params, reference
from support.quantized import CONFIG, TOKENS, dense, folder_of, int4, int8, is_linear, logits_of_transformers, save_compressed

SCHEMES = {
    "w4 groups of 32": lambda name, w: int4(w, 32) if is_linear(name) else w,
    "w4 groups of 16": lambda name, w: int4(w, 16) if is_linear(name) else w,
    "w8": lambda name, w: int8(w) if is_linear(name) else w,
    "w8 and head": lambda name, w: int8(w) if is_linear(name) or name == "lm_head.weight" else w,
    "w4 and w8": lambda name, w: int4(w, 32) if ".mlp." in name else int8(w) if is_linear(name) else w,
    "one layer": lambda name, w: int4(w, 32) if is_linear(name) and ".0." in name else w,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_load_in_transformers_with_the_same_logits(name: str, tied: bool, tmp_path: Path) -> None:
    config = llama.Config(**{f: getattr(CONFIG, f) for f in CONFIG.__struct_fields__} | {"tie_embeddings": tied})
    params = {n: SCHEMES[name](n, w) for n, w in random_params(config).items()}
    folder = save_compressed(tmp_path, params, config)
    wanted = Model(llama.FAMILY, config).forward({n: dense(w) for n, w in params.items()}, TOKENS)
    torch.testing.assert_close(logits_of_transformers(folder, TOKENS), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_w8a8_rounds_the_activations_of_every_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {n: SCHEMES["w8"](n, w) for n, w in random_params(CONFIG).items()}
    folder = save_compressed(tmp_path, params, activations="int8")

    def linear(x: Tensor, w: Any, delta: None = None, bias: None = None) -> Tensor:
        if isinstance(w, QInt8):
            scale = x.abs().amax(-1, keepdim=True) / 127.5
            x = (x / scale).round().clamp(-128, 127) * scale
        return x @ dense(w).T

    plain = Model(llama.FAMILY, CONFIG).forward({n: dense(w) for n, w in params.items()}, TOKENS)
    monkeypatch.setattr(block, "linears", lambda x, weights, _: [linear(x, w) for w in weights])
    wanted = Model(llama.FAMILY, CONFIG).forward(params, TOKENS)
    logits, atol = logits_of_transformers(folder, TOKENS), 1e-5 * float(wanted.abs().max())
    torch.testing.assert_close(logits, wanted, rtol=0, atol=atol)
    assert (plain - wanted).abs().max() > 100 * atol


def test_w8a8_beside_w4a16_is_mixed_precision(tmp_path: Path) -> None:
    params = {n: SCHEMES["w4 and w8"](n, w) for n, w in random_params(CONFIG).items()}
    folder = save_compressed(tmp_path, params, activations="int8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == ["int-quantized", "pack-quantized"]
    wanted = Model(llama.FAMILY, CONFIG).forward({n: dense(w) for n, w in params.items()}, TOKENS)
    torch.testing.assert_close(logits_of_transformers(folder, TOKENS), wanted, rtol=0, atol=0.05 * float(wanted.abs().max()))


@given(out=st.integers(1, 9), half=st.integers(1, 19), seed=st.integers(0, 2**32))
def test_packed_words_equal_those_of_compressed_tensors(out: int, half: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (out, half), generator=generator, dtype=torch.uint8)
    nibbles = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1).to(torch.int8) - 8
    for w, values, bits in (
        (QInt4(codes, torch.ones(out, 1)), nibbles, 4),
        (QInt8(codes.view(torch.int8), torch.ones(out, 1)), codes.view(torch.int8), 8),
    ):
        entries = compressed_tensors.stored("m", w, "none")
        assert torch.equal(entries["m.weight_packed"], pack_to_int32(values, bits))
        assert entries["m.weight_shape"].tolist() == list(values.shape)


def test_a_compressed_folder_in_bfloat16(tmp_path: Path) -> None:
    params = {n: SCHEMES["w4 groups of 32"](n, w) for n, w in random_params(CONFIG, dtype=torch.bfloat16).items()}
    folder = save_compressed(tmp_path, params)
    tensors = load_file(folder / "model.safetensors")
    assert {str(w.dtype) for n, w in tensors.items() if n.endswith("scale")} == {"torch.bfloat16"}
    rounded = {n: w._replace(scale=w.scale.bfloat16()) if isinstance(w, QInt4) else w for n, w in params.items()}
    wanted = Model(llama.FAMILY, CONFIG).forward({n: dense(w).bfloat16() for n, w in rounded.items()}, TOKENS)
    # transformers rounds every activation to bfloat16; minitune does so only where the processor multiplies it
    logits = logits_of_transformers(folder, TOKENS).float()
    torch.testing.assert_close(logits, wanted.float(), rtol=0, atol=0.04 * float(wanted.abs().max()))


NF4 = QNF4(torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8), torch.ones(1), torch.ones(()))


@pytest.mark.parametrize(
    ("leaf", "activations", "message"),
    [
        (
            NF4,
            "none",
            r"q_proj.weight is NF4, expected int8, int4, float8, mxfp4 or nvfp4; write NF4 in the format 'bitsandbytes'",
        ),
        (torch.ones(64, 64), "none", "no weight is quantized, expected int8, int4, float8, mxfp4 or nvfp4 leaves"),
        (int4(torch.ones(64, 64), 32), "int8", "activations = 'int8' but no weight is int8"),
    ],
)
def test_what_compressed_tensors_can_not_hold_is_refused(leaf: Any, activations: str, message: str, tmp_path: Path) -> None:
    params = {**random_params(CONFIG), "model.layers.0.self_attn.q_proj.weight": leaf}
    with pytest.raises(InputError, match=message):
        save_compressed(tmp_path, params, activations=activations)
    assert not (tmp_path / "model").exists()


# NF4


def nf4(w: Tensor) -> QNF4:
    """A weight as bitsandbytes itself quantizes it."""
    codes, state = bitsandbytes.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    return with_scales(codes.view(w.shape[0], -1), state.absmax, state.state2.absmax, state.offset)


def save_nf4(tmp_path: Path, params: Mapping[str, Any], config: llama.Config = CONFIG) -> Path:
    nf4_layout.save(tmp_path / "model", params, Model(llama.FAMILY, config), FolderExtras(folder_of(tmp_path), [3]))
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_nf4_folders_equal_those_that_transformers_writes(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    config = llama.Config(**{f: getattr(CONFIG, f) for f in CONFIG.__struct_fields__} | {"tie_embeddings": tied})
    plain = random_params(config, dtype=dtype)
    reference(config, plain).save_pretrained(tmp_path / "plain")
    asked = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=asked).save_pretrained(tmp_path / "theirs")
    folder = save_nf4(tmp_path, {n: nf4(w) if is_linear(n) else w for n, w in plain.items()}, config)
    wanted, written = (load_file(path / "model.safetensors") for path in (tmp_path / "theirs", folder))
    assert written.keys() == wanted.keys()
    assert all(written[name].dtype == w.dtype and torch.equal(written[name], w) for name, w in wanted.items())
    configs = [
        json.loads((path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        for path in (tmp_path / "theirs", folder)
    ]
    assert configs[1].pop("llm_int8_skip_modules") == ["lm_head"]
    assert configs[1].items() <= configs[0].items()


@pytest.mark.parametrize("reach", [".mlp.", "_proj.", ""])
def test_nf4_folders_load_in_transformers_with_the_same_logits(reach: str, tmp_path: Path) -> None:
    plain = random_params(CONFIG)
    params = {n: nf4(w) if reach in n and w.ndim == 2 and "embed" not in n else w for n, w in plain.items()}

    def whole(w: Any) -> Tensor:
        if not isinstance(w, QNF4):
            return w
        dynamic, table = bitsandbytes.functional.create_dynamic_map(), bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
        nested = w.nested_absmax.repeat_interleave(256)[: w.absmax.numel()]
        absmax = dynamic[w.absmax.flatten().int()] * nested + w.offset
        codes = torch.stack([w.codes >> 4, w.codes & 15], dim=2).view(-1, 64).int()
        return (table[codes] * absmax[:, None]).view(w.shape)

    wanted = Model(llama.FAMILY, CONFIG).forward({n: whole(w) for n, w in params.items()}, TOKENS)
    # bitsandbytes' own matmul rounds to bfloat16 on some processors; its weights are compared here
    model = AutoModelForCausalLM.from_pretrained(save_nf4(tmp_path, params)).dequantize().eval()
    with torch.no_grad():
        logits = model(TOKENS).logits
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_what_bitsandbytes_can_not_hold_is_refused(tmp_path: Path) -> None:
    params = random_params(CONFIG)
    with pytest.raises(InputError, match="no weight is quantized, expected NF4 leaves"):
        save_nf4(tmp_path, params)
    for leaf, name in ((int8(torch.ones(64, 64)), "int8"), (int4(torch.ones(64, 64), 32), "int4")):
        with pytest.raises(
            InputError, match=f"v_proj.weight is {name}, expected NF4; write it in the format 'compressed-tensors'"
        ):
            save_nf4(tmp_path, {**params, "model.layers.1.self_attn.v_proj.weight": leaf})


def test_experts_that_transformers_can_not_load_are_refused_or_said() -> None:
    model = model_of(small_experts("mixtral"))
    params = {name: torch.empty(shape, device="meta") for name, shape in model.shapes().items()}
    expert = next(name for name in params if name.endswith("experts.1.w2.weight"))
    codes = {name: nf4(torch.ones(64, 64)) for name in (expert, "model.layers.0.self_attn.q_proj.weight")}
    with pytest.raises(InputError, match=r"bitsandbytes: .*experts\.1\.w2\.weight is NF4, expected dense experts"):
        nf4_layout.check({**params, **codes})
    nf4_layout.check({**params, "model.layers.0.self_attn.q_proj.weight": nf4(torch.ones(64, 64))})
    some = {**params, expert: quantize(torch.ones(64, 64), Int8())}
    assert "is not quantized: transformers loads no such folder" in compressed_tensors.notes(some)[0]
    every = {name: quantize(torch.ones(4, 4), Int8()) if ".experts." in name else w for name, w in params.items()}
    assert compressed_tensors.notes(every) == []
