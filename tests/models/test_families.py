"""Every family equals transformers, with its gradients, and each of its mechanisms is shown to matter."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from minitune import checkpoint, hardware, models
from minitune.checkpoint.carried import notes
from minitune.errors import InputError
from minitune.hardware import product_dtype
from minitune.interop.gguf import export
from minitune.losses.token import CrossEntropy, cross_entropy
from minitune.models import block, decoder, rope_scaling
from minitune.models.config import DecoderConfig
from minitune.models.families import gemma3, llama, mistral
from minitune.models.mixers import grouped_query
from minitune.models.weights import NORMS, head_name
from minitune.nn.attention.attention import attention
from minitune.nn.attention.key_range import (
    KeyRange,
    causal,
    chunked,
    document_keys,
    document_lengths,
    windowed,
)
from support.closeness import distance
from support.families import IMAGES, LONG, MECHANISMS, VISION, YARN, check_decoding, check_packing, config_of, sized
from support.models import (
    DENSE,
    answers,
    family_configs,
    family_of,
    model_of,
    random_batch,
    random_params,
    reference,
    separation,
)

ATOL = 1e-5  # of the largest value
SEEDS = st.integers(0, 2**32)


@pytest.mark.parametrize("name", DENSE)
@settings(max_examples=2)
@given(data=st.data(), seed=SEEDS)
def test_bfloat16_is_within_its_own_rounding_of_float32(name: str, data: st.DataObject, seed: int) -> None:
    """As transformers is, each token measured by what rounding does to it: how far its logits go when every weight is moved by
    up to a rounding of bfloat16. A norm behind a sum that nearly vanishes makes one token's error ten times the others'; taken
    as they are, errors would say by what chance that one was rounded. Of 2,000 draws the worst was 1.39 times transformers'."""
    config = data.draw(family_configs(name))
    half = {n: w.bfloat16() for n, w in random_params(config, seed).items()}
    tokens = random_batch(config, 2, 17, seed).tokens
    wide, generator = {n: w.float() for n, w in half.items()}, torch.Generator().manual_seed(seed)
    exact, rounded = (model_of(config).forward(params, tokens) for params in (wide, half))
    with torch.no_grad():
        theirs = reference(config, half)(tokens).logits
    assert rounded.dtype == product_dtype(torch.bfloat16, torch.device("cpu"))

    def squares(some: torch.Tensor) -> torch.Tensor:
        return (some.float() - exact).square().mean(-1)

    def moved(w: torch.Tensor) -> torch.Tensor:
        return w * (1 + 2**-8 * (2 * torch.rand(w.shape, generator=generator) - 1))

    felt = sum(squares(model_of(config).forward({n: moved(w) for n, w in wide.items()}, tokens)) for _ in range(4)) / 4
    error, their_error = ((squares(some) / felt).mean().sqrt() for some in (rounded, theirs))
    assert error <= 1.7 * their_error


UNFELT = {  # a gradient that gets lost, while every logit stays as it is
    "through the norms": (
        "llama",
        block,
        "rms_norm",
        lambda x, w, eps, *kind: w * x * torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + eps),
    ),
    "to the keys": (
        "llama",
        grouped_query,
        "attention",
        lambda q, k, v, *mask, **rest: attention(q, k.detach(), v, *mask, **rest),
    ),
    "to a tied embedding": ("gemma", decoder, "embed", lambda tokens, w: F.embedding(tokens, w.detach())),
    "to the gate": ("llama", block, "ACTIVATIONS", {"silu": lambda gate, up: F.silu(gate.detach()) * up}),
}


@pytest.mark.parametrize("name", UNFELT)
def test_the_comparison_fails_when_a_gradient_is_lost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, module, attribute, mutant = UNFELT[name]
    config = sized(family, n_layers=2)
    params, tokens = random_params(config), random_batch(config, 2, 11).tokens
    monkeypatch.setattr(module, attribute, mutant)
    logits, grads = separation(*answers(config, params, tokens, 0))
    assert logits <= ATOL
    assert grads > 100 * ATOL


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_comparison_fails_when_a_mechanism_is_taken_out(name: str) -> None:
    family, fields, changes = MECHANISMS[name]
    config = sized(family, **fields)
    params, tokens = random_params(config), random_batch(config, 2, 34).tokens
    with torch.no_grad():
        wanted = reference(config, params)(tokens).logits
    assert distance(model_of(config).forward(params, tokens), wanted) <= ATOL
    assert distance(model_of(msgspec.structs.replace(config, **changes)).forward(params, tokens), wanted) > 100 * ATOL


BEFORE = {**NORMS, "after": ("post_attention_layernorm", None, "post_feedforward_layernorm", None)}
MUTANTS = {
    "norms behind alone": ("olmo2", {}, block, "NORMS", BEFORE),
    "magnitude of yarn": ("llama", {"rope_scaling": YARN}, rope_scaling, "magnitude", lambda *_: 1.0),
    "magnitude of longrope": ("phi3", {"rope_scaling": LONG}, rope_scaling, "magnitude", lambda *_: 1.0),
    "gate before up": ("phi3", {}, block, "ACTIVATIONS", {"silu": lambda gate, up: block.swiglu(up, gate)}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_comparison_fails_when_the_decoder_is_changed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, fields, module, attribute, mutant = MUTANTS[name]
    config = sized(family, **fields)
    params, tokens = random_params(config), random_batch(config, 2, 34).tokens
    with torch.no_grad():
        wanted = reference(config, params)(tokens).logits
    assert distance(model_of(config).forward(params, tokens), wanted) <= ATOL
    monkeypatch.setattr(module, attribute, mutant)
    assert distance(model_of(config).forward(params, tokens), wanted) > 100 * ATOL


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "smollm3"])
def test_the_comparison_fails_when_a_tied_head_is_another_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sized(name, tie_embeddings=True)
    params, tokens = random_params(config), random_batch(config, 2, 11).tokens
    with torch.no_grad():
        wanted = reference(config, params)(tokens).logits
    other = {**params, "lm_head.weight": random_params(config, 1)["model.embed_tokens.weight"]}
    assert distance(model_of(config).forward(other, tokens), wanted) <= ATOL
    untied = model_of(msgspec.structs.replace(config, tie_embeddings=False))
    assert distance(untied.forward(other, tokens), wanted) > 100 * ATOL


@pytest.mark.parametrize("dropped", ["q_proj.bias", "k_proj.bias", "v_proj.bias"])
def test_the_comparison_fails_when_a_bias_is_dropped(dropped: str) -> None:
    config = sized("qwen2")
    params, tokens = random_params(config), random_batch(config, 2, 11).tokens
    with torch.no_grad():
        wanted = reference(config, params)(tokens).logits
    kept = {n: w for n, w in params.items() if not n.endswith(dropped)}
    assert distance(model_of(config).forward(params, tokens), wanted) <= ATOL
    assert distance(model_of(config).forward(kept, tokens), wanted) > 100 * ATOL


@pytest.mark.parametrize(("name", "changes"), [
    ("llama", {"norm": "w_before_cast"}),
    ("olmo2", {"norm": "w_after_cast"}),
    ("olmo2", {"rope_in_float32": False}),
    ("gemma", {"embedding_multiplier": 32**0.5 * 1.003}),  # what sqrt(32) is not rounded to
])  # fmt: skip
def test_the_order_of_casts_is_that_of_transformers(name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        grouped_query, "attention", lambda q, k, v, *_, **__: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda device: True)
    config = sized(name, n_layers=1, n_kv_heads=4)
    half = {n: w.bfloat16() for n, w in random_params(config).items()}
    tokens = random_batch(config, 3, 29).tokens
    with torch.no_grad():
        wanted = reference(config, half)(tokens).logits.float()
    share = [
        float((model_of(c).forward(half, tokens).float() == wanted).float().mean())
        for c in (config, msgspec.structs.replace(config, **changes))
    ]
    assert share[0] > 0.99
    assert share[1] < 0.9


def test_chunks_decode_and_pack_as_they_run() -> None:
    config = sized("llama", layer_types=("chunked", "full"), chunk=3, rope_layers=(True, False))
    check_decoding(config, 0)
    check_packing(config, 0, [5, 1, 7, 11])
    params, tokens = random_params(config), random_batch(config, 1, 9).tokens
    wide = model_of(msgspec.structs.replace(config, chunk=9)).forward(params, tokens)
    assert distance(model_of(config).forward(params, tokens), wide) > 100 * ATOL


@pytest.mark.parametrize("name", DENSE)
@settings(max_examples=3)
@given(data=st.data(), seed=SEEDS)
def test_losses_and_logits_are_those_of_the_whole_forward(name: str, data: st.DataObject, seed: int) -> None:
    config = data.draw(family_configs(name))
    model, params, batch = model_of(config), random_params(config, seed), random_batch(config, 2, 11, seed)
    logits = model.forward(params, batch.tokens, segment_ids=batch.segment_ids)
    nats = cross_entropy(logits[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten()).view(2, -1)
    wanted = torch.where(batch.target_mask()[:, 1:], nats, 0.0)
    torch.testing.assert_close(model.token_losses(params, batch, CrossEntropy())[:, 1:], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.logits(params, model.hidden(params, batch)), logits)


# config.json


@pytest.mark.parametrize("name", DENSE)
def test_a_config_json_with_sizes_alone_means_what_it_means_to_transformers(name: str) -> None:
    sizes = {
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_size": 64,
        "intermediate_size": 24,
        "vocab_size": 17,
    }
    theirs = AutoConfig.for_model(name, **sizes, head_dim=16, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    config = models.from_hf({"model_type": name, **sizes, "head_dim": 16}).config
    params, tokens = random_params(config), random_batch(config, 1, 9).tokens
    hf = AutoModelForCausalLM.from_config(theirs).eval()
    hf.load_state_dict({**({"lm_head.weight": params[head_name(config)]} if config.tie_embeddings else {}), **params})
    with torch.no_grad():
        assert distance(model_of(config).forward(params, tokens), hf(tokens).logits) <= ATOL
    assert config == models.from_hf(theirs.to_dict()).config


REFUSED: dict[str, tuple[str, Mapping[str, Any], str]] = {
    "unknown": ("qwen2", {"clip_qkv": 8.0}, r"has 'clip_qkv' = 8.0, unknown to the qwen2 family"),
    "both directions": ("gemma2", {"use_bidirectional_attention": True}, "expected use_bidirectional_attention False"),
    "dropout": ("phi3", {"resid_pdrop": 0.1}, "'resid_pdrop' = 0.1, expected resid_pdrop 0.0"),
    "a cap that is not there": ("gemma3_text", {"attn_logit_softcapping": 50.0}, "expected no attn_logit_softcapping"),
    "partial rotary": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5, expected 1.0; llama rotates whole"),
    "layer types": (
        "qwen3",
        {"layer_types": ["full_attention"], "use_sliding_window": True, "sliding_window": 4},
        "has 1 layer_types, .*expected 4",
    ),
    "a layer type": ("gemma2", {"layer_types": ["linear_attention"] * 4}, "one 'linear_attention'; expected 4 of full_attention"),
    "scaled windows": (
        "olmo3",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "scales RoPE on sliding layers .'linear'., expected the default",
    ),
    "longrope lists": (
        "phi3",
        {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0, 2.0]}, "rope_parameters": None},
        r"longrope has lists of \[1, 2\] factors, expected 4 in each",
    ),
    "kind of RoPE": (
        "llama",
        {"rope_parameters": {"rope_type": "proportional"}},
        "rope scaling 'proportional'.*yarn and longrope",
    ),
    "rotated part": ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.4}}, r"int\(0.4 \* d_head 8\) is odd"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_json_that_says_more_than_the_decoder_does_is_refused(name: str) -> None:
    family, change, message = REFUSED[name]
    hf = models.FAMILIES[family].to_hf(sized(family))
    assert models.from_hf(hf).config == sized(family)
    with pytest.raises(InputError, match=message):
        models.from_hf({**hf, **change})


@pytest.mark.parametrize("name", models.FAMILIES)
def test_every_family_refuses_a_field_that_it_does_not_know(name: str) -> None:
    hf = models.FAMILIES[name].to_hf(config_of(name))
    assert models.from_hf({**hf, "transformers_version": "5.0.0"}).family is models.FAMILIES[name]
    with pytest.raises(InputError, match=f"config.json has 'multiplier_of_all' = 3, unknown to the {name} family"):
        models.from_hf({**hf, "multiplier_of_all": 3})


def test_empty_patterns_are_refused() -> None:
    with pytest.raises(ValueError, match="layer_types or rope_layers is empty, expected a pattern"):
        sized("gemma2", layer_types=())


# folders of models that also see images


EAGER = {"llama4": {"experts_implementation": "eager"}}  # the others refuse odd sizes


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize("name", IMAGES)
def test_the_text_model_within_is_read_and_written_with_what_sees_images(name: str, prefix: str, tmp_path: Path) -> None:
    config, fields = IMAGES[name]
    text = {key: value for key, value in family_of(config).to_hf(config).items() if key != "architectures"}
    text |= {"pad_token_id": None, "bos_token_id": 4, "eos_token_id": 5}
    tied = {"tie_word_embeddings": config.tie_embeddings}
    whole = AutoConfig.for_model(name, text_config=text, vision_config=VISION, **fields, **tied)
    hf = AutoModelForImageTextToText.from_config(whole, **EAGER.get(name, {})).eval()
    hf.save_pretrained(tmp_path / "whole")
    stored = load_file(tmp_path / "whole/model.safetensors")
    renamed = {n.replace("language_model.model.", prefix): w for n, w in stored.items()}
    assert any(n.startswith(prefix) for n in renamed)
    save_file(renamed, tmp_path / "whole/model.safetensors", metadata={"format": "pt"})

    model = models.open(tmp_path / "whole")
    assert model == model_of(config)
    params, tokens = checkpoint.load_params(tmp_path / "whole", model.shapes()), 6 + random_batch(config, 2, 9).tokens % 11
    with torch.no_grad():
        wanted = (hf.language_model if name == "llama4" else hf)(tokens).logits  # whose whole model is broken without an image
    assert distance(model.forward(params, tokens), wanted) <= ATOL
    trained = {n: w + 0.1 if n.endswith("q_proj.weight") else w for n, w in params.items()}
    checkpoint.save_folder(tmp_path / "saved", trained, model, checkpoint.FolderExtras(tmp_path, [5], source=tmp_path / "whole"))
    if (name, prefix) != ("llama4", "model.language_model."):  # a spelling that transformers does not read
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", **EAGER.get(name, {})).eval()
        with torch.no_grad():
            logits = (again.language_model if name == "llama4" else again)(tokens).logits
        assert distance(logits, model.forward(trained, tokens)) <= ATOL < 1e-3 < distance(logits, wanted)
    written = load_file(tmp_path / "saved/model.safetensors")
    seeing = {n: w for n, w in renamed.items() if "vision" in n or "projector" in n}
    assert seeing
    assert {n: written[n].equal(w) for n, w in seeing.items()} == dict.fromkeys(seeing, True)
    assert written.keys() == renamed.keys()
    assert models.open(tmp_path / "saved").config == config


def test_the_text_alone_is_written_where_the_rest_is_codes(tmp_path: Path) -> None:
    config, fields = IMAGES["gemma3"]
    text = {key: value for key, value in family_of(config).to_hf(config).items() if key != "architectures"}
    whole = AutoConfig.for_model("gemma3", text_config={**text, "pad_token_id": None}, vision_config=VISION, **fields)
    AutoModelForImageTextToText.from_config(whole).save_pretrained(tmp_path / "whole")
    stored = load_file(tmp_path / "whole/model.safetensors")
    coded = {n: w.to(torch.float8_e4m3fn) if n.startswith("vision_tower") and w.ndim == 2 else w for n, w in stored.items()}
    assert any(w.dtype == torch.float8_e4m3fn for w in coded.values())
    save_file(coded, tmp_path / "whole/model.safetensors", metadata={"format": "pt"})
    model = models.open(tmp_path / "whole")
    params = checkpoint.load_params(tmp_path / "whole", model.shapes())
    checkpoint.save_folder(tmp_path / "text", params, model, checkpoint.FolderExtras(tmp_path, [5], source=tmp_path / "whole"))
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert type(alone).__name__ == family_of(config).hf.architecture
    tokens = 6 + random_batch(config, 2, 9).tokens % 11
    with torch.no_grad():
        assert distance(alone(tokens).logits, model.forward(params, tokens)) <= ATOL
    (line,) = notes(tmp_path / "whole")
    assert re.fullmatch(r"\d+ tensors of multi_modal_projector, vision_tower are left out: only the text model is here", line)


def test_a_folder_that_spells_out_what_differs_alone_is_read() -> None:
    """The text_config of the published folders of Gemma 3 leaves out what its class has as default."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    text |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    config = models.from_hf({"model_type": "gemma3", "text_config": text, "vision_config": {}}).config
    assert config == gemma3.Config(
        n_layers=34, n_heads=8, n_kv_heads=4, d_model=2560, d_head=256, d_ff=10240, vocab_size=262208, norm_eps=1e-6,
        rope_scaling=rope_scaling.LinearScaling(8.0), max_positions=131072, window=1024,
    )  # fmt: skip


# attention


def plain(q: Any, k: Any, v: Any, mask: Any, scale: float, cap: float | None, sinks: Any) -> torch.Tensor:
    """The definition, one query at a time."""
    out = torch.zeros_like(q)
    for b, n, t in [(b, n, t) for b in range(q.shape[0]) for n in range(q.shape[1]) for t in range(q.shape[2])]:
        keys = [s for s in range(k.shape[2]) if mask[b, 0, t, s]]
        scores = [scale * q[b, n, t] @ k[b, n // (q.shape[1] // k.shape[1]), s] for s in keys]
        scores = [cap * torch.tanh(x / cap) if cap else x for x in scores]
        total = sum(x.exp() for x in scores) + (sinks[n].exp() if sinks is not None else 0.0)
        out[b, n, t] = sum(x.exp() / total * v[b, n // (q.shape[1] // k.shape[1]), s] for x, s in zip(scores, keys, strict=True))
    return out


@settings(max_examples=8)
@given(seed=SEEDS, cap=st.sampled_from([None, 0.7]), sunk=st.booleans(), scale=st.sampled_from([0.3, 1.0]), t=st.integers(1, 6))
def test_attention_equals_its_definition(seed: int, cap: float | None, sunk: bool, scale: float, t: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, n, t, 3, generator=generator, dtype=torch.float64) for n in (4, 2, 2))
    sinks = torch.randn(4, generator=generator, dtype=torch.float64) if sunk else None
    last = torch.arange(t).expand(2, -1)
    first = (torch.rand(2, t, generator=generator) * (last + 1)).long().cummax(1).values
    key_range = KeyRange(first, last)
    wanted = plain(q, k, v, key_range.mask(t), scale, cap, sinks)
    torch.testing.assert_close(attention(q, k, v, key_range, scale=scale, soft_cap=cap, sinks=sinks), wanted)
    one = torch.func.vmap(
        lambda q, k, v, *s: attention(
            q[None], k[None], v[None], KeyRange(*(x[None] for x in s)), scale=scale, soft_cap=cap, sinks=sinks
        )
    )
    torch.testing.assert_close(one(q, k, v, *key_range)[:, 0], wanted)
    whole = causal(t, q.device)
    actual = attention(q, k, v, whole, scale=scale, soft_cap=cap, sinks=sinks)
    torch.testing.assert_close(actual, plain(q, k, v, whole.mask(t).expand(2, -1, -1, -1), scale, cap, sinks))
    late = KeyRange(key_range.first[:, -1:], last[:, -1:])  # the last query alone, as in decoding
    actual = attention(q[:, :, -1:], k, v, late, scale=scale, soft_cap=cap, sinks=sinks)
    torch.testing.assert_close(actual, wanted[:, :, -1:])


def test_windows_chunks_and_lengths_by_hand() -> None:
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 0]])
    key_range = document_keys(segments)
    assert document_lengths(segments).tolist() == [[4, 4, 4, 4, 2, 2, 1]]

    def rows(key_range: KeyRange) -> list[list[int]]:
        return [row.nonzero().flatten().tolist() for row in key_range.mask(7)[0, 0]]

    assert rows(windowed(key_range, 2)) == [[0], [0, 1], [1, 2], [2, 3], [4], [4, 5], [6]]
    assert rows(chunked(key_range, 3)) == [[0], [0, 1], [0, 1, 2], [3], [4], [4, 5], [6]]
    assert rows(windowed(key_range, 7)) == rows(key_range)
    assert rows(windowed(causal(3, segments.device), 2)) == [[0], [0, 1], [1, 2]]
    late = windowed(KeyRange((), torch.tensor([[5]])), 3)
    assert rows(late) == [[3, 4, 5]]


def test_windows_and_angles_are_made_once_for_all_layers_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    window, table = grouped_query.windowed, grouped_query.rope_table
    monkeypatch.setattr(grouped_query, "windowed", lambda *args: calls.append("windowed") or window(*args))
    monkeypatch.setattr(grouped_query, "rope_table", lambda *args: calls.append("rope_table") or table(*args))
    config = sized("gemma3_text", n_layers=6, window=3)
    model_of(config).forward(random_params(config), random_batch(config, 1, 9).tokens)
    assert sorted(calls) == ["rope_table", "rope_table", "windowed"]


def test_llama_and_mistral_are_the_decoder_as_it_is() -> None:
    base = DecoderConfig(n_layers=1, n_heads=1, n_kv_heads=1, d_model=4, d_head=4, d_ff=4, vocab_size=4)
    for family, differs in ((llama, set()), (mistral, {"layer_types"})):
        fields = family.Config(n_layers=1, n_heads=1, n_kv_heads=1, d_model=4, d_head=4, d_ff=4, vocab_size=4)
        assert {f for f in base.__struct_fields__ if getattr(base, f) != getattr(fields, f)} == differs


def test_gguf_refuses_a_scaling_that_it_does_not_write(tmp_path: Path) -> None:
    config = sized("llama", rope_scaling=YARN)
    arguments = {"types": export.Types("F16"), "tokenizer": tmp_path, "template": None, "stop_ids": []}
    with pytest.raises(InputError, match=r"YaRN whose ramp is not cut to whole dimensions .* which llama\.cpp"):
        export.save(tmp_path / "a.gguf", random_params(config), model_of(config), **arguments)
