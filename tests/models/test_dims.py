"""Dims of every family's weights: what each means, as many as the weight has, and of the size that the config says."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune import models
from minitune.models.config import DecoderConfig
from minitune.models.shapes import named_dims
from minitune.models.weights import dims, shapes
from support.models import family_configs


def sizes_of(config: DecoderConfig) -> dict[str, set[int]]:
    """Sizes that a dim of each meaning may have."""
    n_q, n_kv = (n * config.d_head for n in (config.n_heads, config.n_kv_heads))
    d_ff = {config.d_ff, 2 * config.d_ff}
    if config.experts is not None:
        d_ff |= {config.experts.d_ff, 2 * config.experts.d_ff, config.experts.d_shared or config.d_ff}
    return {
        "vocab": {config.vocab_size},
        "d_model": {config.d_model},
        "heads": {n_q, n_kv, n_q + 2 * n_kv, config.n_heads},
        "d_head": {config.d_head},
        "d_ff": d_ff,
        "experts": set() if config.experts is None else {config.experts.n_experts},
        "one": {1},
    }


@pytest.mark.parametrize("name", sorted(models.FAMILIES))
@settings(max_examples=8)
@given(data=st.data())
def test_every_dim_of_every_weight_has_a_meaning_and_its_size(name: str, data: Any) -> None:
    config = data.draw(family_configs(name))
    found, sizes = dims(config), sizes_of(config)
    assert list(found) == list(shapes(config))
    for weight, shape in shapes(config).items():
        assert len(found[weight]) == len(shape), weight
        for dim, size in zip(found[weight], shape, strict=True):
            assert size in sizes[dim], (weight, shape, found[weight])


def test_a_weight_without_a_line_is_refused() -> None:
    with pytest.raises(TypeError, match=r"no dims of self_attn\.new_proj\.weight are declared"):
        named_dims(["self_attn.new_proj.weight"], {"self_attn.q_proj.weight": ("heads", "d_model")})
    first = {"*.weight": ("heads", "d_model"), "a.weight": ("d_ff", "d_model")}
    assert named_dims(["a.weight"], first) == {"a.weight": ("heads", "d_model")}
