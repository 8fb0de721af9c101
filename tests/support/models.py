"""Small random models and batches that the tests share."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st

from minitune import models, tree
from minitune.autodiff.value_and_grad import value_and_grad
from minitune.lora import Lora
from minitune.models import Model, weights
from minitune.models.config import AttentionType, DecoderConfig
from minitune.models.families.llama import Config
from minitune.models.family import Family
from minitune.models.rope_scaling import Dynamic, LinearScaling, Llama3, LongRope, Scaling, Yarn
from minitune.types import Batch, Delta, Mean
from support.experts import WITH_EXPERTS, declared, expert_config, fused

SCALINGS = {
    "default": None,
    "linear": LinearScaling(factor=3.0),
    "dynamic": Dynamic(factor=2.0),
    "llama3": Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=13),
}
YARNS = [
    Yarn(4.0, 13),
    Yarn(3.0, 13, truncate=False, beta_fast=4.0, beta_slow=0.5),
    Yarn(8.0, 20, mscale=0.7, mscale_all_dim=0.3),
    Yarn(2.0, 13, attention_factor=1.3),
]
DENSE = tuple(name for name in models.FAMILIES if name not in WITH_EXPERTS)
ATTENTION_TYPES: tuple[AttentionType, ...] = ("full", "sliding")


@st.composite
def configs(draw: st.DrawFn, scaling: str | None = None) -> Config:
    """Llama shapes with odd sizes: head_dim unrelated to d_model / n_heads, vocabulary and widths prime or odd."""
    return Config(
        **draw(sizes()),
        rope_scaling=SCALINGS[scaling or draw(st.sampled_from(sorted(SCALINGS)))],
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    """The fields of a Config that all families have, but for RoPE scaling."""
    groups, n_kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return {
        "n_layers": draw(st.integers(1, 3)),
        "n_heads": groups * n_kv_heads,
        "n_kv_heads": n_kv_heads,
        "d_model": groups * n_kv_heads * draw(st.sampled_from([5, 7, 11])),  # transformers insists on a multiple of n_heads
        "d_head": draw(st.sampled_from([4, 6, 10])),
        "d_ff": draw(st.sampled_from([5, 13, 24])),
        "vocab_size": draw(st.sampled_from([17, 31])),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-3, 1e-2])),
        "rope_theta": draw(st.sampled_from([10.0, 1e4, 5e5])),
        "tie_embeddings": draw(st.booleans()),
        "max_positions": 29,
    }


@st.composite
def scalings(draw: st.DrawFn, d_rotary: int) -> Scaling | None:
    """Every kind of RoPE scaling."""
    factors = st.tuples(*[st.sampled_from([0.7, 1.0, 1.3, 2.0])] * (d_rotary // 2))
    long = st.builds(LongRope, factors, factors, st.just(13), st.sampled_from([None, 4.0]), st.sampled_from([None, 1.2]))
    return draw(st.one_of(st.sampled_from([*SCALINGS.values(), *YARNS]), long))


@st.composite
def family_configs(draw: st.DrawFn, name: str) -> DecoderConfig:
    """A Config of a family, with every choice that its config.json has.

    Switches and numbers that the family declares are drawn as they are declared; a branch here adds
    what it reads and writes by itself.
    """
    kind, fields = models.FAMILIES[name].config, draw(sizes())
    if name in WITH_EXPERTS:
        return expert_config(draw, name, fields)
    window = draw(st.sampled_from([None, 1, 3, 8]))
    if name == "phi3":
        d_head = draw(st.sampled_from([4, 8]))
        fields |= {"d_head": d_head, "d_model": d_head * fields["n_heads"], "rotary_factor": draw(st.sampled_from([0.5, 1.0]))}
        if d_head == 8:
            fields["rotary_factor"] = draw(st.sampled_from([0.5, 0.75, 1.0]))
        scaling = draw(scalings(int(d_head * fields["rotary_factor"])))
        return kind(**fields, window=window, rope_scaling=scaling if isinstance(scaling, LongRope) else None)
    scaling = draw(scalings(fields["d_head"]))
    if name == "ministral3":
        return kind(**fields, window=window, rope_scaling=Yarn(4.0, 7, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.4))
    if name in ("gemma3_text", "olmo3"):
        scaling = scaling if isinstance(scaling, (LinearScaling, Llama3)) or scaling in [YARNS[0], *YARNS[2:]] else None
        window = window or 5
        fields |= {"rope_scaling": scaling, "window_rope_theta": draw(st.sampled_from([10.0, 77.0])), "window": window}
    else:
        fields["rope_scaling"] = scaling
    if name in ("qwen2", "qwen3", "smollm3") and window is not None:
        fields |= {"window": window, "layer_types": draw(patterns(fields["n_layers"], ("full",), ATTENTION_TYPES))}
    if name in ("gemma2", "gemma3_text"):
        scalar = draw(st.integers(1, 30))
        fields |= {
            "attention_scale": None if scalar == fields["d_head"] else scalar**-0.5,
            "final_cap": draw(st.sampled_from([None, 2.0, 5.0])),
        }
    if name == "gemma2":
        fields |= {"attention_cap": draw(st.sampled_from([None, 1.0, 3.0])), "window": window or 5}
    if name in ("gemma2", "gemma3_text", "olmo3"):
        fields["layer_types"] = draw(patterns(fields["n_layers"], kind(**fields).layer_types, ATTENTION_TYPES))
    if name == "smollm3":
        fields["rope_layers"] = draw(patterns(fields["n_layers"], (True, True, True, False), (True, False)))
    return kind(**fields, **declared(draw, name, fields))


@st.composite
def patterns(draw: st.DrawFn, n: int, default: tuple[Any, ...], values: tuple[Any, ...]) -> tuple[Any, ...]:
    """A pattern over n layers in the form that from_hf gives it: the default if it says the same, else the shortest."""
    drawn = draw(st.lists(st.sampled_from(values), min_size=n, max_size=n))
    shortest = next(p for p in (drawn[:k] for k in range(1, n + 1)) if all(x == p[i % len(p)] for i, x in enumerate(drawn)))
    return default if drawn == [default[i % len(default)] for i in range(n)] else tuple(shortest)


SMALL = Config(n_layers=2, n_heads=4, n_kv_heads=2, d_model=12, d_head=6, d_ff=13, vocab_size=17, max_positions=64)


def family_of(config: DecoderConfig) -> Family:
    """The family whose Config this is."""
    return next(family for family in models.FAMILIES.values() if family.config is type(config))


def random_params(config: DecoderConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Every weight from a wide normal, norms and biases included, so that nothing is at a value where a mistake hides."""
    generator = torch.Generator().manual_seed(seed)
    shapes = weights.shapes(config)
    return {name: 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def reference(config: DecoderConfig, params: Mapping[str, torch.Tensor]) -> Any:
    """transformers' own model with these weights, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM  # here: most tests of small models do without this import

    hf = family_of(config).to_hf(config)
    fields = {key: value for key, value in hf.items() if key not in ("architectures", "model_type")}
    numbers = AutoConfig.for_model(hf["model_type"], **fields, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    numbers._experts_implementation = "eager"  # the others refuse odd sizes
    model = AutoModelForCausalLM.from_config(numbers).eval()
    state = fused(params)
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    for parameter in model.parameters():  # and not model.to, which would round the RoPE frequencies too
        parameter.data = parameter.data.to(next(iter(params.values())).dtype)
    return model


@contextmanager
def widened() -> Iterator[None]:
    """float64 wherever float32 is asked for, in minitune and in transformers: what then lies between the two is no rounding."""
    narrow = torch.get_default_dtype()
    names = mock.patch.multiple(torch, float32=torch.float64, float=torch.float64)
    with names, mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(narrow)


Answer = tuple[torch.Tensor, dict[str, torch.Tensor]]  # logits, and the gradients of a random sum of them


def answers(config: DecoderConfig, params: Mapping[str, torch.Tensor], tokens: torch.Tensor, seed: int) -> tuple[Answer, Answer]:
    """What minitune and transformers make of the tokens, in the dtype of the params; weights in the layout of transformers."""
    hf, model = reference(config, params), Model(family_of(config), config)
    wanted = hf(tokens).logits
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(wanted.shape, generator=generator, dtype=torch.double).to(wanted.dtype)
    (wanted * weights).sum().backward()
    theirs = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in hf.named_parameters()}
    _, grads = value_and_grad(lambda p: Mean((model.forward(p, tokens) * weights).sum(), torch.ones(())))(params)
    return (model.forward(params, tokens), fused(grads)), (wanted.detach(), theirs)


def separation(actual: Answer, wanted: Answer) -> tuple[float, float]:
    """Largest difference of logits and of gradients, as a share of the largest of all logits and of all gradients."""
    assert actual[1].keys() == wanted[1].keys()
    scale = max(float(g.abs().max()) for g in wanted[1].values())
    grads = max(float((actual[1][n] - g).abs().max()) for n, g in wanted[1].items())
    return float((actual[0] - wanted[0]).abs().max() / wanted[0].abs().max()), grads / scale


def moved(params: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """float64 weights, each moved by up to a rounding of float32."""
    generator = torch.Generator().manual_seed(seed)

    def rounding(w: torch.Tensor) -> torch.Tensor:
        return 2**-23 * (2 * torch.rand(w.shape, generator=generator, dtype=torch.float64) - 1)

    return {name: w.double() * (1 + rounding(w)) for name, w in params.items()}


def check_against_transformers(config: DecoderConfig, params: dict[str, torch.Tensor], tokens: torch.Tensor, seed: int) -> None:
    """In float64 the two are one function with one gradient. In float32 minitune errs as transformers does, or as a weight that
    is moved by a rounding does: of 240 draws the worst was 2.1 times the larger of the two."""
    ours, theirs = answers(config, params, tokens, seed)
    with widened():
        exact, wanted = answers(config, {n: w.double() for n, w in params.items()}, tokens, seed)
        near = [answers(config, moved(params, seed + i), tokens, seed)[0] for i in range(2)]
    assert max(separation(exact, wanted)) <= 1e-12
    assert exact[0].dtype == wanted[0].dtype == torch.float64
    roundings = [separation(theirs, wanted), *(separation(other, exact) for other in near)]
    for error, *others in zip(separation(ours, wanted), *roundings, strict=True):
        assert error <= 8 * max(others)


def random_batch(config: DecoderConfig, n_rows: int, length: int, seed: int = 0, packed: bool = True) -> Batch:
    """Rows of documents with random borders, padding at the end and a random loss mask."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, config.vocab_size, (n_rows, length), generator=generator)
    starts = torch.rand(n_rows, length, generator=generator) < (0.25 if packed else 0.0)
    segment_ids = 1 + starts.cumsum(1)
    n_real = torch.randint(2, length + 1, (n_rows, 1), generator=generator)
    segment_ids = torch.where(torch.arange(length) < n_real, segment_ids, 0).to(torch.int32)
    return Batch(tokens, segment_ids, (torch.rand(n_rows, length, generator=generator) < 0.6) & (segment_ids > 0))


def save_reference(config: DecoderConfig, params: dict[str, torch.Tensor], folder: Path) -> Any:
    """A folder as transformers' save_pretrained writes it."""
    model = reference(config, params)
    model.save_pretrained(folder)
    return model


def model_of(config: DecoderConfig) -> Model:
    return Model(family_of(config), config)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Draws from a normal distribution with a seed of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_deltas(params: Mapping[str, torch.Tensor], rule: Lora, seed: int = 0) -> dict[str, Delta]:
    """Deltas in the dtype of the params, of which neither half is zero."""
    generator = torch.Generator().manual_seed(seed)
    like = params["model.norm.weight"]
    return tree.map(lambda x: 0.3 * torch.randn(x.shape, generator=generator).to(like), rule.init(params, seed))
