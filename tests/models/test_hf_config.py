"""config.json: whatever stands in one is read or refused, and what it says twice is read as transformers reads it."""

import copy
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from minitune import models
from minitune.errors import MAX_QUOTED, InputError, quoted
from minitune.models import hf_config, hf_fields, rope_scaling
from minitune.models.hf_config import pattern
from support.families import config_of

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 8, 10**4, 2**31, 2**31 + 1, 2**63 - 1, 2**63, 10**25]),
    st.sampled_from([0.0, -1.0, 0.5, 1.0, 8192.0, 1e-320, 1e308, float("nan"), float("inf")]),
    st.sampled_from(["", " ", "x", "yarn", "longrope", "dynamic", "llama3", "full_attention", "1e4", "x" * 9999]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.sampled_from(["rope_theta", "rope_type", "type", "factor", "full_attention", "x"]), inner, max_size=4
        )
    ),
    max_leaves=6,
)
ROPES = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["linear", "dynamic", "llama3", "yarn", "longrope", "su", "default", "proportional"])},
    optional={
        name: LEAVES | st.lists(LEAVES, max_size=4)
        for name in (
            "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
            "short_factor", "long_factor", "beta_fast", "attention_factor", "mscale", "partial_rotary_factor",
        )
    },
)  # fmt: skip


def written(name: str) -> dict[str, Any]:
    """A config.json of a family as minitune writes it."""
    return models.FAMILIES[name].to_hf(config_of(name))


@pytest.mark.parametrize("name", models.FAMILIES)
@settings(max_examples=60)
@given(data=st.data())
def test_no_config_json_ends_in_another_error_than_ours(name: str, data: st.DataObject) -> None:
    family = models.FAMILIES[name]
    known = [*hf_fields.HFFields.__struct_fields__, *family.hf.required, *family.hf.accepted, "model_type", "x" * 300]
    hf = written(name)
    for key in data.draw(st.lists(st.sampled_from([*hf, *known]), min_size=1, max_size=3)):
        hf[key] = data.draw(ROPES | VALUES if key.startswith("rope_") else VALUES)
    message = ""
    try:
        config = models.from_hf(hf).config
    except InputError as error:
        message = str(error)
    assert len(message) < 1000
    if not message and config.d_head < 10**4:
        lengths = torch.tensor([[3]])
        rope_scaling.frequencies(config.d_rotary, config.rope_theta, config.rope_scaling, lengths, config.max_positions)
        rope_scaling.magnitude(config.rope_scaling, config.max_positions)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_fields_that_are_null_and_those_of_the_base_class_say_nothing(name: str) -> None:
    hf = written(name)
    nulls = dict.fromkeys([*hf_fields.HFFields.__struct_fields__, "quantization_config", "anything"])
    assert models.from_hf({**nulls, **hf}) == models.from_hf(hf)
    theirs = AutoConfig.for_model(name).to_dict()
    base = {key: theirs[key] for key in theirs if key in hf_fields.HARMLESS}
    old = {"max_sequence_length": 4096, "tokenizer_class": "LlamaTokenizer", "torchscript": False, "pruned_heads": {}}
    assert models.from_hf({**hf, **base, **old, "model_type": name, "do_sample": True, "max_length": 20}) == models.from_hf(hf)


def test_unknown_fields_are_named_together() -> None:
    with pytest.raises(InputError, match=r"has 'a' = 1, 'b' = \[2\], unknown to the llama family; delete what says nothing"):
        models.from_hf({**written("llama"), "a": 1, "b": [2], "c": None})
    with pytest.raises(InputError, match=r"'x4' = 4 and 3 more, unknown"):
        models.from_hf({**written("llama"), **{f"x{i}": i for i in range(8)}})


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "granite", "gemma3_text", "olmo3", "phi3"])
def test_rope_scaling_beside_rope_parameters_counts_as_in_transformers(name: str) -> None:
    hf = written(name)
    long = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    added = long if name == "phi3" else YARN
    if name in ("gemma3_text", "olmo3"):
        with pytest.raises(InputError, match="rope_scaling of type 'yarn' beside rope_parameters of rope_type 'default'"):
            models.from_hf({**hf, "rope_scaling": added})
        added = {**YARN, "rope_type": "yarn"}
    both = models.from_hf({**hf, "rope_scaling": added}).config
    theirs = AutoConfig.for_model(**copy.deepcopy({**hf, "rope_scaling": added})).rope_parameters  # which writes to it
    theirs = theirs.get("full_attention", theirs)
    assert both.rope_theta == theirs["rope_theta"]
    ours = msgspec.to_builtins(both.rope_scaling)
    assert {key: theirs[key] for key in ours} == {key: list(x) if isinstance(x, tuple) else x for key, x in ours.items()}
    assert both != models.from_hf(hf).config


def test_what_rope_scaling_would_hide_is_refused() -> None:
    hf = {**written("llama"), "rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    del hf["rope_theta"]
    with pytest.raises(InputError, match="rope_scaling, which says no rope_theta, beside rope_parameters with rope_theta 500000"):
        models.from_hf(hf)
    assert models.from_hf({**hf, "rope_scaling": {**YARN, "rope_theta": 5e5}}).config.rope_theta == 5e5


def test_yarn_of_old_files_is_read() -> None:
    """Fields that transformers passes over, and a context that is written as a float."""
    old = {**YARN, "finetuned": True, "attn_factor": 1.0, "original_max_position_embeddings": 16.0}
    hf = {**written("llama"), "rope_parameters": None}
    assert models.from_hf({**hf, "rope_scaling": old}) == models.from_hf({**hf, "rope_scaling": YARN})


@given(values=st.lists(st.booleans(), min_size=1, max_size=9), default=st.lists(st.booleans(), min_size=1, max_size=4))
def test_a_pattern_is_the_shortest_beginning_that_repeats(values: list[bool], default: list[bool]) -> None:
    def repeats(beginning: list[bool]) -> bool:
        return all(x == beginning[i % len(beginning)] for i, x in enumerate(values))

    shortest = next(values[:n] for n in range(1, len(values) + 1) if repeats(values[:n]))
    assert pattern(values, tuple(default)) == tuple(default if repeats(default) else shortest)


def test_too_few_layers_with_rope_are_refused() -> None:
    with pytest.raises(InputError, match="has 1 no_rope_layers, expected 4"):
        hf_config.rope_layers({"no_rope_layers": [1], "num_hidden_layers": 4}, "config.json")


@pytest.mark.parametrize("value", ["x" * 10**6, ["y" * 99] * 99, {i: i for i in range(999)}, 10**999, ValueError("z" * 10**6)])
def test_a_message_quotes_a_little_of_a_large_input(value: Any) -> None:
    assert len(quoted(value)) <= MAX_QUOTED
    nested: Any = 1
    for _ in range(100_000):
        nested = [nested]
    assert quoted(nested) == "[[[[[[[...]]]]]]]"
    assert quoted("short") == "'short'"
