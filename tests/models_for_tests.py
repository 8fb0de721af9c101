"""Small random models and batches that the tests share."""

from pathlib import Path

import torch
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from minitune import models
from minitune.models.llama import Config
from minitune.models.rope import Dynamic, Linear, Llama3
from minitune.types import Batch

SCALINGS = {
    "default": None,
    "linear": Linear(factor=3.0),
    "dynamic": Dynamic(factor=2.0),
    "llama3": Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=13),
}


@st.composite
def configs(draw: st.DrawFn, scaling: str | None = None) -> Config:
    """Llama shapes with odd sizes: head_dim unrelated to d_model / n_heads, vocabulary and widths prime or odd."""
    groups, n_kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return Config(
        n_layers=draw(st.integers(1, 3)),
        n_heads=groups * n_kv_heads,
        n_kv_heads=n_kv_heads,
        d_model=groups * n_kv_heads * draw(st.sampled_from([3, 5, 7])),  # transformers insists on a multiple of n_heads
        d_head=draw(st.sampled_from([4, 6, 10])),
        d_ff=draw(st.sampled_from([5, 13, 24])),
        vocab_size=draw(st.sampled_from([17, 31])),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        rope_theta=draw(st.sampled_from([10.0, 1e4, 5e5])),
        rope_scaling=SCALINGS[scaling or draw(st.sampled_from(sorted(SCALINGS)))],
        tie_embeddings=draw(st.booleans()),
        max_positions=29,
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )


SMALL = Config(n_layers=2, n_heads=4, n_kv_heads=2, d_model=12, d_head=6, d_ff=13, vocab_size=17, max_positions=64)


def random_params(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Every weight from a wide normal, norms and biases included, so that nothing is at a value where a mistake hides."""
    generator = torch.Generator().manual_seed(seed)
    shapes = models.Model(models.llama, config).shapes()
    return {name: 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def reference(config: Config, params: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """transformers' own Llama with these weights, in evaluation mode."""
    hf = models.llama.to_hf(config)
    model = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in hf.items() if key != "architectures"})).eval()
    state = dict(params)
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.to(next(iter(params.values())).dtype)


def random_batch(config: Config, n_rows: int, length: int, seed: int = 0, packed: bool = True) -> Batch:
    """Rows of documents with random borders, padding at the end and a random loss mask."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, config.vocab_size, (n_rows, length), generator=generator)
    starts = torch.rand(n_rows, length, generator=generator) < (0.25 if packed else 0.0)
    segment_ids = 1 + starts.cumsum(1)
    n_real = torch.randint(2, length + 1, (n_rows, 1), generator=generator)
    segment_ids = torch.where(torch.arange(length) < n_real, segment_ids, 0).to(torch.int32)
    return Batch(tokens, segment_ids, (torch.rand(n_rows, length, generator=generator) < 0.6) & (segment_ids > 0))


def save_reference(config: Config, params: dict[str, torch.Tensor], folder: Path) -> LlamaForCausalLM:
    """A folder as transformers' save_pretrained writes it."""
    model = reference(config, params)
    model.save_pretrained(folder)
    return model
