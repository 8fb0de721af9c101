"""README: its snippets compute what they say, its pictures are those of the package. test_pages.py runs its commands."""

import re

import pytest
import torch

from minitune import steps, tree
from minitune.algorithms.supervised import sft
from minitune.losses.registry import Loss
from support.pages import blocks_of, commands_of, executed
from support.paths import ROOT
from support.programs import SHIPPED

PAGE = ROOT / "README.md"
README = PAGE.read_text("utf-8")
INSTALLS = ("pip install -e . && python -m minitune programs/lora.toml", "pip install -e '.[test]' && pytest")


@pytest.fixture(scope="module")
def names() -> dict:
    """Names that the Python snippets define."""
    torch.manual_seed(0)
    return executed(PAGE)


def test_the_snippets_are_short() -> None:
    opened, named = (block.text for block in blocks_of(PAGE, "python"))
    assert len(opened.strip().splitlines()) <= 20
    assert len(named.strip().splitlines()) <= 5


def test_the_snippets_train(names: dict) -> None:
    assert names["metrics"]["skipped"] == 0
    assert names["metrics"]["target_tokens"] == 4 * 63
    assert all(delta.b.any() for delta in names["deltas"].values())
    assert float(names["metrics"]["loss_nats"]) < float(names["loss"].value())


def test_the_opened_step_is_sft_step(names: dict) -> None:
    start = names["lora"].init(names["params"], seed=0)
    step = steps.sft_step(names["model"], names["lora"], names["optimizer"])
    state, metrics = step.update(names["params"], step.init(start), names["batch"])
    torch.testing.assert_close(metrics["loss_nats"], names["loss"].value())
    for ours, opened in ((state.trainable, names["deltas"]), (state.opt_state, names["opt_state"])):
        for a, b in zip(tree.leaves(ours), tree.leaves(opened), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_no_argument_of_the_opened_step_is_written(names: dict) -> None:
    params = {name: w.clone() for name, w in names["params"].items()}
    start = names["lora"].init(params, seed=0)
    before = tree.map(torch.clone, start)
    names["value_and_grad"](sft(names["model"], names["lora"]), has_aux=True)(start, params, names["batch"])
    for a, b in zip(tree.leaves((start, params)), tree.leaves((before, names["params"])), strict=True):
        assert torch.equal(a, b)
        assert a.grad is None


def test_every_step_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"`(\w+_step)`", README)) - {"train_step"}
    shared = {"eval_step", "train_step", "preference_step"}
    assert named | {"sft_step"} == {name for name in vars(steps) if name.endswith("_step")} - shared
    # every loss that a program can name has one; the losses of distillation share kd_step
    kinds = {loss.__struct_config__.tag for loss in Loss.__args__ if loss.objective != "distillation"}
    assert {f"{kind}_step" for kind in kinds - {"cross_entropy"}} <= named


def test_the_two_commands_are_those_that_other_tests_run() -> None:
    """test_tools.py compares the second with .ci/run, test_main_job.py runs the program of the first."""
    commands = [command for block in blocks_of(PAGE, "bash") for _, command in commands_of(block)]
    assert tuple(command for command in commands if command.startswith("pip")) == INSTALLS


def test_the_table_of_programs_is_complete() -> None:
    assert {f"programs/{name}.toml" for name in SHIPPED} == set(re.findall(r"`(programs/[\w/]+\.toml)`", README))
    assert "`programs/recipes/`" in README  # docs/recipes.md has a table of these


def test_every_file_and_room_that_the_readme_names_is_there() -> None:
    places = re.findall(r"`((?:[\w.]+/)+|(?:\w+/)*\w+\.py)`", README) + re.findall(r"\]\(([\w/.]+)\)", README)
    assert len(places) > 15
    for place in places:
        assert any((folder / place).exists() for folder in (ROOT, ROOT / "minitune")), place
