"""Every family of minitune.models.FAMILIES equals transformers and PEFT. Being listed is being compared.

What one family has and others don't is shown to matter in tests/models.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from minitune import checkpoint, models, tree
from minitune.autodiff.value_and_grad import value_and_grad
from minitune.interop.peft.layout import Base
from minitune.interop.peft.load import load_adapter
from minitune.interop.peft.save import save_adapter
from minitune.lora import Lora
from minitune.models.config import Activation, DecoderConfig
from minitune.models.family import Family
from minitune.models.hf_config import HFConfig
from minitune.models.weights import head_name
from minitune.types import Mean
from support.closeness import distance
from support.experts import WITH_EXPERTS
from support.families import check_decoding, check_packing, config_of, linear_maps
from support.models import (
    check_against_transformers,
    family_configs,
    model_of,
    random_batch,
    random_deltas,
    random_params,
    reference,
    save_reference,
)

ATOL = 1e-5  # of the largest value
SEEDS = st.integers(0, 2**32)
FAMILIES = sorted(models.FAMILIES)
# PEFT looks among modules alone for what its patterns match, and warns of those that match parameters
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_listed_by_its_model_type_and_has_a_config_of_its_own(name: str) -> None:
    family = models.FAMILIES[name]
    assert family.name == name
    assert issubclass(family.config, DecoderConfig)
    assert [other for other, one in models.FAMILIES.items() if one.config is family.config] == [name]


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=6, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking a rounding takes minutes
@given(data=st.data(), seed=SEEDS, length=st.integers(2, 37))
def test_logits_and_gradients_equal_transformers(name: str, data: st.DataObject, seed: int, length: int) -> None:
    config = data.draw(family_configs(name))
    params, tokens = random_params(config, seed), random_batch(config, 2, length, seed).tokens
    check_against_transformers(config, params, tokens, seed)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=3)
@given(data=st.data(), seed=SEEDS, length=st.integers(2, 11))
def test_no_token_changes_what_is_said_of_an_earlier_one(name: str, data: st.DataObject, seed: int, length: int) -> None:
    config, generator = data.draw(family_configs(name)), torch.Generator().manual_seed(seed)
    params = random_params(config, seed, torch.float64)
    tokens = torch.randint(0, config.vocab_size, (1, length), generator=generator)
    at = int(torch.randint(0, length, (), generator=generator))
    changed = tokens.clone()
    changed[0, at] = (changed[0, at] + 1) % config.vocab_size
    before, after = (model_of(config).forward(params, t) for t in (tokens, changed))
    torch.testing.assert_close(before[:, :at], after[:, :at], rtol=0, atol=1e-12)  # experts sum by groups of tokens
    assert not torch.equal(before[:, at:], after[:, at:])
    assert head_name(config) in params


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=3)
@given(data=st.data(), seed=SEEDS, lengths=st.lists(st.integers(1, 33), min_size=1, max_size=4))
def test_cached_and_packed_equal_the_full_forward(name: str, data: st.DataObject, seed: int, lengths: list[int]) -> None:
    config = data.draw(family_configs(name))
    check_decoding(config, seed)
    check_packing(config, seed, lengths)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_packed_documents_are_those_of_their_own_forwards(name: str) -> None:
    config = config_of(name)
    params, batch, model = random_params(config, 1, torch.float64), random_batch(config, 2, 23, 1), model_of(config)

    def packed(p: Mapping[str, Tensor]) -> Mean:
        logits = model.forward(p, batch.tokens, segment_ids=batch.segment_ids)
        return Mean(torch.where(batch.segment_ids[..., None] > 0, logits, 0.0).square().sum(), torch.ones(()))

    def apart(p: Mapping[str, Tensor]) -> Mean:
        rows = zip(batch.tokens, batch.segment_ids, strict=True)
        documents = [row[ids == i] for row, ids in rows for i in ids[ids > 0].unique()]
        return Mean(torch.stack([model.forward(p, one[None]).square().sum() for one in documents]).sum(), torch.ones(()))

    actual, wanted = (value_and_grad(f)(params) for f in (packed, apart))
    torch.testing.assert_close(actual[0].total, wanted[0].total)
    torch.testing.assert_close(actual[1], wanted[1], atol=1e-9 * float(wanted[0].total), rtol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=2)
@given(data=st.data(), seed=SEEDS)
def test_deltas_on_every_linear_map_merge_exactly(name: str, data: st.DataObject, seed: int) -> None:
    config = data.draw(family_configs(name))
    params, tokens, model = random_params(config, seed, torch.float64), random_batch(config, 2, 11, seed).tokens, model_of(config)
    rule = Lora(2, 4.0, tuple(linear_maps(params)))
    deltas = random_deltas(params, rule, seed)
    assert list(deltas) == linear_maps(params)
    adapted = model.forward(rule.apply(params, deltas), tokens)
    torch.testing.assert_close(adapted, model.forward(rule.merge(params, deltas), tokens), rtol=1e-6, atol=1e-6)
    assert distance(adapted, model.forward(params, tokens)) > 100 * ATOL


# config.json, folders and adapters


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
def test_a_config_survives_config_json_in_both_spellings(name: str, data: st.DataObject) -> None:
    config = data.draw(family_configs(name))
    hf = json.loads(json.dumps(models.FAMILIES[name].to_hf(config)))
    assert models.from_hf(hf) == model_of(config)
    assert msgspec.convert(msgspec.to_builtins(config), type(config)) == config
    older = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
    spellings = [older, ("rope_parameters",), ("num_local_experts",), ("num_experts",)]
    if name == "olmo3" and config.window_rope_theta != config.rope_theta:
        spellings.remove(("rope_parameters",))  # 4.x has one base for all layers of OLMo 3
    for left_out in spellings:
        if "experts" not in left_out[0] or {"num_local_experts", "num_experts"} <= set(hf):
            assert models.from_hf({key: value for key, value in hf.items() if key not in left_out}) == model_of(config)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=2)
@given(data=st.data(), seed=SEEDS)
def test_what_transformers_saves_is_loaded_whole(
    name: str, data: st.DataObject, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config, folder = data.draw(family_configs(name)), tmp_path_factory.mktemp("theirs")
    params = random_params(config, seed)
    save_reference(config, params, folder)
    model = models.open(folder)
    assert model == model_of(config)
    loaded = checkpoint.load_params(folder, model.shapes())
    assert set(loaded) == set(params)
    assert all(torch.equal(loaded[n], params[n]) for n in params)


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_reads_an_adapter_on_every_linear_map_and_we_read_it_back(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    params, tokens, model = random_params(config, 3), random_batch(config, 2, 19).tokens, model_of(config)
    rule = Lora(2, 3.0, tuple(linear_maps(params)), {"*.layers.1.*": 3} if name not in WITH_EXPERTS else {}, rslora=True)
    deltas = random_deltas(params, rule)
    save_adapter(tmp_path, deltas, rule, base=Base("x"), names=params)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(reference(config, params), tmp_path).eval()(tokens).logits
    assert distance(model.forward(rule.apply(params, deltas), tokens), theirs) <= ATOL
    assert distance(model.forward(params, tokens), theirs) > 100 * ATOL
    _, back, _ = load_adapter(tmp_path, names=params)
    assert set(back) == set(deltas)
    assert all(torch.equal(x, y) for n in deltas for x, y in zip(tree.leaves(back[n]), tree.leaves(deltas[n]), strict=True))


# a family that is only declared


class SeedOss(DecoderConfig, frozen=True):
    """Numbers of a Seed-OSS: a Llama with biases on q, k and v."""

    qkv_bias: bool = True


class Mistaken(SeedOss, frozen=True):
    """The same with another activation than the one that it tells transformers."""

    activation: Activation = "gelu_tanh"


def test_a_family_that_is_only_declared_is_drawn_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but its line in FAMILIES: `family_configs` draws it, and the comparison finds what it lacks."""
    required = {"hidden_act": ("silu",), "attention_out_bias": (False,)}
    hf = HFConfig("seed_oss", "SeedOssForCausalLM", {"qkv_bias": "attention_bias"}, required)
    monkeypatch.setitem(models.FAMILIES, "seed_oss", Family(SeedOss, hf))

    @settings(max_examples=3, database=None, phases=[Phase.generate])
    @given(config=family_configs("seed_oss"), seed=SEEDS)
    def compare(config: DecoderConfig, seed: int) -> None:
        check_against_transformers(config, random_params(config, seed), random_batch(config, 2, 11, seed).tokens, seed)

    compare()
    assert not find(family_configs("seed_oss"), lambda config: not config.qkv_bias).qkv_bias
    monkeypatch.setitem(models.FAMILIES, "seed_oss", Family(Mistaken, hf))
    with pytest.raises(AssertionError):
        compare()
