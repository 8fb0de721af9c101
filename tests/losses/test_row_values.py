"""A loss of one's own gives exactly one value a row: all else is refused where it is called, in every way of running it."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from minitune import tree
from minitune.algorithms.distillation import Teacher, distillation
from minitune.algorithms.preference import preference
from minitune.algorithms.supervised import sft
from minitune.algorithms.unpaired import unpaired_preference
from minitune.autodiff.value_and_grad import per_example, value_and_grad
from minitune.losses import Dpo, ForwardKL, Kto, cross_entropy
from minitune.optim.sgd import SGD
from minitune.steps import sft_step
from minitune.types import Pairs, UnpairedBatch
from support.models import SMALL, model_of, random_batch, random_params

MODEL, PARAMS = model_of(SMALL), random_params(SMALL, 3)
ROWS = random_batch(SMALL, 3, 7)
N = int(ROWS.target_mask().sum())
WRONG: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "a kept dimension": (lambda x: x[:, None], "returned [N, 1], expected one value a row, [N]; keep no dimension"),
    "every row with every other": (lambda x: x[:, None] + x, "returned [N, N], expected one value a row, [N]"),
    "a sum": (lambda x: x.sum(), "returned [], expected one value a row, [N]"),
    "a mean": (lambda x: x.mean(), "returned [], expected one value a row, [N]"),
    "a number": (lambda x: 1.0, "returned a float, expected one value a row, [N]"),
    "a tuple": (lambda x: (x, x), "returned a tuple, expected one value a row, [N]"),
    "integers": (lambda x: x.long(), "returned torch.int64, expected floating-point values"),
    "detached": (lambda x: x.detach(), "returned values without a gradient, expected ones that depend on its inputs"),
}


def message(name: str, n: int) -> str:
    return re.escape(f"loss: the loss {WRONG[name][1]}".replace("N", str(n)))


def token_loss(name: str) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    return lambda logits, targets: WRONG[name][0](cross_entropy(logits, targets))


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_a_token_loss_gives_one_value_a_row(name: str, head_trains: bool) -> None:
    head = "lm_head.weight" if "lm_head.weight" in PARAMS else "model.embed_tokens.weight"
    trainable = {n: PARAMS[n] for n in (head if head_trains else "model.layers.0.mlp.up_proj.weight",)}
    for model in (MODEL, MODEL._replace(n_remat=9)):
        step = sft_step(model, None, SGD(lr=0.1), token_loss(name))
        with pytest.raises(TypeError, match=message(name, N)):
            step.update(PARAMS, step.init(trainable), ROWS)


@pytest.mark.parametrize("name", WRONG)
def test_under_transforms_it_does_so_too(name: str) -> None:
    trainable = {"model.norm.weight": PARAMS["model.norm.weight"]}
    objective = sft(MODEL, None, token_loss(name))
    of_a_row = lambda t, row: objective(t, PARAMS, tree.map(lambda x: x[None], row))[0]  # noqa: E731
    n = ROWS.tokens.shape[1]  # under a transform the head takes every token
    with pytest.raises(TypeError, match=message(name, n)):
        per_example(of_a_row, chunk=2)(trainable, ROWS)
    with pytest.raises(TypeError, match=message(name, 3 * n)):
        torch.func.grad(lambda t: objective(t, PARAMS, ROWS)[0].total)(trainable)


def test_several_values_a_row_are_asked_for() -> None:
    two = lambda logits, targets: torch.stack([cross_entropy(logits, targets)] * 2, 1)  # noqa: E731
    nats = MODEL.token_losses(PARAMS, ROWS, two, n_values=2)
    torch.testing.assert_close(nats[..., 1], MODEL.token_losses(PARAMS, ROWS, cross_entropy))
    with pytest.raises(TypeError, match=rf"returned \[{N}, 2\], expected one value a row, \[{N}\]"):
        MODEL.token_losses(PARAMS, ROWS, two)
    with pytest.raises(TypeError, match=rf"returned \[{N}\], expected 2 values a row, \[{N}, 2\]"):
        MODEL.token_losses(PARAMS, ROWS, lambda y, t, _: cross_entropy(y, t), ROWS.tokens, n_values=2)


class Changed:
    """A loss whose result is changed, with all else that the loss has."""

    needs_reference = True

    def __init__(self, loss: Any, change: Callable[[torch.Tensor], Any]) -> None:
        self.loss, self.change = loss, change
        self.rewards = getattr(loss, "rewards", None)
        self.on_top = getattr(loss, "on_top", None)

    def __call__(self, *args: Any) -> Any:
        return self.change(self.loss(*args))


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("kind", ["pairs", "unpaired", "distillation"])
def test_losses_of_answers_and_of_teachers_give_one_value_a_row(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change = WRONG[name][0]
    trainable = {"model.norm.weight": PARAMS["model.norm.weight"]}
    if kind == "pairs":
        objective, batch, n = preference(MODEL, None, Changed(Dpo(), change), {}), Pairs(ROWS, ROWS), 3
    elif kind == "unpaired":
        kto = Kto.__call__
        monkeypatch.setattr(Kto, "__call__", lambda *args: change(kto(*args)))
        objective = unpaired_preference(MODEL, None, Kto(), {})
        batch, n = UnpairedBatch(ROWS, ROWS, torch.tensor([True, False, True])), 3
    else:
        objective, batch, n = distillation(MODEL, None, Changed(ForwardKL(), change), Teacher(MODEL, PARAMS)), ROWS, N
    with pytest.raises(TypeError, match=message(name, n)):
        value_and_grad(objective, has_aux=True)(trainable, PARAMS, batch)


def test_rewards_are_two_values_a_pair() -> None:
    for rewards, found in (
        (lambda p, r: p.chosen, "rewards of Changed returned a Tensor, expected (those of chosen"),
        (lambda p, r: (p.chosen.sum(), p.rejected), "rewards of Changed returned [], expected one value a row, [3]"),
    ):
        loss = Changed(Dpo(), lambda x: x)
        loss.rewards = rewards
        with pytest.raises(TypeError, match=re.escape(found)):
            preference(MODEL, None, loss, {})({}, PARAMS, Pairs(ROWS, ROWS))
