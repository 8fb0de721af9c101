"""Every shape in configs/models is the published one: it decodes, and it counts the parameters that its first line says."""

import math
import re
import tomllib
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minitune import models
from minitune.models.weights import shapes
from support.experts import fused
from support.paths import ROOT

SHAPES = sorted((ROOT / "configs" / "models").glob("*.toml"))


def stated(path: Path) -> int:
    """The parameter count in the comment on top of a shape file."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    match = re.fullmatch(r"# .+: ([\d_]+) parameters", first)
    assert match, f"{path.name}: {first!r}, expected '# NAME: N parameters'"
    return int(match[1])


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_shape_counts_what_was_published(path: Path):
    model = models.open_config(path)
    counted = sum(math.prod(shape) for shape in shapes(model.config).values())
    assert counted == stated(path)


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_shape_says_what_its_name_says(path: Path):
    """llama-3.2-1b has about 1e9 parameters: published names round, and some leave out the embedding, or two."""
    match = re.search(r"-([\d.]+)([mb])(-a[\d.]+b)?$", path.stem)
    if match is None:
        pytest.skip(f"{path.name} names no size")
    named = float(match[1]) * {"m": 1e6, "b": 1e9}[match[2]]
    assert 0.9 * named < stated(path) < 1.5 * named


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_transformers_builds_the_same_weights_from_a_shape(path: Path):
    model = models.open_config(path)
    config = msgspec.structs.replace(model.config, n_layers=4)  # as many as the longest pattern of layers, but for Gemma 3
    hf = {key: value for key, value in model.family.to_hf(config).items() if key != "architectures"}
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf)).state_dict()
        ours = fused({name: torch.empty(shape) for name, shape in shapes(config).items()})
    if config.tie_embeddings:
        theirs.pop("lm_head.weight")
    assert {name: w.shape for name, w in ours.items()} == {name: w.shape for name, w in theirs.items()}


LLAMA_4 = {
    "attention_bias": False, "attention_chunk_size": 8192, "attention_dropout": 0.0,
    "for_llm_compressor": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
    "intermediate_size": 8192, "intermediate_size_mlp": 16384, "model_type": "llama4_text", "num_attention_heads": 40,
    "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 202048,
}  # fmt: skip
PUBLISHED = {  # what the config.json of the folder says, under the names that it uses
    "phi-4-mini": {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 199999, "embd_pdrop": 0.0, "eos_token_id": 199999,
        "full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192,
        "interpolate_factor": 1, "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "phi3", "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096, "pad_token_id": 199999, "partial_rotary_factor": 0.75, "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 200064,
    },
    "qwen2-57b-a14b": {
        "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151643,
        "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
        "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2_moe", "moe_intermediate_size": 2560,
        "norm_topk_prob": False, "num_attention_heads": 28, "num_experts": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 20480,
        "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
        "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "llama-4-scout": {
        **LLAMA_4, "attn_scale": 0.1, "attn_temperature_tuning": 4, "cache_implementation": "hybrid", "floor_scale": 8192,
        "interleave_moe_layer_step": 1, "max_position_embeddings": 10485760,
        "moe_layers": list(range(48)), "no_rope_layers": [1, 1, 1, 0] * 12, "num_local_experts": 16, "use_qk_norm": True,
        "rope_scaling": {
            "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "llama-4-maverick": {
        **LLAMA_4, "interleave_moe_layer_step": 2, "max_position_embeddings": 1048576, "num_local_experts": 128,
        "rope_scaling": None, "use_qk_norm": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_json_is_the_shape_of_its_name(name: str):
    path = next(path for path in SHAPES if path.stem == name)
    wanted, said = models.open_config(path), PUBLISHED[name]
    if name == "phi-4-mini":  # its factors are long
        scaling = wanted.config.rope_scaling
        factors = {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
        said = {**said, "rope_scaling": {"type": "longrope", **factors}}
    assert models.from_hf(said) == wanted


def test_every_family_has_a_shape():
    assert {tomllib.loads(path.read_text(encoding="utf-8"))["family"] for path in SHAPES} == set(models.FAMILIES)


def test_the_well_known_llamas_are_there():
    named = {path.stem for path in SHAPES}
    assert {
        "llama-2-7b",
        "llama-3-8b",
        "llama-3.1-405b",
        "llama-3.2-1b",
        "llama-3.3-70b",
        "tinyllama-1.1b",
        "smollm2-135m",
    } <= named


@pytest.mark.parametrize("path", [path for path in SHAPES if re.match(r"llama-3\.[123]", path.stem)], ids=lambda path: path.stem)
def test_llama_3_positions_are_scaled(path: Path):
    """The five numbers of transformers' llama3 scaling: 8192 positions were trained on first, and 131072 are reached by it."""
    model = models.open_config(path)
    scaling = model.config.rope_scaling
    factor = 32.0 if "3.2" in path.stem else 8.0
    assert model.config.max_positions == 131072
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings) == (
        factor,
        1.0,
        4.0,
        8192,
    )
