"""Adapters of models with experts, both ways, against PEFT on transformers' own models: logits, ranks, scales, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from minitune import tree
from minitune.errors import InputError
from minitune.interop.peft.layout import CONFIG, Base
from minitune.interop.peft.load import load_adapter
from minitune.interop.peft.save import save_adapter
from minitune.lora import Lora, check_deltas
from minitune.models import FAMILIES, Model
from minitune.programs.stages.adapt import LoraStage
from minitune.programs.stages.save import Save
from minitune.programs.state import AbstractState
from minitune.types import Delta, Deltas
from support.closeness import distance
from support.experts import WITH_EXPERTS, small_experts
from support.models import random_batch, random_params, reference

ATOL = 1e-5  # of the scale of the logits
ROUTED = {name: 1 if name == "qwen2_moe" else 0 for name in WITH_EXPERTS}  # a layer with experts
STACKED = ("gpt_oss", "llama4_text")
ROUTERS = {"gpt_oss": "mlp.router", "llama4_text": "feed_forward.router", "mixtral": "block_sparse_moe.gate"}
# PEFT looks among modules alone for what its patterns match, and warns of those that match parameters
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")


def rule_of(name: str, rslora: bool = False) -> Lora:
    """Every linear map, ranks that differ by layer and between an expert's own maps."""
    i, end = ROUTED[name], ("w2.weight" if name == "mixtral" else "down_proj.weight")
    ranks = {f"*.layers.{i}.*experts*{'.down_proj' if name in STACKED else end}": 3, "*.experts.*": 4, "*gate.weight": 1}
    ranks = {glob: rank for glob, rank in ranks.items() if name not in STACKED or "gate" not in glob}
    targets = ("*.self_attn.*_proj.weight", "*.experts.*_proj" if name in STACKED else "*.experts.*.weight")
    more_targets = {"qwen2_moe": ("*shared_expert*", "*.0.mlp.*_proj.weight"), "qwen3_moe": ("*.1.mlp.*_proj.weight",)}
    more_targets["llama4_text"] = ("*shared_expert*", "*.1.feed_forward.*_proj.weight")
    return Lora(2, 3.0, (*targets, f"*.{ROUTERS.get(name, 'mlp.gate')}.weight", *more_targets.get(name, ())), ranks, rslora)


def moved(rule: Lora, params: dict[str, torch.Tensor]) -> Deltas:
    """Deltas with every part random."""
    generator = torch.Generator().manual_seed(0)
    return tree.map(lambda x: x + 0.3 * torch.randn(x.shape, generator=generator), rule.init(params, 0))


def save(folder: Path, deltas: Deltas, rule: Lora, names: Any) -> None:
    save_adapter(folder, deltas, rule, base=Base("x"), names=names)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_peft_reads_deltas_on_every_linear_map_and_we_read_them_back(name: str, rslora: bool, tmp_path: Path) -> None:
    config, rule = small_experts(name), rule_of(name, rslora)
    params, tokens, model = random_params(config, 3), random_batch(config, 2, 19).tokens, Model(FAMILIES[name], config)
    deltas = moved(rule, params)
    matrices = {n for n, w in params.items() if w.ndim > 1 and not n.endswith(("_bias", "embed_tokens.weight", "lm_head.weight"))}
    assert set(deltas) == matrices
    save(tmp_path, deltas, rule, params)
    logits = model.forward(rule.apply(params, deltas), tokens)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(reference(config, params), tmp_path).eval()(tokens).logits
    assert distance(logits, theirs) <= ATOL
    for part in (".self_attn.", ".experts.", ROUTERS.get(name, ".mlp.gate"), "shared_expert", ".0.mlp.down_proj."):
        fewer = {n: d for n, d in deltas.items() if part not in n}  # nothing that was written is without effect
        assert len(fewer) == len(deltas) or distance(model.forward(rule.apply(params, fewer), tokens), theirs) > 10 * ATOL

    again, back, _ = load_adapter(tmp_path, names=params)
    check_deltas(params, back, "here")
    assert set(back) == set(deltas)
    for n, d in deltas.items():
        assert torch.equal(back[n].a, d.a)
        assert torch.equal(back[n].b, d.b)
        assert again.scale(d) == pytest.approx(rule.scale(d))


FULL = {"target_modules": ["q_proj", "gate", "gate_proj", "up_proj", "down_proj"]}
STACK = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "experts.down_proj", "router.weight"]}
BESIDE = {
    "target_modules": ["o_proj"],
    "target_parameters": ["gate_up_proj", "down_proj", "mlp.gate.weight", "expert.up_proj.weight"],
}
MADE_BY_PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": ("gpt_oss", STACK),
    "gpt_oss, rslora and ranks": ("gpt_oss", {**STACK, "use_rslora": True, "rank_pattern": {"down_proj": 5}}),
    "gpt_oss, alphas": ("gpt_oss", {**STACK, "alpha_pattern": {"experts.gate_up_proj": 11, "q_proj": 2}}),
    "gpt_oss, one of two": ("gpt_oss", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "gpt_oss, the other": ("gpt_oss", {"target_modules": [], "target_parameters": ["1.mlp.experts.gate_up_proj"]}),
    "llama4": ("llama4_text", STACK),
    "llama4, one of two": ("llama4_text", {"target_modules": ["v_proj"], "target_parameters": ["experts.down_proj"]}),
    "mixtral": ("mixtral", {"target_modules": ["q_proj", "gate", "w1", "w2", "w3"]}),
    "mixtral, rslora": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"], "use_rslora": True}),
    "qwen2_moe": ("qwen2_moe", BESIDE),
    "qwen3_moe": ("qwen3_moe", FULL),
    "olmoe": ("olmoe", FULL),
    "olmoe, ranks": ("olmoe", {**FULL, "rank_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 1}}),
}  # fmt: skip


@pytest.mark.parametrize("case", MADE_BY_PEFT)
def test_an_adapter_that_peft_made_is_read(case: str, tmp_path: Path) -> None:
    name, fields = MADE_BY_PEFT[case]
    config = small_experts(name)
    params, tokens, model = random_params(config, 3), random_batch(config, 2, 19).tokens, Model(FAMILIES[name], config)
    theirs = get_peft_model(reference(config, params), LoraConfig(r=2, lora_alpha=7, init_lora_weights=False, **fields)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in (x for x in theirs.parameters() if x.requires_grad):
            x += 0.3 * torch.randn(x.shape, generator=generator)
        wanted = theirs(tokens).logits
    theirs.save_pretrained(tmp_path / "theirs")
    rule, deltas, _ = load_adapter(tmp_path / "theirs", names=list(reversed(params)))  # the order of the names says nothing
    check_deltas(params, deltas, "here")
    leaves = tree.leaves(deltas)  # which a step may write over: none lies in another's memory
    assert all(isinstance(delta, Delta) for delta in deltas.values())
    assert all(x.is_contiguous() for x in leaves)
    assert len({x.data_ptr() for x in leaves}) == len(leaves)
    assert distance(model.forward(rule.apply(params, deltas), tokens), wanted) <= ATOL
    assert distance(model.forward(params, tokens), wanted) > 1000 * ATOL
    save(tmp_path / "ours", deltas, rule, params)  # and is written so that PEFT reads it again
    with torch.no_grad():
        again = PeftModel.from_pretrained(reference(config, params), tmp_path / "ours").eval()(tokens).logits
    assert distance(again, wanted) <= ATOL


def test_a_merged_adapter_of_stacked_experts_equals_the_one_beside_the_model() -> None:
    for name in STACKED:
        config, rule = small_experts(name), rule_of(name)
        params, tokens, model = random_params(config, 3), random_batch(config, 2, 19).tokens, Model(FAMILIES[name], config)
        deltas = moved(rule, params)
        merged = model.forward(rule.merge(params, deltas), tokens)
        assert distance(model.forward(rule.apply(params, deltas), tokens), merged) <= ATOL


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mixtral", {"targets": ("*.w1.weight",)}, r"w3\.weight has no delta and .*\.w1\.weight a delta of rank 2"),
        ("qwen3_moe", {"targets": ("*.experts.[12].*",)}, r"expected one rank for all of .*\.mlp\.experts\.gate_up_proj"),
        ("olmoe", {"ranks": {"*.3.down_proj*": 5}}, r"3\.down_proj\.weight has a delta of rank 5 and .* rank 2"),
        ("olmoe", {"dora": True}, "has a DoRA, expected dora = false"),
        ("gpt_oss", {"targets": ("*.router.weight",), "dora": True}, r"router\.weight has a DoRA, expected dora = false"),
    ],
)
def test_what_peft_cannot_join_is_refused_before_training_and_when_saving(
    name: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    params = random_params(small_experts(name))
    stage = LoraStage(rank=2, alpha=3.0, **{"targets": ("*.experts.*",), **fields})
    abstract = stage.check(AbstractState({}, Model(FAMILIES[name], small_experts(name)), params))
    with pytest.raises(InputError, match=message):
        Save(what="deltas").check(abstract)
    assert Save(what="merged").check(abstract).saved
    with pytest.raises(InputError, match=message):
        save(tmp_path / "adapter", stage.rule.init(params, 0), stage.rule, params)
    assert not (tmp_path / "adapter").exists()


def test_whole_tensors_that_peft_keeps_elsewhere_are_refused(tmp_path: Path) -> None:
    params, rule = random_params(small_experts("mixtral")), Lora(2, 3.0, ("*q_proj*",))
    name = "model.layers.0.block_sparse_moe.gate.weight"
    with pytest.raises(InputError, match=r"gate\.weight trains whole, which PEFT knows as model\.layers\.0\.mlp\.gate\.weight"):
        save(tmp_path / "adapter", {**rule.init(params, 0), name: params[name]}, rule, params)


def test_an_adapter_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    for name, message in (
        ("olmoe", r"deltas of 5 experts, expected 4 as in the model"),
        ("gpt_oss", r"a \[5, 2, 14\].*expected"),
    ):
        config = small_experts(name)
        params = random_params(config)
        fields = STACK if name == "gpt_oss" else FULL
        get_peft_model(reference(config, params), LoraConfig(r=2, lora_alpha=7, **fields)).save_pretrained(tmp_path / name)
        fewer = {n: w[:4] if w.ndim == 3 else w for n, w in params.items() if ".experts.4." not in n}
        with pytest.raises(InputError, match=message):
            check_deltas(fewer, load_adapter(tmp_path / name, names=fewer)[1], "here")
        path = tmp_path / name / CONFIG
        path.write_text(
            json.dumps(
                {
                    **json.loads(path.read_text(encoding="utf-8")),
                    "rank_pattern": {"down_proj": 3, "gate_up_proj": 4 if name == "olmoe" else 2},
                }
            ),
            encoding="utf-8",
        )
        with pytest.raises(InputError, match=r"experts has A .* expected \[3, in\] and \[out, 3\], times the number of experts,"):
            load_adapter(tmp_path / name, names=params)
