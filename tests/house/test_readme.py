"""README: its commands work, its snippets run and compute what they say, its pictures are those of the package."""

import io
import re
import shlex
from pathlib import Path

import pytest
import torch

from minitune import steps, tree
from minitune.__main__ import main
from minitune.algorithms.supervised import sft
from minitune.cli.verbs import VERBS
from minitune.io import paths
from minitune.losses.registry import Loss
from support.paths import ROOT
from support.programs import toy

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
INSTALLS = ("pip install -e . && python -m minitune programs/lora.toml", "pip install -e '.[test]' && pytest")


def blocks(kind: str) -> list[str]:
    return [text for name, text in BLOCKS if name == kind]


def commands() -> list[str]:
    lines = (line.partition("  #")[0].strip() for text in blocks("bash") for line in text.splitlines())
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def names() -> dict:
    """Names that the Python snippets define, run in order in one namespace."""
    torch.manual_seed(0)
    names: dict = {}
    for snippet in blocks("python"):
        exec(compile(snippet, "README.md", "exec"), names)
    return names


def test_the_snippets_are_short() -> None:
    opened, named = blocks("python")
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


def test_every_command_is_known_and_those_of_minitune_run(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands():
        if command.startswith("pip install"):  # test_tools.py compares the second with .ci/run, test_main_job.py runs the program
            assert command in INSTALLS
            continue
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "minitune"], command
        words = [word for word in words[3:] if not word.startswith(("model.path=", "data."))]
        if words[0] == "chat":
            monkeypatch.setattr("sys.stdin", io.StringIO("Two lamps to Oslo.\n"))
            words += ["--max-new-tokens", "4"]
        if words[0] == "finish":  # tests/programs/test_continued.py finishes a run that was stopped
            assert words[0] in VERBS
            continue
        if words[0] in ("lora", "sft"):
            words += toy(words[0], tiny, tmp_path)
        assert main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "mine.toml").is_file()


def test_the_table_of_programs_is_complete() -> None:
    assert {f"programs/{name}.toml" for name in paths.shipped()} == set(re.findall(r"`(programs/[\w/]+\.toml)`", README))


def test_every_file_and_room_that_the_readme_names_is_there() -> None:
    places = re.findall(r"`((?:[\w.]+/)+|(?:\w+/)*\w+\.py)`", README) + re.findall(r"\]\(([\w/.]+)\)", README)
    assert len(places) > 15
    for place in places:
        assert any((folder / place).exists() for folder in (ROOT, ROOT / "minitune")), place
