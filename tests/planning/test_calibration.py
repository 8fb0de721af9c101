"""Time of a step from a few of its layers: arithmetic on measured times, and every kind of step that is measured."""

from itertools import count
from typing import Any

import msgspec
import pytest
import torch

from minitune.lora import Lora
from minitune.losses.preference import Dpo
from minitune.losses.token import CrossEntropy
from minitune.losses.unpaired import Kto
from minitune.models import Model
from minitune.models.families import llama
from minitune.optim.adamw import AdamW
from minitune.planning import calibration
from minitune.planning.calibration import Rows, machine, measured_step_s
from minitune.planning.step_spec import StepSpec
from support.models import random_params

CONFIG = llama.Config(n_layers=7, n_heads=2, n_kv_heads=1, d_model=18, d_head=8, d_ff=31, vocab_size=61)
RULE = Lora(2, 4.0, ("*_proj.weight",))


def step_of(loss: Any, lora: Lora | None, n_layers: int = 7, n_micro: int = 3, n_rows: int = 4) -> StepSpec:
    config = msgspec.structs.replace(CONFIG, n_layers=n_layers)
    params = random_params(config)
    trainable = {name: w.clone() for name, w in params.items()} if lora is None else lora.init(params, 0)
    model = Model(llama.FAMILY, config, n_remat=n_layers // 2)
    return StepSpec(model, params, trainable, lora, AdamW(lr=1e-3), loss, torch.device("cpu"), n_rows, 23, n_micro)


def ticks() -> Any:
    """A clock on which everything takes one second."""
    return count(0.0).__next__


HERE = machine(torch.device("cpu"), torch.float32)


def test_every_layer_more_takes_what_the_last_ones_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_micro_batch_and_update_s", lambda step, k, *_: (10.0 + 3 * k, 1.0 + 0.5 * k))
    for n_layers in (1, 2, 3, 7):
        step = step_of(CrossEntropy(), RULE, n_layers)
        wanted = 3 * (10 + 3 * n_layers) + 1 + 0.5 * n_layers
        assert measured_step_s(step, Rows(), HERE) == pytest.approx(wanted)


@pytest.mark.parametrize("lora", [RULE, msgspec.structs.replace(RULE, dropout=0.1), None], ids=["lora", "dropout", "full"])
@pytest.mark.parametrize("loss", [CrossEntropy(), Dpo(), Kto()], ids=["sft", "dpo", "kto"])
def test_every_kind_of_step_can_be_measured(loss: Any, lora: Lora | None) -> None:
    step = step_of(loss, lora)
    before = {name: w.clone() for name, w in step.params.items()}
    assert measured_step_s(step, Rows(0.5, 3), HERE, ticks()) == 3 + 1
    assert all(torch.equal(w, before[name]) for name, w in step.params.items())  # it trains weights of its own


def test_fewer_rows_are_measured_where_all_would_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(calibration, "_micro_batch_and_update_s", lambda step, k, n, *_: (seen.append(n), (float(n), 0.0))[1])
    slow = msgspec.structs.replace(HERE, flops_per_s={"float32": 1.0})
    assert measured_step_s(step_of(CrossEntropy(), RULE, n_rows=64), Rows(), slow) == pytest.approx(3 * 64)
    assert set(seen) == {1}


def test_a_machine_has_the_rates_of_what_was_timed() -> None:
    here = machine(torch.device("cpu"), torch.float32, ticks())
    assert here.flops_per_s == {"float32": 2 * calibration.WIDTH**3}
    assert here.memory_bytes_per_s == 2 * calibration.COPIED_BYTES
    assert (here.kind, here.n_per_node, here.attained) == ("cpu", 1, 1.0)
