"""What a step says at its door and when it can't go on: wrong batches, updates and gradients that are not finite."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch

from minitune import tree
from minitune.algorithms.distillation import distillation
from minitune.algorithms.objective import mean_of, require_fields
from minitune.algorithms.preference import preference
from minitune.algorithms.step_arguments import require_batch
from minitune.algorithms.supervised import sft
from minitune.algorithms.unpaired import unpaired_preference
from minitune.autodiff.value_and_grad import per_example, value_and_grad
from minitune.errors import InputError
from minitune.losses import Dpo, cross_entropy
from minitune.models import Model
from minitune.models.families import llama
from minitune.optim.adamw import AdamW
from minitune.steps import train_step
from minitune.types import Batch, Mean
from support.models import SMALL, random_batch, random_params
from support.numbers import STAGE, Numbers, train

ROWS = random_batch(SMALL, 3, 7)


class Weighted(NamedTuple):
    """Batch of somebody's own that says nothing about itself."""

    rows: Batch
    weights: torch.Tensor


class Counted(NamedTuple):
    """Batch of somebody's own whose `counts` lacks @property."""

    rows: Batch

    def counts(self) -> str:
        return "rows"


class Whole(Weighted):
    """Batch of somebody's own that a step takes."""

    @property
    def counts(self) -> str:
        return "target_tokens"


@dataclass
class Record:
    """Batch of somebody's own that is no tree."""

    tokens: torch.Tensor
    counts: str = "rows"


WEIGHTED = Whole(ROWS, torch.rand(3))
NO_COUNTS = r"without the property `counts`, expected one of Batch, Pairs, .* or a NamedTuple of tensors with it: the name"
WRONG = {
    "a dict": (ROWS._asdict(), rf"steps: the batch is a dict {NO_COUNTS}"),
    "a tensor": (ROWS.tokens, rf"steps: the batch is a Tensor {NO_COUNTS}"),
    "a list": ([ROWS], rf"steps: the batch is a list {NO_COUNTS}"),
    "no counts": (Weighted(ROWS, torch.rand(3)), rf"steps: the batch is a Weighted {NO_COUNTS}"),
    "a method": (Counted(ROWS), r"the batch is a Counted whose `counts` is no string, not the property `counts`, expected"),
    "no tree": (
        Record(ROWS.tokens),
        r"is a Record that is no tree of tensors, expected a NamedTuple .* \(tree: root is",
    ),
    "no tensor": (
        WEIGHTED._replace(weights=[0.5] * 3),
        r"is a Whole that is no tree of tensors, .* \(tree: weights\.0 is",
    ),
    "other rows": (ROWS._replace(tokens=ROWS.tokens[:2]), r"has rows: tokens 2, segment_ids 3, loss_mask 3; expected the same"),
    "no rows": (tree.map(lambda x: x[:0], ROWS), r"has rows: tokens 0, segment_ids 0, loss_mask 0; expected the same"),
    "another kind": (
        WEIGHTED,
        r"a Whole without loss_mask, segment_ids, target_mask, tokens, expected a Batch",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_batch_is_told_at_the_door(name: str) -> None:
    batch, message = WRONG[name]
    params = random_params(SMALL)
    step = train_step(sft(Model(llama.FAMILY, SMALL), None), AdamW(lr=1e-3))
    state = step.init({"model.norm.weight": params["model.norm.weight"]})
    with pytest.raises(TypeError, match=message):
        step.update(params, state, batch)


def test_a_batch_of_ones_own_with_all_that_a_batch_has_is_one() -> None:
    class Mine(NamedTuple):
        tokens: torch.Tensor
        segment_ids: torch.Tensor
        loss_mask: torch.Tensor
        note: torch.Tensor

        counts = Batch.counts
        target_mask = Batch.target_mask

    mine = Mine(*ROWS, torch.rand(3))
    require_batch(mine)
    require_fields(mine, Batch)


OBJECTIVE = sft(Model(llama.FAMILY, SMALL), None)
NO_STEP = {
    "no function": ((3.0, AdamW(lr=1e-3)), r"steps: the objective is a float, expected a function \(trainable, params, batch\)"),
    "torch's": (
        (OBJECTIVE, torch.optim.SGD([torch.zeros(1)])),
        r"the optimizer is a SGD without init and update, expected",
    ),
    "a class": (
        (OBJECTIVE, AdamW),
        r"steps: the optimizer is the class AdamW, expected an instance with init",
    ),
    "a name": ((OBJECTIVE, "adamw"), r"steps: the optimizer is a str without init and update, expected an instance"),
}


@pytest.mark.parametrize("name", NO_STEP)
def test_what_is_no_objective_and_no_optimizer_is_told_before_the_first_step(name: str) -> None:
    arguments, message = NO_STEP[name]
    with pytest.raises(TypeError, match=message):
        inspect.unwrap(train_step)(*arguments)


WRONG_RESULTS = {
    "a number": (
        False,
        lambda x: x.sum(),
        r"grad: the function returned Tensor, expected a Mean, or has_aux=True beside",
    ),
    "a pair": (False, lambda x: (mean_of(x), {}), r"returned \(Mean, dict\), expected a Mean, or has_aux=True"),
    "no reports": (True, lambda x: mean_of(x), r"grad: the function returned Mean, expected \(Mean, aux\), as has_aux says"),
    "a wrong pair": (True, lambda x: (x.sum(), {}), r"returned \(Tensor, dict\), expected \(Mean, aux\)"),
}


@pytest.mark.parametrize("name", WRONG_RESULTS)
def test_a_function_without_a_mean_is_told_what_it_returned(name: str) -> None:
    has_aux, function, message = WRONG_RESULTS[name]
    with pytest.raises(TypeError, match=message):
        value_and_grad(function, has_aux)(torch.rand(3))
    with pytest.raises(TypeError, match=message):
        torch.func.vmap(value_and_grad(function, has_aux))(torch.rand(2, 3))


def test_an_optimizer_without_a_next_state_is_named() -> None:
    class Sign(NamedTuple):
        def init(self, params: Any) -> Any:
            return ()

        def update(self, grads: Any, state: Any, params: Any) -> Any:
            return tree.map(torch.sign, grads)

    params = random_params(SMALL)
    step = train_step(OBJECTIVE, Sign())
    with pytest.raises(TypeError, match=r"optim: update of Sign returned a dict, expected \(updates, state\)"):
        step.update(params, step.init({"model.norm.weight": params["model.norm.weight"]}), ROWS)


class Narrow(NamedTuple):
    """Optimizer of somebody's own, whose update of one leaf would broadcast."""

    def init(self, params: Any) -> Any:
        return ()

    def update(self, grads: Any, state: Any, params: Any) -> Any:
        return {name: g.sum() if "layers.1" in name else g for name, g in grads.items()}, state


def test_an_update_of_another_shape_is_named() -> None:
    params = random_params(SMALL)
    step = train_step(OBJECTIVE, Narrow())
    trainable = {name: params[name] for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight")}
    with pytest.raises(
        TypeError,
        match=rf"update of Narrow returned \[\] for model\.layers\.1\.input_layernorm\.weight, expected .* \[{SMALL.d_model}\]",
    ):
        step.update(params, step.init(trainable), ROWS)


@pytest.mark.parametrize("n_rows", [0, -1, 2.0, True, "2"])
def test_a_micro_batch_has_rows(n_rows: Any) -> None:
    with pytest.raises(TypeError, match=rf"steps: micro_batch is {n_rows!r}, expected an integer of at least 1, or None"):
        inspect.unwrap(train_step)(OBJECTIVE, AdamW(lr=1e-3), micro_batch=n_rows)


ONE = torch.ones(())
OBJECTIVE_RESULTS = {
    "a tensor": (ONE, r"grad: the function returned Tensor, expected \(Mean, aux\), as has_aux says"),
    "a Mean": (Mean(ONE, ONE), r"grad: the function returned Mean, expected \(Mean, aux\), as has_aux says"),
    "an int": ((Mean(ONE, 3), {}), r"returned a Mean whose weight is a int, expected a tensor \[\]; Mean\.of"),
    "rows": ((Mean(torch.ones(3), ONE), {}), r"returned a Mean whose total is \[3\], expected a tensor \[\]; Mean\.of"),
    "a list": ((Mean(ONE, ONE), []), r"objective: the reports are a list, expected a dict of Means"),
    "a plain report": ((Mean(ONE, ONE), {"kl": ONE}), r"objective: the report 'kl' is a Tensor, expected a Mean; Mean\.of"),
    "a report of rows": ((Mean(ONE, ONE), {"kl": Mean(torch.ones(2), ONE)}), r"a Mean whose total is \[2\], expected"),
    "a taken name": ((Mean(ONE, ONE), {"grad_norm": Mean(ONE, ONE)}), r"a report is named 'grad_norm', which is a metric of"),
    "the weight": ((Mean(ONE, ONE), {"target_tokens": Mean(ONE, ONE)}), r"a report is named 'target_tokens', which is a"),
}


@pytest.mark.parametrize("name", OBJECTIVE_RESULTS)
def test_an_objective_of_ones_own_is_told_what_it_returned(name: str) -> None:
    result, message = OBJECTIVE_RESULTS[name]
    step = train_step(lambda trainable, params, batch: result, AdamW(lr=1e-3))
    with pytest.raises(TypeError, match=message):
        step.update({}, step.init({"w": torch.rand(3)}), ROWS)


@pytest.mark.parametrize("name", ["a tensor", "an int", "rows"])
def test_a_function_of_one_example_is_told_what_it_returned(name: str) -> None:
    result, message = OBJECTIVE_RESULTS[name]
    value = result[0] if isinstance(result, tuple) else result
    message = message.replace(r"\(Mean, aux\), as has_aux says", "a Mean, or")
    with pytest.raises(TypeError, match=message):
        per_example(lambda w, x: value, chunk=2)({"w": torch.rand(3)}, torch.rand(4))


@pytest.mark.parametrize(
    ("objective", "loss", "message"),
    [
        (preference, cross_entropy, r"the loss is a function without needs_reference and rewards, expected an instance of a"),
        (preference, Dpo, r"the loss is the class Dpo, expected an instance of a PreferenceLoss, such as losses\.Dpo\(\)"),
        (unpaired_preference, cross_entropy, r"the loss is a function without rewards, expected an instance such as"),
        (distillation, cross_entropy, r"the loss is a function without on_top, expected an instance of a TeacherLoss"),
        (sft, "cross_entropy", r"the loss is a str, expected a function \(logits \[n V\], targets \[n\]\)"),
    ],
)
def test_what_is_no_loss_is_told_what_it_lacks(objective: Any, loss: Any, message: str) -> None:
    rest = () if objective is sft else (None,)
    with pytest.raises(TypeError, match=f"objective: {message}"):
        inspect.unwrap(objective)(Model(llama.FAMILY, SMALL), None, loss, *rest)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (-0.5, r"loss: the least weight of the loss_mask is -0\.5, expected numbers from 0 to 1"),
        (torch.nan, r"loss: weights of the loss_mask are not finite, expected numbers from 0 to 1"),
        (torch.inf, r"loss: weights of the loss_mask are not finite, expected numbers from 0 to 1"),
    ],
)
def test_weights_are_finite_and_not_negative(weight: float, message: str) -> None:
    params = random_params(SMALL)
    weights = torch.ones(ROWS.tokens.shape)
    weights[ROWS.target_mask().nonzero(as_tuple=True)[0][-1], ROWS.target_mask().nonzero(as_tuple=True)[1][-1]] = weight
    batch, trainable = ROWS._replace(loss_mask=weights), {"model.norm.weight": params["model.norm.weight"]}
    with pytest.raises(TypeError, match=message):
        value_and_grad(OBJECTIVE, has_aux=True)(trainable, params, batch)
    # where the host can't look, the loss says so
    (loss, _), _ = torch.func.vmap(lambda b: value_and_grad(OBJECTIVE, has_aux=True)(trainable, params, b))(
        tree.map(lambda x: x[None], batch)
    )
    assert loss.total.isnan().all()


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
