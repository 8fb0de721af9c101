"""Configs of every family in which each mechanism shows, and checks that every family passes."""

from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from minitune import models
from minitune.models import decoder, rope_scaling
from minitune.models.config import DecoderConfig
from minitune.models.mixers.grouped_query import KVCache
from minitune.nn.attention.key_range import KeyRange, document_keys, document_positions
from support.experts import WITH_EXPERTS, small_experts
from support.models import SCALINGS, YARNS, model_of, random_batch, random_params


def sized(name: str, **fields: Any) -> DecoderConfig:
    """A config of a family, at sizes where every mechanism shows."""
    sizes = {"n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "d_model": 32, "d_head": 8, "d_ff": 13, "vocab_size": 17}
    return models.FAMILIES[name].config(**{**sizes, "norm_eps": 1e-3, "rope_theta": 30.0, "max_positions": 29, **fields})


LLAMA3, YARN, LONG = SCALINGS["llama3"], YARNS[1], rope_scaling.LongRope((1.0, 1.5, 2.0, 1.0), (3.0, 2.0, 1.5, 1.0), 13)
GROWING = rope_scaling.Yarn(4.0, 5, llama_4_scaling_beta=0.7)
MECHANISMS = {  # what is taken out -> (family, its config, what the config says instead)
    "window": ("mistral", {"window": 3}, {"window": None}),
    "width of the window": ("mistral", {"window": 3}, {"window": 4}),
    "which layers have windows": ("gemma2", {"window": 3}, {"layer_types": ("full", "sliding")}),
    "late windows": ("qwen2", {"window": 3, "layer_types": ("full", "full", "full", "sliding")}, {"layer_types": ("full",)}),
    "norm of heads": ("qwen3", {}, {"qk_norm": "none"}),
    "norm of projections": ("olmo2", {}, {"qk_norm": "none"}),
    "one plus w": ("gemma", {}, {"norm": "w_before_cast"}),
    "gelu": ("gemma", {}, {"activation": "silu"}),
    "scaled embeddings": ("gemma", {}, {"embedding_multiplier": 1.0}),
    "norms behind": ("gemma2", {}, {"norms": "before"}),
    "attention scale": ("gemma2", {"attention_scale": 0.1}, {"attention_scale": None}),
    "cap of scores": ("gemma2", {"attention_cap": 2.0}, {"attention_cap": None}),
    "cap of logits": ("gemma2", {"final_cap": 3.0}, {"final_cap": None}),
    "the order of caps": ("gemma2", {"attention_cap": 2.0, "final_cap": 9.0}, {"attention_cap": 9.0, "final_cap": 2.0}),
    "RoPE of windows": (
        "gemma3_text",
        {"layer_types": ("sliding", "full"), "window_rope_theta": 3.0},
        {"window_rope_theta": None},
    ),
    "no scaling on windows": ("olmo3", {"rope_scaling": YARNS[0], "window_rope_theta": 30.0}, {"window_rope_theta": None}),
    "layers without RoPE": ("smollm3", {}, {"rope_layers": (True,)}),
    "part of each head": ("phi3", {"rotary_factor": 0.5}, {"rotary_factor": 1.0}),
    "embedding multiplier": ("granite", {"embedding_multiplier": 0.5}, {"embedding_multiplier": 1.0}),
    "residual multiplier": ("granite", {"residual_multiplier": 0.5}, {"residual_multiplier": 1.0}),
    "attention multiplier": ("granite", {"attention_scale": 0.1}, {"attention_scale": None}),
    "logit divisor": ("granite", {"logit_divisor": 3.0}, {"logit_divisor": 1.0}),
    "growth of queries": ("ministral3", {"rope_scaling": GROWING}, {"rope_scaling": rope_scaling.Yarn(4.0, 5)}),
    "linear": ("llama", {"rope_scaling": SCALINGS["linear"]}, {"rope_scaling": None}),
    "dynamic": ("llama", {"rope_scaling": SCALINGS["dynamic"]}, {"rope_scaling": None}),
    "llama3": ("llama", {"rope_scaling": LLAMA3}, {"rope_scaling": None}),
    "yarn": ("llama", {"rope_scaling": YARN}, {"rope_scaling": None}),
    "ends of yarn's ramp": ("llama", {"rope_scaling": YARN}, {"rope_scaling": msgspec.structs.replace(YARN, truncate=True)}),
    "longrope": ("phi3", {"rope_scaling": LONG}, {"rope_scaling": None}),
    "longrope beyond": ("phi3", {"rope_scaling": LONG}, {"rope_scaling": msgspec.structs.replace(LONG, long_factor=(1.0,) * 4)}),
}


def check_decoding(config: DecoderConfig, seed: int) -> None:
    """Two rows of other lengths, padded on the left, then three tokens one by one."""
    params, lengths, n_new = random_params(config, seed, torch.float64), (4, 9), 3
    tokens = random_batch(config, 2, max(lengths) + n_new, seed).tokens
    first = torch.tensor([max(lengths) - n for n in lengths])[:, None]
    segments = (torch.arange(max(lengths)) >= first).to(torch.int32)
    shape = (2, config.n_kv_heads, max(lengths) + n_new, config.d_head)
    caches = [KVCache(torch.zeros(shape).double(), torch.zeros(shape).double()) for _ in range(config.n_layers)]
    block_of = model_of(config).block_of()
    at, positions, keys = 0, document_positions(segments), document_keys(segments)
    logits = []
    for width in (max(lengths), *[1] * n_new):
        new = tokens[:, at : at + width]
        read = [type(cache)(*(x[:, :, : at + width] for x in cache)) for cache in caches]
        logits.append(decoder.decode(config, params, new, read, positions, keys, block_of))
        at += width
        positions, keys = positions[:, -1:] + 1, KeyRange(first, torch.tensor([[at]]))
    for row, length in enumerate(lengths):
        start = max(lengths) - length
        wanted = decoder.hidden(config, params, tokens[row : row + 1, start:], block_of=block_of)
        torch.testing.assert_close(torch.cat(logits, dim=1)[row, start:], wanted[0], rtol=1e-5, atol=1e-5)


def check_packing(config: DecoderConfig, seed: int, lengths: list[int]) -> None:
    model, params = model_of(config), random_params(config, seed, torch.float64)
    tokens = torch.randint(0, config.vocab_size, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    segments = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths))[None].to(torch.int32)
    packed = model.forward(params, tokens, segment_ids=segments)
    alone = torch.cat([model.forward(params, part) for part in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-6)


VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
IMAGES = {
    "gemma3": (
        sized("gemma3_text"),
        {"mm_tokens_per_image": 4, "boi_token_index": 1, "eoi_token_index": 2, "image_token_index": 3},
    ),
    "mistral3": (sized("mistral"), {"image_token_index": 3}),
    "llama4": (small_experts("llama4_text"), {"boi_token_index": 1, "eoi_token_index": 2, "image_token_index": 3}),
}


def config_of(name: str) -> DecoderConfig:
    """A fixed config of a family, in which every mechanism that it has shows."""
    if name in WITH_EXPERTS:
        return small_experts(name)
    return sized(name, **({"rope_scaling": GROWING} if name == "ministral3" else {}))  # transformers has no other


def linear_maps(params: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of all weights that a delta can lie on, but for embedding and head."""
    others = ("_bias", "embed_tokens.weight", "lm_head.weight")
    return [name for name, w in params.items() if w.ndim > 1 and not name.endswith(others)]
