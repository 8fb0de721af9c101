"""Mixtures of many experts: what is found with a few of them is what all of them need."""

from typing import Any

import pytest
import torch

from minitune.lora import Lora
from minitune.losses.token import CrossEntropy
from minitune.models import Model
from minitune.models.experts import Experts
from minitune.models.families import qwen3_moe
from minitune.models.weights import shapes
from minitune.optim.adamw import AdamW
from minitune.optim.eight_bit import AdamW8bit
from minitune.optim.sgd import SGD
from minitune.planning import activations, few_experts, memory
from minitune.planning.few_experts import BlockOfExperts
from minitune.planning.memory import peak_memory
from minitune.planning.step_spec import StepSpec

EXPERTS = Experts(n_experts=13, n_active=2, d_ff=98, names="qwen")
CONFIG = qwen3_moe.Config(
    n_layers=3, n_heads=6, n_kv_heads=2, d_model=90, d_head=14, d_ff=262, vocab_size=131, experts=EXPERTS, tie_embeddings=False
)
ADAMW = AdamW(lr=1e-3)


def step_of(lora: Lora | None, optimizer: Any = ADAMW, n_remat: int = 0, n_tokens: int = 1000) -> StepSpec:
    params = {name: torch.empty(size, device="meta") for name, size in shapes(CONFIG).items()}
    trainable: Any = params if lora is None else lora.like(params)
    model = Model(qwen3_moe.FAMILY, CONFIG, n_remat=n_remat)
    return StepSpec(model, params, trainable, lora, optimizer, CrossEntropy(), torch.device("cpu"), 1, n_tokens)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of experts that are measured."""
    seen: list[int] = []
    measure = activations._measure_block

    def watched(model: Any, kind: Any, again: bool, x: Any, inputs: Any, block: BlockOfExperts) -> Any:
        seen.append(block.experts.n_experts)
        return measure(model, kind, again, x, inputs, block)

    monkeypatch.setattr(activations, "_measure_block", watched)
    return seen


@pytest.mark.parametrize(
    ("lora", "n_remat"),
    [
        (Lora(2, 4.0, ("*_proj.weight",)), 0),
        (Lora(2, 4.0, ("*_proj.weight", "*.gate.weight"), dora=True), 3),
        (Lora(2, 4.0, ("*.self_attn.*_proj.weight",)), 1),
    ],
    ids=["all", "router and lengths", "attention alone"],
)
def test_a_few_experts_say_what_all_need(lora: Lora, n_remat: int, measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(lora, n_remat=n_remat)
    found = peak_memory(step)
    assert set(measured) == {2, 4}
    measured.clear()
    monkeypatch.setattr(few_experts, "LEAST", 1000)
    wanted = peak_memory(step)
    assert set(measured) == {13}
    for name, n_bytes in wanted.items():
        assert found[name] == pytest.approx(n_bytes, rel=0.005), name


def test_experts_that_train_whole_or_differ_are_all_measured(measured: list[int]) -> None:
    peak_memory(step_of(None))
    assert measured.count(13) == measured.count(2) == measured.count(4) > 0
    measured.clear()
    peak_memory(step_of(Lora(2, 4.0, ("*_proj.weight",), ranks={"*.experts.7.up_proj.weight": 3})))
    assert set(measured) == {13}


@pytest.mark.parametrize("optimizer", [AdamW(lr=1e-3), SGD(lr=1e-3, momentum=0.9), AdamW8bit(lr=1e-3)])
def test_the_state_of_an_optimizer_is_that_of_all_layers(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(Lora(2, 4.0, ("*_proj.weight", "lm_head.weight")), optimizer)
    wanted = peak_memory(step)
    monkeypatch.setattr(memory, "MANY_LEAVES", 10)
    found = peak_memory(step)
    assert found["optimizer"] == pytest.approx(wanted["optimizer"], rel=1e-4)
    assert {**found, "optimizer": 0} == {**wanted, "optimizer": 0}
