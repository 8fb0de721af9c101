"""Every shipped program runs at toy size; a killed run continues bit for bit; what a user gets wrong is said before it starts."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from transformers import AutoModelForCausalLM

from minitune import checkpoint, models
from minitune.__main__ import main
from minitune.interop.peft.load import load_adapter
from minitune.programs import program
from minitune.programs.check import check
from minitune.programs.loading import ModelSource
from minitune.programs.run import summary
from minitune.programs.stages import evaluate, export, generate, save, train
from minitune.programs.stages.quantize import Quantize
from support.forked import Program
from support.models import random_params
from support.programs import SHIPPED, TINY, rows_without_time, toy, wait_for_step, weights

HARNESS_METRICS = {"orders_choice": ["acc"], "orders_json": ["exact_match"]}


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_shipped_program_runs_at_toy_size(name: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = toy(name, tiny, tmp_path)
    assert main(["check", str(SHIPPED[name]), *words]) == 0
    assert main([str(SHIPPED[name]), *words]) == 0
    loaded = program.load(SHIPPED[name], words)
    folder = tmp_path / loaded.name
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    output = capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trains = [stage for stage in loaded.stage if isinstance(stage, train.Train)]
    steps = dict.fromkeys((row["stage"], row["step"]) for row in rows)  # an adapter of a sweep has rows of its own
    assert list(steps) == [(stage.label, n) for stage in trains for n in (1, 2, 3)]
    if trains:
        assert summary["steps"] == 3
        assert summary["tokens_per_s"] > 0
        assert summary["peak_mem_bytes"] > 2**20
        assert {"loss", "lr", "tokens_per_second", "grad_norm"} <= set(rows[0])
    for stage in loaded.stage:
        record = summary.get(stage.label)
        if isinstance(stage, evaluate.Eval):
            assert 0.0 <= record["exact_match"] <= 1.0
            assert 0.0 <= record["token_accuracy"] <= 1.0
            assert record["loss_nats"] > 0
            assert record["model_bytes"] > 2**10
            assert len(record["samples"]) == 3
            assert f"{record['loss_nats']:.4f}" in output
        if isinstance(stage, evaluate.Harness):
            assert all(task["n_samples"] == 5 for task in record["tasks"].values())
            assert {name: list(task["metrics"]) for name, task in record["tasks"].items()} == HARNESS_METRICS
        if isinstance(stage, train.Train) and stage.sweep:
            losses = [adapter["best_heldout_nats"] for adapter in record["adapters"]]
            best = losses.index(min(losses))
            assert (record["best_adapter"], record["best_heldout_nats"]) == (best, losses[best])
            assert f"adapter {best} goes on (optimizer.lr = {stage.sweep['optimizer.lr'][best]})" in output.replace("\n", "")
        if isinstance(stage, Quantize):
            assert 2**10 < record["bytes_after"] < record["bytes_before"]
        if isinstance(stage, (save.Save, export.Export, generate.Generate)):
            assert Path(record["path"]).exists()
            assert f"{record['what']} in {record['path']}" in output.replace("\n", "")
        if isinstance(stage, save.Save):
            assert list(Path(record["path"]).glob("*.safetensors"))


def test_without_lm_eval_check_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["check", "harness"]) == 2
    assert "lm_eval is not installed, this needs the extra eval: pip install 'minitune[eval]'" in capsys.readouterr().err


def test_what_a_lora_run_saves_are_the_same_weights_three_times(tiny: Path, tmp_path: Path) -> None:
    assert main(["lora", *toy("lora", tiny, tmp_path), "train.optimizer.lr=0.05"]) == 0
    folder = tmp_path / "lora"
    model = models.open(tiny / "model")
    base = checkpoint.load_params(tiny / "model", model.shapes())
    rule, deltas, _ = load_adapter(folder / "deltas", names=base)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    tokens = torch.randint(0, 1024, (2, 13), generator=torch.Generator().manual_seed(0))
    adapted = model.forward(rule.apply(base, deltas), tokens)
    with torch.no_grad():
        wanted = merged(tokens).logits
    torch.testing.assert_close(adapted, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert float((model.forward(base, tokens) - wanted).abs().max()) > 1e-2 * float(wanted.abs().max())
    state = checkpoint.load_tensors(checkpoint.list_states(folder / "checkpoints/train")[-1] / "state.safetensors")
    assert all(torch.equal(delta.a, state[f"trainable.{name}.a"]) for name, delta in deltas.items())
    assert (folder / "merged/tokenizer.model").read_bytes() == (tiny / "model/tokenizer.model").read_bytes()
    # the adapter goes back onto the base through [model] deltas
    words = [f"model.deltas={folder / 'deltas'}", "name=again", "train.steps=1", "resume=false"]
    text = SHIPPED["lora"].read_text(encoding="utf-8")
    second = tmp_path / "again.toml"
    second.write_text(text[: text.index('[[stage]]\nop      = "lora"')], encoding="utf-8")
    assert main([str(second), *[w for w in toy("lora", tiny, tmp_path) if not w.startswith(("train", "after"))], *words[:2]]) == 0
    before = json.loads((tmp_path / "again/summary.json").read_text(encoding="utf-8"))["before"]
    after = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["after"]
    assert before["loss_nats"] == pytest.approx(after["loss_nats"], rel=1e-6)


def test_a_full_run_saves_every_weight_it_trained(tiny: Path, tmp_path: Path) -> None:
    assert main(["full", *toy("full", tiny, tmp_path), 'full.weights=["*norm.weight"]']) == 0
    model = models.open(tmp_path / "full/params")
    new = checkpoint.load_params(tmp_path / "full/params", model.shapes())
    old = checkpoint.load_params(tiny / "model", model.shapes())
    assert [name for name in new if not torch.equal(new[name], old[name])] == [n for n in new if n.endswith("norm.weight")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_follows_the_run_on_the_cpu(tiny: Path, tmp_path: Path) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        words = [*toy("lora", tiny, tmp_path, steps=10), f"model.device={device}", "model.dtype=float32", f"name={device}"]
        assert main(["lora", *words]) == 0
        losses[device] = [row["loss"] for row in rows_without_time(tmp_path / device)]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "kills"), [("lora", (5, 16, 38)), ("full", (16,)), ("qlora", (11,))], ids=["lora", "full", "qlora"]
)
def test_a_run_killed_at_any_moment_continues_bit_for_bit(name: str, kills: tuple[int, ...], tiny: Path, tmp_path: Path) -> None:
    """SIGKILL at different steps, before a state was saved and after, then to the end: every weight, moment and logged row equals
    the straight run's.
    """
    steps = kills[-1] + 22
    words = [*toy(name, tiny, tmp_path, steps=steps), "train.save_every=7"]
    straight = Program([name, *words, "name=straight"])
    _, err = straight.communicate()
    assert straight.returncode == 0, err
    for step in kills:
        process = Program([name, *words, "name=killed"])
        wait_for_step(tmp_path / "killed", step, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = Program([name, *words, "name=killed"])
    out, err = last.communicate()
    assert last.returncode == 0, err
    assert "is unfinished: continuing it" in out
    assert "continuing from step" in out
    killed, wanted = weights(tmp_path / "killed"), weights(tmp_path / "straight")
    assert set(killed) == set(wanted)
    assert all(torch.equal(killed[key], wanted[key]) for key in wanted)
    assert rows_without_time(tmp_path / "killed") == rows_without_time(tmp_path / "straight")
    summaries = [json.loads((tmp_path / one / "summary.json").read_text(encoding="utf-8")) for one in ("killed", "straight")]
    assert summaries[0]["after"] | {"time_s": 0} == summaries[1]["after"] | {"time_s": 0}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_signal_saves_and_the_same_command_continues(number: int, code: int, tiny: Path, tmp_path: Path) -> None:
    words = [*toy("lora", tiny, tmp_path, steps=2000), "train.save_every=5000"]
    process = Program(["lora", *words])
    wait_for_step(tmp_path / "lora", 4, process)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == code, errors
    assert "run the same command to continue" in errors
    assert "Traceback" not in errors
    (saved,) = checkpoint.list_states(tmp_path / "lora/checkpoints/train")
    step = json.loads((saved / "state.json").read_text(encoding="utf-8"))["step"]
    assert 4 <= step < 2000
    process = Program(["lora", *words])
    wait_for_step(tmp_path / "lora", step + 1, process)
    process.kill()
    out, _ = process.communicate()
    assert f"continuing from step {step} of 2000" in out


def test_a_second_trainer_on_the_same_folder_is_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = toy("lora", tiny, tmp_path, steps=2000)
    process = Program(["lora", *words])
    wait_for_step(tmp_path / "lora", 2, process)
    assert main(["lora", *words]) == 2
    assert f"is in use by pid {process.pid} on {os.uname().nodename}" in capsys.readouterr().err
    process.kill()
    process.communicate()


def test_a_damaged_state_stops_the_run_and_says_what_to_do(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = toy("lora", tiny, tmp_path, steps=2000)
    process = Program(["lora", *words])
    wait_for_step(tmp_path / "lora", 7, process)
    process.kill()
    process.communicate()
    newest = checkpoint.list_states(tmp_path / "lora/checkpoints/train")[-1]
    (newest / "state.safetensors").write_bytes(b"torn")
    assert main(["lora", *words]) == 2
    assert "does not match its sha256; remove" in capsys.readouterr().err
    shutil.rmtree(newest)
    assert main(["lora", *words, "train.steps=3"]) == 0  # another program: the folder is moved aside, and nothing is lost
    assert checkpoint.list_states(tmp_path / "lora.1/checkpoints/train")


WRONG = {
    "missing model": (["model.path=nowhere"], r"nowhere.*does not exist"),
    "missing data": (["data.train.path=nowhere.jsonl"], "nowhere.jsonl"),
    "data by another name": (["train.data=trian"], "asks for data 'trian', expected .* did you mean 'train'?"),
    "glob": (['lora.targets=["*.attn.*"]'], r"'\*\.attn\.\*' matches no weight"),
    "typo": (["train.optimizer.lrr=1e-4"], "lrr"),
    "two sources": (["model.config=configs/models/demo.toml"], "exactly one of path .* and config"),
    "an option of a template that asks for none": (
        ["model.chat_template_kwargs.enable_thinking=false"],
        r"\[model\] chat_template_kwargs has 'enable_thinking', expected what .* asks for: nothing",
    ),
    "an option of a table": (
        ["data.train.chat_template_kwargs={ date = 1 }"],
        r"chat_template_kwargs has 'date', expected what .* asks for: nothing",
    ),
    "no such device": (
        ["model.device=mps" if torch.cuda.is_available() else "model.device=cuda"],
        "torch finds .*, expected 'auto'",
    ),
    "zero steps": (["train.steps=0"], "steps"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_user_gets_wrong_is_said_before_anything_starts(
    name: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    overrides, message = WRONG[name]
    for verb in (["check"], []):
        assert main([*verb, "lora", *toy("lora", tiny, tmp_path), *overrides]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert re.search(message, error), error
    assert not (tmp_path / "lora").exists()


def test_a_bad_line_is_found_before_the_first_stage(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = (tiny / "orders-train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "bad.jsonl").write_text("\n".join([*rows[:5], '{"instruction": "a"}', *rows[5:]]), encoding="utf-8")
    assert main(["lora", *toy("lora", tiny, tmp_path), f"data.train.path={tmp_path / 'bad.jsonl'}"]) == 2
    shown = capsys.readouterr()
    assert 'bad.jsonl:6 has no "output" (only instruction), expected a string' in shown.err
    assert "before" not in shown.out


def test_a_tokenizer_of_another_model_is_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "small.toml").write_text(
        (tiny / "shape.toml").read_text(encoding="utf-8").replace("1024", "1000"), encoding="utf-8"
    )
    words = [w for w in toy("demo/pretrain", tiny, tmp_path) if not w.startswith("model.config")]
    assert main(["demo/pretrain", *words, f"model.config={tmp_path / 'small.toml'}"]) == 2
    assert "has 1024 tokens, more than the model's 1000" in capsys.readouterr().err


def test_stages_that_do_not_fit_together_are_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = SHIPPED["lora"].read_text(encoding="utf-8")
    lora_table = text[text.index('[[stage]]\nop      = "lora"') : text.index('[[stage]]\nop         = "train"')]
    (tmp_path / "nothing.toml").write_text(text.replace(lora_table, ""), encoding="utf-8")
    (tmp_path / "twice.toml").write_text(
        text.replace(lora_table, lora_table + lora_table.replace("op ", 'name = "second"\nop ')), encoding="utf-8"
    )
    (tmp_path / "params.toml").write_text(text.replace('what = "merged"', 'what = "params"'), encoding="utf-8")
    words = toy("lora", tiny, tmp_path)
    for name, message in (
        ("nothing", "finds nothing to train, expected lora or full before it"),
        ("twice", "finds deltas on the model already"),
        ("params", "is to save 'params', but the model holds deltas"),
    ):
        kept = [w for w in words if name != "nothing" or not w.startswith("lora.")]
        assert main([str(tmp_path / f"{name}.toml"), *kept, f"name={name}"]) == 2
        assert message in capsys.readouterr().err


def test_a_model_with_nan_is_refused_each_time_and_leaves_no_state(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(tiny / "model", tmp_path / "broken")
    model = models.open(tiny / "model")
    params = checkpoint.load_params(tiny / "model", model.shapes())
    bad = {**params, "model.norm.weight": params["model.norm.weight"] * torch.nan}
    checkpoint.save_folder(tmp_path / "broken", bad, model, checkpoint.FolderExtras(tiny / "model", [], source=tiny / "model"))
    words = [*toy("lora", tiny, tmp_path, steps=100), f"model.path={tmp_path / 'broken'}"]
    for _ in range(2):
        assert main(["lora", *words]) == 2
        assert "before: model.norm.weight holds NaN, expected finite numbers" in capsys.readouterr().err
        assert checkpoint.list_states(tmp_path / "lora/checkpoints/train") == []  # nothing was learned


def test_a_program_is_checked_before_a_weight_is_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> NoReturn:
        raise AssertionError("a weight is read, expected its header alone")

    monkeypatch.setattr("minitune.programs.sharding.load_base", read)
    loaded = program.load(SHIPPED["lora"], toy("lora", tiny, tiny / "unused"))
    lines = check(ModelSource(path=str(tiny / "model")), loaded.data, loaded.stage).lines
    n_params = sum(w.numel() for w in random_params(TINY).values())
    assert lines[0].startswith(f"model: {n_params:,} parameters, vocabulary 1,024")
    assert summary({"train": {"top": {"steps": 3}, "x": 1}, "after": {"y": 2}}) == {
        "train": {"x": 1},
        "after": {"y": 2},
        "steps": 3,
    }
