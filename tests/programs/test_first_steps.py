"""What a run proves in its first steps, and at its end, of every weight that trains."""

import re
from pathlib import Path

import pytest
import torch

from minitune.errors import InputError
from minitune.programs.stages.first_steps import (
    WatchedAdapter,
    require_gradients,
    require_moved,
    signatures,
    watched,
    watched_adapters,
)
from minitune.types import Delta, Mean, TrainState
from support.programs import LORA, TRAIN, start

pytestmark = pytest.mark.fast


def linear(dead: str = ""):
    """Objective that is linear in every leaf but one."""

    def objective(trainable, params, batch):
        used = [leaf for path, leaf in trainable.items() if path != dead]
        total = sum(leaf.sum() for leaf in used) * batch.sum()
        return Mean(total, batch.new_tensor(len(batch))), {}

    return objective


def test_a_weight_without_a_gradient_is_named() -> None:
    trainable = {"up.weight": torch.ones(3), "norm.weight": torch.ones(2)}
    require_gradients("train", linear(), trainable, {}, torch.ones(4))
    with pytest.raises(InputError, match=r"train finds no gradient for norm.weight \(1 tensors of 2"):
        require_gradients("train", linear("norm.weight"), trainable, {}, torch.ones(4))


def test_no_target_no_finite_loss_and_no_gradient_at_all_prove_nothing() -> None:
    trainable = {"up.weight": torch.ones(3), "norm.weight": torch.ones(2)}
    for batch in (torch.ones(0), torch.full((2,), torch.inf), torch.zeros(2)):
        require_gradients("train", linear("norm.weight"), trainable, {}, batch)


def test_one_leaf_of_a_delta_and_one_expert_of_a_layer_are_enough() -> None:
    def objective(trainable, params, batch):
        total = trainable["q.weight"].b.sum() + trainable["mlp.experts.1.up.weight"].sum()
        return Mean(total, torch.ones(())), {}

    experts = {f"mlp.experts.{i}.up.weight": torch.ones(2) for i in range(3)}
    trainable = {"q.weight": Delta(torch.ones(1, 2), torch.zeros(2, 1)), **experts}
    require_gradients("train", objective, trainable, {}, torch.ones(1))
    more = {**trainable, "other.experts.0.up.weight": torch.ones(2)}
    with pytest.raises(InputError, match=r"no gradient for other.experts "):
        require_gradients("train", objective, more, {}, torch.ones(1))


def test_a_weight_that_does_not_move_is_named() -> None:
    before = {"up.weight": torch.zeros(3), "norm.weight": torch.zeros(2)}
    after = {"up.weight": torch.tensor([1.0, -1.0, 0.0]), "norm.weight": torch.zeros(2)}
    with pytest.raises(InputError, match=r"train has not moved norm.weight in 2 steps"):
        require_moved("train", signatures(before), signatures(after), lambda path: 1e-9)
    still = {"up.weight": 1e-9, "norm.weight": 0.0}
    require_moved("train", signatures(before), signatures(after), still.__getitem__)


def test_a_rate_below_the_rounding_of_a_weight_is_no_fault() -> None:
    """The first rates of a long warm-up; and bfloat16 is rounded at random."""
    ones = signatures({"norm.weight": torch.ones(2)})
    require_moved("train", ones, ones, lambda path: 1e-8)
    with pytest.raises(InputError, match=r"has not moved norm.weight"):
        require_moved("train", ones, ones, lambda path: 1e-6)
    narrow = signatures({"norm.weight": torch.zeros(2, dtype=torch.bfloat16)})
    require_moved("train", narrow, narrow, lambda path: 1.0)


def test_only_steps_that_count_are_watched_and_a_step_is_taken_once() -> None:
    taken = []
    state = TrainState({"w": torch.zeros(3)}, ())

    def step(skipped: float, moves: float):
        def take():
            taken.append(skipped)
            return TrainState({"w": torch.full((3,), moves)}, ()), {"skipped": torch.tensor(skipped)}

        return take

    watch = watched("train", linear(), {}, lambda path: 1e-3, 4)
    watch(state, torch.ones(4), step(0.0, 0.0))
    watch(state, torch.ones(4), step(1.0, 0.0))
    with pytest.raises(InputError, match="has not moved w in 2 steps"):
        watch(state, torch.ones(4), step(0.0, 0.0))
    watch = watched("train", linear(), {}, lambda path: 1e-3, 4)
    for _ in range(3):
        watch(state, torch.ones(4), step(0.0, 1.0))
    assert taken == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_every_adapter_of_a_sweep_is_watched_and_named() -> None:
    state = TrainState({"w": torch.zeros(2, 3), "x": torch.zeros(2, 3)}, ())

    def adapter(i: int, dead: str = "") -> WatchedAdapter:
        return WatchedAdapter(linear(dead), lambda path: 1e-3, lambda stacked: {key: leaf[i] for key, leaf in stacked.items()})

    def step(moves: tuple[float, float]):
        moved = torch.tensor(moves)[:, None].expand(2, 3)
        return lambda: (TrainState({"w": moved, "x": moved}, ()), {"skipped": torch.zeros(2)})

    watch = watched_adapters("train", [adapter(0), adapter(1, dead="x")], {}, 4)
    with pytest.raises(InputError, match=r"train, adapter 1, finds no gradient for x"):
        watch(state, torch.ones(2, 4), step((1.0, 1.0)))
    watch = watched_adapters("train", [adapter(0), adapter(1)], {}, 4)
    watch(state, torch.ones(2, 4), step((1.0, 0.0)))
    with pytest.raises(InputError, match=r"train, adapter 1, has not moved w in 2 steps"):
        watch(state, torch.ones(2, 4), step((1.0, 0.0)))
    watch = watched_adapters("train", [adapter(0), adapter(1)], {}, 4)
    for _ in range(3):
        watch(state, torch.ones(2, 4), step((1.0, 2.0)))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lora.alpha=inf", "alpha is inf, expected float <= 1e"),
        ("lora.alpha=nan", "alpha is nan, expected float > 0"),
        ("lora.rank=100000", "has rank 100000 for .* of shape"),
        ("train.optimizer.lr=inf", "lr is inf"),
        ("train.optimizer.lr=nan", "lr is nan"),
        ("train.steps=9223372036854775808", "steps is 9223372036854775808"),
        ("train.batch_size=9223372036854775807", "batch_size is 9223372036854775807"),
        ('train.lr_factors={"*"=inf}', "is inf"),
        ("data.train.seq_len=9223372036854775807", "seq_len is 9223372036854775807"),
    ],
)
def test_numbers_that_no_run_can_use_are_refused(
    word: str, message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert start(tmp_path, tiny, LORA + TRAIN, word, verb=("check",)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
