"""What a step says at its door and when it can't go on: wrong batches, updates and gradients that are not finite."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from minitune import tree
from minitune.algorithms.supervised import sft
from minitune.errors import InputError
from minitune.models import Model
from minitune.models.families import llama
from minitune.optim.adamw import AdamW
from minitune.steps import train_step
from support.models import SMALL, random_batch, random_params
from support.numbers import STAGE, Numbers, train

ROWS = random_batch(SMALL, 3, 7)
WRONG = {
    "a dict": (ROWS._asdict(), r"steps: the batch is a dict, expected one of Batch, Pairs, .* `counts`"),
    "a tensor": (ROWS.tokens, r"steps: the batch is a Tensor, expected one of"),
    "a list": ([ROWS], r"steps: the batch is a list, expected one of"),
    "other rows": (ROWS._replace(tokens=ROWS.tokens[:2]), r"has rows: tokens 2, segment_ids 3, loss_mask 3; expected the same"),
    "no rows": (tree.map(lambda x: x[:0], ROWS), r"has rows: tokens 0, segment_ids 0, loss_mask 0; expected the same"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_batch_is_told_at_the_door(name: str) -> None:
    batch, message = WRONG[name]
    params = random_params(SMALL)
    step = train_step(sft(Model(llama.FAMILY, SMALL), None), AdamW(lr=1e-3))
    state = step.init({"model.norm.weight": params["model.norm.weight"]})
    with pytest.raises(TypeError, match=message):
        step.update(params, state, batch)


class Broken(msgspec.Struct, frozen=True):
    """Optimizer of somebody's own, whose update of one leaf is NaN."""

    def init(self, params: Any) -> Any:
        return {"n": torch.zeros(())}

    def update(self, grads: Any, state: Any, params: Any) -> Any:
        updates = {path: g * (torch.nan if "layers.1.mlp" in path else 1.0) for path, g in tree.items(grads)}
        return tree.rebuild(grads, updates.values()), {"n": state["n"] + 1}


@pytest.mark.parametrize("donate", [False, True])
def test_an_update_that_is_not_finite_is_named_and_nothing_is_written(donate: bool) -> None:
    params = random_params(SMALL)
    trainable = {name: w.clone() for name, w in params.items() if name.endswith("down_proj.weight")}
    step = train_step(sft(Model(llama.FAMILY, SMALL), None), Broken(), donate=donate)
    state = step.init(trainable)
    with pytest.raises(FloatingPointError, match=r"the update of model\.layers\.1\.mlp\.down_proj\.weight is not finite"):
        step.update(params, state, ROWS)
    assert all(torch.equal(w, params[name]) for name, w in trainable.items())
    assert float(state.opt_state["n"]) == 0.0


def test_a_gradient_that_is_not_finite_is_numbered() -> None:
    params = random_params(SMALL)
    names = [name for name in params if name.endswith("down_proj.weight")]
    params["model.layers.1.input_layernorm.weight"] = torch.full((SMALL.d_model,), torch.inf)
    step = train_step(sft(Model(llama.FAMILY, SMALL), None), AdamW(lr=1e-3))
    _, metrics = step.update(params, step.init({name: params[name] for name in names}), ROWS)
    assert (int(metrics["not_finite"]), float(metrics["skipped"])) == (0, 1.0)


class Leafy(Numbers):
    """Numbers whose skipped steps say which leaf was not finite."""

    def step(self, train_state: Any, batch: Any) -> Any:
        after, metrics = super().step(train_state, batch)
        return after, {**metrics, "not_finite": torch.where(metrics["skipped"] > 0, 0, -1)}


def test_a_run_says_which_leaf_it_skipped_steps_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"2 in all, the first without a finite gradient being x; they changed nothing"):
        train(tmp_path / "leafy", Leafy(skipped=(5, 6)), STAGE)
    said = capsys.readouterr().out
    assert said.count("changed nothing: gradient of x is not finite") == 1
    assert "train: step 5 changed nothing" in said
    with pytest.raises(InputError, match=r"2 in all; they changed nothing"):
        train(tmp_path / "plain", Numbers(skipped=(5, 6)), STAGE)
    assert "step 5 changed nothing: no target, or no finite loss" in capsys.readouterr().out
