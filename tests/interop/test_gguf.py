"""GGUF files against the gguf package and transformers' reader."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import gguf as reference
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minitune import tree
from minitune.errors import InputError
from minitune.interop.gguf import blocks as gguf_blocks
from minitune.interop.gguf import export, vocabulary
from minitune.interop.gguf.architectures import ARCHITECTURES, architecture, tensor_name
from minitune.interop.gguf.export import Types
from minitune.io import results
from minitune.models import Model, rope_scaling
from minitune.models.families import llama
from minitune.quant.schemes import NF4, Int4, dequantize, quantize
from minitune.quant.tensors import QInt4, QInt8
from minitune.text.tokenizer import open_tokenizer
from support.experts import small_experts
from support.families import LONG, sized
from support.gguf_tokenizers import CUTS, byte_level_folder
from support.models import DENSE, SCALINGS, YARNS, model_of, random_params

CONFIG = llama.Config(n_layers=2, n_heads=4, n_kv_heads=2, d_model=64, d_head=32, d_ff=96, vocab_size=67, max_positions=64)
TOKENS = torch.randint(0, 67, (2, 9), generator=torch.Generator().manual_seed(0))


def varied(config: llama.Config, **changes: Any) -> llama.Config:
    return llama.Config(**{f: getattr(config, f) for f in config.__struct_fields__} | changes)


@pytest.fixture
def nothing(tmp_path: Path) -> Path:
    """A tokenizer that llama.cpp has no counterpart for."""
    import tokenizers

    (tmp_path / "tokenizer").mkdir()
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a")).save(str(tmp_path / "tokenizer/tokenizer.json"))
    return tmp_path / "tokenizer"


def save(path: Path, params: Mapping[str, Any], tokenizer: Path, types: Types, config: llama.Config = CONFIG) -> list[str]:
    return export.save(path, params, Model(llama.FAMILY, config), types, tokenizer=tokenizer, template="{{ x }}", stop_ids=[5])


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in reference.GGUFReader(path).fields.items()}


def dequantized(path: Path) -> dict[str, Tensor]:
    tensors = reference.GGUFReader(path).tensors
    return {t.name: torch.from_numpy(np.array(reference.quants.dequantize(t.data, t.tensor_type))) for t in tensors}


# files


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "atol"), [("F32", 1e-5), ("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 2e-2)])
def test_transformers_reads_the_file_with_the_same_logits(
    kind: Any, atol: float, tied: bool, tmp_path: Path, nothing: Path
) -> None:
    config = varied(CONFIG, tie_embeddings=tied, rope_theta=5e5, norm_eps=1e-3)
    params = random_params(config)
    assert "takes token ids only" in save(tmp_path / "model.gguf", params, nothing, Types(kind), config)[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(TOKENS).logits
    wanted = Model(llama.FAMILY, config).forward(params, TOKENS)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=atol * float(wanted.abs().max()))


def test_names_shapes_numbers_and_alignment(tmp_path: Path, nothing: Path) -> None:
    config = varied(CONFIG, attention_bias=True, mlp_bias=True, n_layers=12)
    params = random_params(config)
    save(tmp_path / "model.gguf", params, nothing, Types("F16"), config)
    tensors = {t.name: t for t in reference.GGUFReader(tmp_path / "model.gguf").tensors}
    names = reference.get_tensor_name_map(reference.MODEL_ARCH.LLAMA, 12)
    wanted = {str(names.get_name(n, (".weight", ".bias"))): w for n, w in params.items()}
    assert tensors.keys() == wanted.keys()
    for name, w in wanted.items():
        assert tuple(tensors[name].shape) == tuple(w.shape)[::-1]
        assert tensors[name].tensor_type.name == ("F32" if w.ndim == 1 else "F16")
        assert tensors[name].data_offset % 32 == 0
    data = dequantized(tmp_path / "model.gguf")
    for kind, heads in (("q", 4), ("k", 2)):  # as in llama.cpp's converter
        for leaf, stored in (("weight", torch.float16), ("bias", torch.float32)):
            w = params[f"model.layers.11.self_attn.{kind}_proj.{leaf}"].to(stored).float()
            permuted = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
            assert torch.equal(data[f"blk.11.attn_{kind}.{leaf}"], permuted)
    assert torch.equal(data["blk.11.attn_v.bias"], params["model.layers.11.self_attn.v_proj.bias"])
    metadata = fields(tmp_path / "model.gguf")
    assert {key: metadata[key] for key in metadata if key.startswith(("llama.", "general."))} == {
        "general.architecture": "llama",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.block_count": 12,
        "llama.feed_forward_length": 96,
        "llama.vocab_size": 67,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 32,
    }
    assert metadata["tokenizer.chat_template"] == "{{ x }}"


def test_types_by_glob_and_what_stands_in_for_rows_that_do_not_fit(tmp_path: Path, nothing: Path) -> None:
    config = varied(CONFIG, d_model=256, d_ff=36)
    types = Types("Q4_K", {"lm_head.weight": "Q6_K", "*.1.mlp.*": "Q6_K", "*.mlp.*": "Q8_0", "*.embed_tokens.weight": "BF16"})
    notes = save(tmp_path / "model.gguf", random_params(config), nothing, types, config)
    kinds = {t.name: t.tensor_type.name for t in reference.GGUFReader(tmp_path / "model.gguf").tensors}
    assert {name: kind for name, kind in kinds.items() if not name.endswith("norm.weight")} == {
        "token_embd.weight": "BF16",
        "output.weight": "Q6_K",
        **{f"blk.{i}.attn_{name}.weight": "Q4_K" for i in range(2) for name in "qkv"},
        **{f"blk.{i}.attn_output.weight": "Q5_0" for i in range(2)},
        **{f"blk.0.ffn_{name}.weight": kind for name, kind in (("gate", "Q8_0"), ("up", "Q8_0"), ("down", "F16"))},
        **{f"blk.1.ffn_{name}.weight": kind for name, kind in (("gate", "Q6_K"), ("up", "Q6_K"), ("down", "F16"))},
    }
    assert [note for note in notes if ".1." in note] == [
        "model.layers.1.self_attn.o_proj.weight is Q5_0, not Q4_K: its rows of 128 are no multiple of 256",
        "model.layers.1.mlp.down_proj.weight is F16, not Q6_K: its rows of 36 are no multiple of 256",
    ]
    assert fields(tmp_path / "model.gguf")["general.file_type"] == 14


@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scaling_is_written_as_llama_cpp_wants_it(name: str, tmp_path: Path, nothing: Path) -> None:
    config = varied(CONFIG, rope_scaling=SCALINGS[name])
    notes = save(tmp_path / "model.gguf", random_params(config), nothing, Types("F32"), config)
    metadata, data = fields(tmp_path / "model.gguf"), dequantized(tmp_path / "model.gguf")
    frequencies = 1e4 ** -(torch.arange(16) / 16) / data.get("rope_freqs.weight", torch.ones(16))
    frequencies = frequencies / metadata.get("llama.rope.scaling.factor", 1.0)
    torch.testing.assert_close(frequencies, rope_scaling.frequencies(32, 1e4, config.rope_scaling, 1, 64))
    assert ("rope_freqs.weight" in data) == (name == "llama3")
    assert metadata.get("llama.rope.scaling.type") == ("linear" if name == "linear" else None)
    assert [n for n in notes if "RoPE" in n] == ["dynamic RoPE scaling left out: llama.cpp is right up to 64 tokens"] * (
        name == "dynamic"
    )


def test_quantized_leaves_keep_their_codes_where_the_blocks_fit(tmp_path: Path, nothing: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    params: dict[str, Any] = random_params(CONFIG)
    eights = QInt8(torch.randint(-127, 128, (128, 64), generator=generator, dtype=torch.int8), torch.rand(128, 1).half().float())
    fours = QInt4(torch.randint(0, 256, (96, 32), generator=generator, dtype=torch.uint8), torch.rand(96, 2).half().float())
    params |= {"model.layers.0.self_attn.q_proj.weight": eights, "model.layers.0.mlp.up_proj.weight": fours}
    whole = eights.codes * eights.scale
    permuted = whole.reshape(4, 2, 16, 64).swapaxes(1, 2).reshape(128, 64)
    save(tmp_path / "model.gguf", params, nothing, Types("Q8_0", {"*.up_proj.weight": "Q4_0"}))
    data = dequantized(tmp_path / "model.gguf")
    assert torch.equal(data["blk.0.attn_q.weight"], permuted)
    codes = torch.stack([fours.codes & 15, fours.codes >> 4], dim=2).flatten(1).float() - 8
    assert torch.equal(data["blk.0.ffn_up.weight"], codes * fours.scale.repeat_interleave(32, 1))
    save(
        tmp_path / "model.gguf",
        {**params, "model.layers.0.mlp.up_proj.weight": params["model.layers.1.mlp.up_proj.weight"]},
        nothing,
        Types("F32"),
    )
    assert torch.equal(dequantized(tmp_path / "model.gguf")["blk.0.attn_q.weight"], permuted)


def test_other_quantized_leaves_are_dequantized(tmp_path: Path, nothing: Path) -> None:
    config = varied(CONFIG, d_model=256)
    plain = random_params(config)
    name, wide = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    params = {**plain, name: quantize(plain[name], Int4(128)), wide: quantize(plain[wide], NF4())}
    whole = {**plain, name: dequantize(params[name], torch.float32), wide: dequantize(params[wide], torch.float32)}
    for kind in ("F32", "Q4_K"):
        files = [tmp_path / "quantized.gguf", tmp_path / "whole.gguf"]
        for file, some in zip(files, (params, whole), strict=True):
            save(file, some, nothing, Types(kind), config)
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_file_written_in_small_pieces_is_the_same_file(tmp_path: Path, nothing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "pieces"):
        save(tmp_path / name, random_params(CONFIG), nothing, Types("Q4_0"))
        monkeypatch.setattr(export, "CHUNK", 3000)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "pieces").read_bytes()


def test_a_save_that_fails_leaves_the_file_that_was_there(tmp_path: Path, nothing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with results.result_file(tmp_path / "model.gguf") as aside:
        aside.write_bytes(b"old")

    def full(w: Tensor, kind: str, importance: None) -> Tensor:
        raise OSError("disk full")

    monkeypatch.setattr(gguf_blocks, "encode", full)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "model.gguf", random_params(CONFIG), nothing, Types("F32"))
    assert (tmp_path / "model.gguf").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".model.gguf{results.MARKER}", "model.gguf", "tokenizer"]


def test_what_can_not_be_written_is_refused(tmp_path: Path, nothing: Path) -> None:
    with pytest.raises(InputError, match=r"gguf: exceptions: '\*\.expert\.\*' matches no weight"):
        save(tmp_path / "model.gguf", random_params(CONFIG), nothing, Types("F16", {"*.expert.*": "F32"}))
    config = varied(CONFIG, vocab_size=1)
    with pytest.raises(InputError, match=r"tokenizer has 2 tokens, expected at most 1, the rows of the embedding"):
        save(tmp_path / "model.gguf", random_params(config), nothing, Types("F16"), config)
    weight = {"model.layers.1.mlp.up_proj.weight": torch.full((96, 64), 7e4)}
    with pytest.raises(InputError, match=r"gguf: blk.1.ffn_up.weight holds 7e\+04, expected numbers up to 65504 as F16"):
        save(tmp_path / "model.gguf", {**random_params(CONFIG), **weight}, nothing, Types("F16"))
    with pytest.raises(InputError, match=r"gguf: blk.1.ffn_up.weight holds nan, expected numbers"):
        save(
            tmp_path / "model.gguf",
            {**random_params(CONFIG), **tree.map(torch.log, tree.map(torch.neg, weight))},
            nothing,
            Types("F32"),
        )


SIZES = {"d_model": 64, "d_head": 16, "d_ff": 32}
REFUSED = {  # (family, fields) -> what is said
    "mixture": (lambda: small_experts("mixtral"), "a model of mixtral, expected one of llama, mistral"),
    "field": (lambda: sized("qwen2", **SIZES, rope_layers=(True, False)), r"rope_layers = \(True, False\) of a qwen2"),
    "bias": (lambda: sized("qwen3", **SIZES, attention_bias=True), "a qwen3 with a bias behind attention"),
    "wide heads": (lambda: sized("olmo2", **SIZES | {"d_head": 32}), "4 heads of 32 in a width of 64"),
    "untied": (lambda: sized("gemma", **SIZES, tie_embeddings=False), "a head apart from the embedding"),
    "tied": (lambda: sized("olmo2", **SIZES, tie_embeddings=True), "a head tied to the embedding"),
    "layers": (lambda: sized("smollm3", **SIZES, rope_layers=(True, False)), "RoPE on other layers than three of four"),
    "scale": (lambda: sized("gemma2", **SIZES, attention_scale=0.1), "scores scaled by 0.1 on 4 layers"),
    "no cap": (lambda: sized("gemma2", **SIZES, final_cap=None), "that have no cap"),
    "bases": (lambda: sized("olmo3", **SIZES), "a RoPE base of 500000 on the layers with windows and of 30 on others"),
    "llama3": (lambda: sized("qwen3", **SIZES, rope_scaling=SCALINGS["llama3"]), "RoPE scaling 'llama3'"),
    "yarn": (lambda: sized("gemma3_text", **SIZES, rope_scaling=YARNS[0]), "RoPE scaling 'yarn'"),
    "ramp": (lambda: sized("llama", **SIZES, rope_scaling=YARNS[1]), "truncate = false"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_computes_in_another_way_is_refused(name: str, tmp_path: Path, nothing: Path) -> None:
    write, message = REFUSED[name]
    config = write()
    model = model_of(config)
    params = {name: torch.empty(shape, device="meta") for name, shape in model.shapes().items()}
    with pytest.raises(InputError, match=f"gguf: .*{message}.*Hugging Face folder"):
        export.check(params, model, Types("F16"), open_tokenizer(nothing))
    with pytest.raises(InputError, match=f"gguf: .*{message}"):
        export.save(tmp_path / "x", params, model, Types("F16"), tokenizer=nothing, template=None, stop_ids=[])


def test_lengths_at_which_llama_cpp_differs_are_said() -> None:
    for config, note in (
        (sized("mistral", window=5), "the window of 5 tokens left out: llama.cpp is right up to 5 tokens"),
        (sized("llama", rope_scaling=SCALINGS["dynamic"]), "dynamic RoPE scaling left out: llama.cpp is right up to 29 tokens"),
        (sized("phi3", rope_scaling=LONG), "longrope: llama.cpp takes the long factors for a context of more than 13 tokens"),
    ):
        assert note in architecture(model_of(config))[1][0]
    assert architecture(model_of(sized("gemma2", window=5)))[1] == []


@pytest.mark.parametrize("name", [name for name in DENSE if name in ARCHITECTURES])
def test_names_of_every_family_are_those_of_the_gguf_package(name: str) -> None:
    config = sized(name, **SIZES, **({"window_rope_theta": 30.0} if name == "olmo3" else {}))
    model = model_of(config)
    arch, _ = architecture(model)
    known = reference.MODEL_ARCH(next(i for i, known in reference.MODEL_ARCH_NAMES.items() if known == arch.name))
    names = reference.get_tensor_name_map(known, config.n_layers)
    for weight in model.shapes():
        assert tensor_name(config, weight) == names.get_name(weight, (".weight", ".bias")), weight


def test_every_key_has_the_type_that_the_gguf_package_writes(tmp_path: Path) -> None:
    """Its writer has a method for each key, which says the type."""
    model = model_of(sized("granite", **SIZES, embedding_multiplier=3, rope_theta=10))  # whole numbers where floats belong
    params = random_params(model.config)
    byte_level_folder(tmp_path, *CUTS["qwen2"])
    with mock.patch.object(vocabulary, "metadata", return_value=({"tokenizer.ggml.model": "none"}, [])):
        export.save(tmp_path / "x.gguf", params, model, Types("F32"), tokenizer=tmp_path, template=None, stop_ids=[])
    writer = reference.GGUFWriter(tmp_path / "y.gguf", "granite")
    writer.add_rope_freq_base(10.0)
    writer.add_embedding_scale(3.0)
    writer.add_residual_scale(1.0)
    writer.add_logit_scale(1.0)
    writer.add_attention_scale(1.0)
    writer.add_layer_norm_rms_eps(1e-3)
    writer.add_head_count(4)
    writer.add_rope_dimension_count(16)
    wanted = {key: value.type for key, value in writer.kv_data[0].items()}
    found = {key: field.types[0] for key, field in reference.GGUFReader(tmp_path / "x.gguf").fields.items()}
    assert {key: found.get(key) for key in wanted} == wanted
