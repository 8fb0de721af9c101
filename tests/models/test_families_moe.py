"""Families with experts equal transformers, with their gradients, and each of their mechanisms is shown to matter."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from minitune import checkpoint, models
from minitune.algorithms import gptq
from minitune.errors import InputError
from minitune.hardware import product_dtype
from minitune.inference.generate import greedy
from minitune.lora import Lora, check_deltas
from minitune.models import Model
from minitune.models.experts import Experts
from minitune.models.families import gpt_oss, llama4, mixtral, qwen3_moe
from minitune.models.rope_scaling import Yarn
from minitune.models.weights import shapes
from minitune.nn import moe
from minitune.quant.rules import Quantization
from minitune.quant.schemes import NF4, Int8
from minitune.quant.tensors import QInt8
from minitune.types import Delta
from support.closeness import distance
from support.experts import WITH_EXPERTS, small_experts
from support.models import (
    answers,
    check_against_transformers,
    random_batch,
    random_params,
    reference,
    separation,
)

ATOL = 1e-5  # of the largest value
SEEDS = st.integers(0, 2**32)


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text"])
def test_experts_in_one_kernel_equal_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = small_experts(name)
    widths = {"d_ff": 8, "d_shared": small.experts.d_shared and 8}
    config = msgspec.structs.replace(small, d_model=16, d_ff=8, experts=msgspec.structs.replace(small.experts, **widths))
    taken, has_kernel = [], moe.in_one_kernel
    monkeypatch.setattr(moe, "_has_kernel", lambda x: x.element_size() == 4)
    monkeypatch.setattr(moe, "in_one_kernel", lambda *args: taken.append(has_kernel(*args)) or taken[-1])
    check_against_transformers(config, random_params(config), random_batch(config, 2, 23).tokens, 0)
    assert any(taken)


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_greedy_decoding_equals_the_full_forward(name: str) -> None:
    config = small_experts(name)
    params, model = random_params(config, 2), Model(models.FAMILIES[name], config)
    prompts = [torch.randint(0, 17, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 9, 4)]
    answers = greedy(model, params, prompts, max_new_tokens=6, stop_ids=[])
    for prompt, row in zip(prompts, answers, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(model.forward(params, torch.tensor([tokens]))[0, -1].argmax()))
        assert row == tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("dora", [False, True])
def test_deltas_on_every_linear_map_equal_merged_weights(name: str, dora: bool) -> None:
    config = small_experts(name)
    params, model = random_params(config, 3, torch.float64), Model(models.FAMILIES[name], config)
    targets = ("*self_attn.*_proj.weight", "*.experts.*.weight", "*gate.weight", "*shared_expert.*_proj.weight", "lm_head.weight")
    present = tuple(glob for glob in targets if "shared" not in glob or name == "qwen2_moe")
    rule = Lora(rank=2, alpha=3.0, targets=present, dora=dora)
    generator = torch.Generator().manual_seed(3)
    deltas = {
        key: d._replace(a=d.a.double(), b=torch.randn(d.b.shape, generator=generator, dtype=torch.float64))
        for key, d in rule.init(params, 0).items()
    }
    assert sum(".experts." in key for key in deltas) == 3 * 5 * sum(config.experts.at(i) for i in range(2))
    tokens = random_batch(config, 2, 19).tokens
    adapted = model.forward(rule.apply(params, deltas), tokens)
    assert distance(adapted, model.forward(rule.merge(params, deltas), tokens)) <= 1e-6 if dora else 1e-10
    assert distance(adapted, model.forward(params, tokens)) > 0.01


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text"])
def test_deltas_on_all_experts_at_once_equal_merged_weights(name: str) -> None:
    config = small_experts(name)
    params, model = random_params(config, 3, torch.float64), Model(models.FAMILIES[name], config)
    rule = Lora(rank=3, alpha=2.0, targets=("*.experts.*_proj", "*.router.weight", "*o_proj.weight"), ranks={"*.down_proj": 2})
    fresh = rule.init(params, 0)
    tokens = random_batch(config, 2, 19).tokens
    assert torch.equal(model.forward(rule.apply(params, fresh), tokens), model.forward(params, tokens))
    generator = torch.Generator().manual_seed(3)
    deltas = {
        key: d._replace(a=d.a.double(), b=torch.randn(d.b.shape, generator=generator, dtype=torch.float64))
        for key, d in fresh.items()
    }
    check_deltas(params, deltas, "here")
    assert {round(6 * rule.scale(d)) for key, d in deltas.items() if "down_proj" in key} == {6}  # 2 / 2
    assert {round(6 * rule.scale(d)) for key, d in deltas.items() if "gate_up_proj" in key} == {4}  # 2 / 3
    adapted = model.forward(rule.apply(params, deltas), tokens)
    assert distance(adapted, model.forward(rule.merge(params, deltas), tokens)) <= 1e-10
    experts = {key: d for key, d in deltas.items() if ".experts." in key}
    assert distance(adapted, model.forward(rule.apply(params, {**deltas, **{key: fresh[key] for key in experts}}), tokens)) > 0.01


def test_a_delta_that_does_not_fit_all_experts_is_refused() -> None:
    params = random_params(small_experts("gpt_oss"))
    name = "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(InputError, match=r"holds all experts of a layer, expected dora = false for it"):
        Lora(rank=2, alpha=1.0, targets=(name,), dora=True).init(params, 0)
    with pytest.raises(InputError, match=r"down_proj_bias \[5, 12\] is not a linear weight"):
        Lora(rank=2, alpha=1.0, targets=(f"{name}_bias",)).init(params, 0)
    stack = r"down_proj \[5, 7, 12\] holds all experts of a layer in one tensor, .*; leave it .* keep = .*\*\.down_proj"
    for scheme in (NF4(), Int8()):
        with pytest.raises(InputError, match=stack):
            Quantization(scheme, (name,)).plan(params)
    with pytest.raises(InputError, match=r"has a \[2, 12\] and b \[7, 2\] for .*, expected \[5, r, 12\] and \[5, 7, r\]"):
        check_deltas(params, {name: Delta(torch.ones(2, 12), torch.ones(7, 2))}, "an adapter")


MUTATIONS = {
    "experts in another order": lambda maps: maps._replace(weights=list(maps.weights)[::-1], biases=list(maps.biases)[::-1]),
    "one expert for all": lambda maps: maps._replace(weights=[maps.weights[0]] * len(maps.weights)),
}


@pytest.mark.parametrize("name", WITH_EXPERTS)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_golden_test_fails_when_experts_are_mistaken(name: str, mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_experts(name)
    params, tokens, model = random_params(config), random_batch(config, 2, 23).tokens, Model(models.FAMILIES[name], config)
    mixture, mutant = moe.mixture, MUTATIONS[mutation]
    with torch.no_grad():
        wanted = reference(config, params)(tokens).logits
        assert distance(model.forward(params, tokens), wanted) <= ATOL
        monkeypatch.setattr(
            moe, "mixture", lambda x, r, into, act, out, **k: mixture(x, r, [mutant(i) for i in into], act, mutant(out), **k)
        )
        assert distance(model.forward(params, tokens), wanted) > 100 * ATOL


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
def test_the_golden_test_fails_when_a_router_learns_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_experts(name)
    params, tokens, rule = random_params(config), random_batch(config, 2, 23).tokens, config.experts.router
    route = getattr(moe, rule)
    monkeypatch.setattr(moe, rule, lambda logits, *rest: route(logits.detach(), *rest))
    logits, grads = separation(*answers(config, params, tokens, 0))
    assert logits <= ATOL
    assert grads > 100 * ATOL


CHANGES = {
    "another k": {"n_active": 3},
    "weights not divided by their sum, or divided": {"renormalised": None},
    "no gate of the shared expert": {"shared_gate": False},
    "another limit": {"limit": 7.0},
    "another slope": {"slope": 1.0},
    "softmax for sigmoid": {"router": "top_then_softmax"},
    "softmax over all": {"router": "softmax_then_top", "renormalised": False},
}
WHERE = {
    "weights not divided by their sum, or divided": ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"),
    "no gate of the shared expert": ("qwen2_moe",),
    "softmax for sigmoid": ("llama4_text",),
    **dict.fromkeys(["another limit", "another slope", "softmax over all"], ("gpt_oss",)),
}


@pytest.mark.parametrize(("name", "change"), [(name, change) for change in CHANGES for name in WHERE.get(change, WITH_EXPERTS)])
def test_the_golden_test_fails_when_a_number_of_the_experts_is_another(name: str, change: str) -> None:
    config = small_experts(name)
    params, tokens = random_params(config), random_batch(config, 2, 23).tokens
    fields = {key: not config.experts.renormalised if value is None else value for key, value in CHANGES[change].items()}
    wrong = msgspec.structs.replace(config, experts=msgspec.structs.replace(config.experts, **fields))
    with torch.no_grad():
        wanted = reference(config, params)(tokens).logits
        assert distance(Model(models.FAMILIES[name], config).forward(params, tokens), wanted) <= ATOL
        assert distance(Model(models.FAMILIES[name], wrong).forward(params, tokens), wanted) > 100 * ATOL


LLAMA4 = {
    "chunks": {"chunk": None},
    "width of a chunk": {"chunk": 4},
    "which layers have chunks": {"layer_types": ("full", "chunked")},
    "layers without RoPE": {"rope_layers": (True,)},
    "interleaved": {"rope_layout": "half"},
    "norm of turned heads": {"qk_norm": "none"},
    "growth of queries": {"nope_growth": None},
    "where queries grow": {"nope_span": 5},
}


@pytest.mark.parametrize("mechanism", LLAMA4)
def test_the_golden_test_fails_without_what_llama_4_adds(mechanism: str) -> None:
    config = small_experts("llama4_text")
    params, tokens = random_params(config), random_batch(config, 2, 23).tokens
    wrong = msgspec.structs.replace(config, **LLAMA4[mechanism])
    with torch.no_grad():
        wanted = reference(config, params)(tokens).logits
        assert distance(Model(llama4.FAMILY, config).forward(params, tokens), wanted) <= ATOL
        assert distance(Model(llama4.FAMILY, wrong).forward(params, tokens), wanted) > 100 * ATOL


@pytest.mark.parametrize("dropped", ["sinks", "router.bias", "gate_up_proj_bias", "down_proj_bias", "q_proj.bias", "o_proj.bias"])
def test_the_golden_test_fails_without_what_gpt_oss_adds(dropped: str) -> None:
    config = small_experts("gpt_oss")
    params, tokens = random_params(config), random_batch(config, 2, 23).tokens
    with torch.no_grad():
        wanted = reference(config, params)(tokens).logits
        kept = {key: w for key, w in params.items() if not key.endswith(dropped)}
        assert distance(Model(gpt_oss.FAMILY, config).forward(params, tokens), wanted) <= ATOL
        assert distance(Model(gpt_oss.FAMILY, config).forward(kept, tokens), wanted) > 100 * ATOL


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_bfloat16_is_within_its_own_rounding_of_float32(name: str) -> None:
    config = small_experts(name)
    params, tokens = random_params(config), random_batch(config, 3, 19).tokens
    half = {key: w.bfloat16() for key, w in params.items()}
    exact = Model(models.FAMILIES[name], config).forward({key: w.float() for key, w in half.items()}, tokens)
    rounded = Model(models.FAMILIES[name], config).forward(half, tokens)
    with torch.no_grad():
        theirs = reference(config, half)(tokens).logits
    assert rounded.dtype == product_dtype(torch.bfloat16, torch.device("cpu"))
    # a token whose logits are all but equal may go to another expert: medians, which such a token does not move
    error, their_error = ((some.float() - exact).detach().abs().median() for some in (rounded, theirs))
    assert error <= 2 * their_error


def test_what_experts_can_not_be_is_refused() -> None:
    with pytest.raises(ValueError, match="n_active 3 is more than n_experts 2"):
        Experts(2, 3, 7, "qwen")
    with pytest.raises(ValueError, match="layers is empty, expected a pattern such as"):
        Experts(2, 1, 7, "mixtral", layers=())
    hf = qwen3_moe.FAMILY.to_hf(small_experts("qwen3_moe"))
    with pytest.raises(InputError, match="n_active 9 is more than n_experts 5"):
        models.from_hf({**hf, "num_experts_per_tok": 9})
    with pytest.raises(InputError, match="'shared_expert_intermediate_size' = 4, unknown to the qwen3_moe family"):
        models.from_hf({**hf, "shared_expert_intermediate_size": 4})


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_experts_that_are_stored_fused_are_read_and_saved_as_published(name: str, tmp_path: Path) -> None:
    config = small_experts(name)
    params, tokens = random_params(config), random_batch(config, 2, 9).tokens
    hf = reference(config, params)
    hf.save_pretrained(tmp_path / "fused", save_original_format=False)
    stored = checkpoint.load_tensors(tmp_path / "fused/model.safetensors")
    assert any(n.endswith("experts.gate_up_proj") and w.ndim == 3 for n, w in stored.items())
    model = models.open(tmp_path / "fused")
    checkpoint.check_weights(tmp_path / "fused", model.shapes())
    loaded = checkpoint.load_params(tmp_path / "fused", model.shapes())
    assert loaded.keys() == params.keys()
    assert all(w.equal(params[n]) for n, w in loaded.items())
    extras = checkpoint.FolderExtras(tmp_path, [2], source=tmp_path / "fused")
    checkpoint.save_folder(tmp_path / "saved", loaded, model, extras)
    assert checkpoint.load_tensors(tmp_path / "saved/model.safetensors").keys() == params.keys()
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", experts_implementation="eager")(tokens).logits
        assert torch.equal(again, hf(tokens).logits)


def test_fused_experts_of_another_shape_are_refused(tmp_path: Path) -> None:
    config = small_experts("qwen3_moe")
    reference(config, random_params(config)).save_pretrained(tmp_path / "fused", save_original_format=False)
    path, name = tmp_path / "fused/model.safetensors", "model.layers.0.mlp.experts.gate_up_proj"
    stored = {key: w.clone() for key, w in checkpoint.load_tensors(path).items()}  # the file is written over
    checkpoint.save_tensors(path, {**stored, name: stored[name].mT})
    shapes = models.open(tmp_path / "fused").shapes()
    n, out, in_ = stored[name].shape
    message = rf"holds {name} of shape \[{n}, {in_}, {out}\], expected \[{n}, {out}, {in_}\]"
    for read in (checkpoint.check_weights, checkpoint.load_params):
        with pytest.raises(InputError, match=message):
            read(tmp_path / "fused", shapes)


def mxfp4_folder(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """A gpt-oss whose experts are packed on disk, and all its weights unpacked by transformers."""
    sizes = {"d_model": 32, "d_ff": 64, "experts": msgspec.structs.replace(small_experts("gpt_oss").experts, d_ff=64)}
    config = msgspec.structs.replace(small_experts("gpt_oss"), **sizes)
    generator = torch.Generator().manual_seed(9)
    stored, whole = {}, {}
    for name, w in random_params(config).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            n, in_, out = w.shape
            blocks = torch.randint(0, 256, (n, out, in_ // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(118, 128, (n, out, in_ // 32), generator=generator, dtype=torch.uint8)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            whole[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        else:
            stored[name] = whole[name] = w.bfloat16()
    folder.mkdir()
    checkpoint.save_tensors(folder / "model.safetensors", stored)
    hf = {**gpt_oss.FAMILY.to_hf(config), "dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(hf), encoding="utf-8")
    return config, whole


def test_mxfp4_experts_are_unpacked_as_transformers_does_and_saved_plain(tmp_path: Path) -> None:
    config, wanted = mxfp4_folder(tmp_path / "packed")
    model = models.open(tmp_path / "packed")
    assert model.config == config
    params = checkpoint.load_params(tmp_path / "packed", model.shapes())
    assert list(params) == list(wanted)
    assert all(torch.equal(params[name], w) for name, w in wanted.items())
    checkpoint.save_folder(tmp_path / "plain", params, model, checkpoint.FolderExtras(tmp_path, [2], source=tmp_path / "packed"))
    again = checkpoint.load_params(tmp_path / "plain", models.open(tmp_path / "plain").shapes())
    assert all(torch.equal(again[name], w) for name, w in wanted.items())
    tokens = random_batch(config, 2, 19).tokens
    with torch.no_grad():
        hf = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
        logits = model.forward({name: w.float() for name, w in params.items()}, tokens)
        assert distance(logits, hf(tokens).logits) <= ATOL


@pytest.mark.parametrize("part", ["_blocks", "_scales"])
def test_mxfp4_parts_that_do_not_fit_are_refused(part: str, tmp_path: Path) -> None:
    mxfp4_folder(tmp_path / "packed")
    path, name = tmp_path / "packed" / "model.safetensors", "model.layers.1.mlp.experts.down_proj"
    stored = {key: w.clone() for key, w in checkpoint.load_tensors(path).items()}  # the file is written over
    for changed in ({}, {f"{name}{part}": stored[f"{name}{part}"][:, 1:]}):
        rest = {key: w for key, w in stored.items() if key != f"{name}{part}"}
        checkpoint.save_tensors(path, {**rest, **changed})
        with pytest.raises(
            InputError, match=r"holds model.layers.1.mlp.experts.down_proj \[5, 64, 32\] as MXFP4 blocks .* expected"
        ):
            checkpoint.load_params(tmp_path / "packed", models.open(tmp_path / "packed").shapes())


def test_gpt_oss_in_another_quantized_format_is_refused() -> None:
    hf = gpt_oss.FAMILY.to_hf(small_experts("gpt_oss"))
    with pytest.raises(InputError, match="is quantized as 'awq', expected plain weights, MXFP4, FP8"):
        models.from_hf({**hf, "quantization_config": {"quant_method": "awq"}})


def test_gpt_oss_without_rope_parameters_has_the_yarn_of_its_paper() -> None:
    hf = {key: value for key, value in gpt_oss.FAMILY.to_hf(small_experts("gpt_oss")).items() if not key.startswith("rope")}
    config = models.from_hf(hf).config
    assert config.rope_theta == 150000.0
    assert config.rope_scaling == Yarn(32.0, 4096, beta_fast=32.0, beta_slow=1.0, truncate=False)


def test_gptq_reaches_every_expert_that_has_tokens() -> None:
    config = msgspec.structs.replace(small_experts("mixtral"), experts=Experts(3, 2, 8, "mixtral"), d_ff=8)
    params, batch = random_params(config), random_batch(config, 4, 29, packed=False)
    rule = Quantization(Int8(), ("*.experts.*.weight",))
    quantized = gptq.gptq(Model(mixtral.FAMILY, config), params, [batch], rule, damp=0.01)
    plain = rule.quantize(params)
    names = [name for name in params if ".experts." in name]
    assert all(isinstance(quantized[name], QInt8) for name in names)
    assert not all(torch.equal(quantized[name].codes, plain[name].codes) for name in names)
    exact, rounded = (Model(mixtral.FAMILY, config).forward(some, batch.tokens) for some in (params, quantized))
    assert 0 < distance(rounded, exact) < 0.2


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_random_weights_of_experts_start_small(name: str) -> None:
    weights = Model(models.FAMILIES[name], small_experts(name)).init(0)
    assert list(weights) == list(shapes(small_experts(name)))
    for key, w in weights.items():
        if key.endswith("norm.weight"):
            assert torch.equal(w, torch.ones_like(w))
        elif key.endswith(("bias", "sinks")):
            assert not w.any()
        else:
            writes = key.endswith(("o_proj.weight", "down_proj.weight", ".w2.weight", "experts.down_proj"))
            assert float(w.std()) == pytest.approx(0.01 if writes else 0.02, rel=0.6)
