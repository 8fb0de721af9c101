"""Folders that people point at: a run, an adapter and a model each open, or say what to point at."""

import io
import json
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from minitune import checkpoint, models, tree
from minitune.__main__ import main
from minitune.algorithms.objective import apply_trainable as lora_apply
from minitune.cli.model_folders import ModelFolder, open_model_folder, result_of, with_model
from minitune.data.source import Split
from minitune.errors import InputError
from minitune.interop.peft.layout import Base
from minitune.programs import program
from minitune.programs.state_deltas import open_deltas
from minitune.programs.trained_state import TrainedState
from support.programs import LORA, SHIPPED, TRAIN, evaluation, start


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder without results, and the base of its adapter beside it."""
    monkeypatch.chdir(tmp_path)
    for file in ("runs/x/manifest.json", "runs/x/program.toml", "base/config.json"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("{}", encoding="utf-8")
    Path("runs/x/program.toml").write_text('stage = []\n[model]\npath = "base"\n', encoding="utf-8")
    return Path("runs/x")


def add(folder: Path, name: str, content: dict | None = None) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content or {}), encoding="utf-8")


def adapter(folder: Path, base: str) -> None:
    add(folder, "adapter_config.json", {"base_model_name_or_path": base})


def test_a_run_stands_for_the_model_that_it_saved(run: Path) -> None:
    adapter(run / "deltas", "base")
    assert result_of("runs/x", "inspect") == "runs/x/deltas"
    add(run / "merged", "config.json")
    assert result_of("runs/x", "inspect") == "runs/x/merged"
    assert open_model_folder("runs/x", None, "chat") == ModelFolder("runs/x/merged", None, "runs/x/merged")


def test_a_graph_beside_a_model_stands_for_nothing_that_is_opened(run: Path) -> None:
    add(run / "onnx", "config.json")
    add(run / "onnx", "model.onnx")
    for verb in ("verify", "register", "upload"):
        assert result_of("runs/x", verb) == "runs/x/onnx"
    with pytest.raises(InputError, match="chat: runs/x is a run that has saved no model yet"):
        result_of("runs/x", "chat")
    add(run / "executorch", "config.json")
    add(run / "executorch", "model.pte")
    with pytest.raises(InputError, match=r"verify: runs/x is a run that saved runs/x/executorch, runs/x/onnx, expected one"):
        result_of("runs/x", "verify")
    adapter(run / "deltas", "base")
    assert result_of("runs/x", "chat") == result_of("runs/x", "verify") == "runs/x/deltas"
    add(run / "merged", "config.json")
    assert result_of("runs/x", "chat") == result_of("runs/x", "register") == "runs/x/merged"


def test_an_adapter_opens_on_its_base(run: Path) -> None:
    adapter(run / "deltas", "base")
    wanted = ModelFolder("base", "runs/x/deltas", "runs/x/deltas on base")
    assert open_model_folder("runs/x/deltas", None, "chat") == wanted
    assert open_model_folder("runs/x", None, "chat") == wanted


@pytest.mark.usefixtures("run")
def test_a_model_opens_as_it_is() -> None:
    assert open_model_folder("base", "a", "chat") == ModelFolder("base", "a", None)
    assert open_model_folder("base", None, "chat") == ModelFolder("base", None, None)
    assert open_model_folder("demo", None, "chat") == ModelFolder("demo", None, None)


def test_what_can_not_be_opened_says_what_to_point_at(run: Path) -> None:
    with pytest.raises(InputError, match=r"chat: runs/x is a run that has saved no model yet, expected a training state or"):
        open_model_folder("runs/x", None, "chat")
    adapter(run / "deltas", "owner/elsewhere")
    message = r"adapter on owner/elsewhere, no folder here, expected its base; write chat BASE_FOLDER --deltas"
    with pytest.raises(InputError, match=message):
        open_model_folder("runs/x", None, "chat")
    for name in ("one", "two"):
        add(run / name, "config.json")
    with pytest.raises(InputError, match=r"runs/x is a run that saved runs/x/one, runs/x/two, expected one; name it"):
        result_of("runs/x", "inspect")


def test_inspect_takes_a_run_and_writes_whole_lines_into_a_pipe(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    add(run / "merged", "config.json", {"model_type": "llama", "architectures": ["A" * 40, "B" * 40]})
    losses = {"train": ["nan", 1.75, 1.25, 1.5], "more": [1.125, "inf"], "none": []}
    rows = [{"stage": s, "step": 10 * n, "heldout_loss": x} for s, all in losses.items() for n, x in enumerate(all, start=1)]
    rows.append({"stage": "none", "step": 3, "loss": 0.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["inspect", "runs/x"]) == 2  # its weights are missing
    lines = capsys.readouterr().out.splitlines()
    assert "runs/x/merged" in lines[0]
    assert any(line.endswith(f"{'A' * 40}, {'B' * 40}") for line in lines)
    assert all(line == line.rstrip() for line in lines)
    (best,) = [line for line in lines if line.startswith("best held-out")]
    assert best.endswith(" 1.2500 nats at step 30 of train, 1.1250 nats at step 10 of more")


def test_a_training_state_opens_as_deltas_everywhere(
    tmp_path: Path,
    tiny: Path,
    stop_at: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    lora = LORA + 'dora = true\ntrain = ["*norm.weight"]\n'
    stages = evaluation("before") + lora + TRAIN + '[[stage]]\nop = "save"\nwhat = "deltas"\n'
    stop_at(3)
    assert start(tmp_path / "runs", tiny, stages, name="x") == 128 + signal.SIGTERM
    run, state = "runs/x", "runs/x/checkpoints/train/step-00000003"
    model, params = models.load(str(tiny / "model"))

    # the same deltas as the adapter that the run saves when it is finished there
    shutil.copytree(run, "runs/y")
    assert main(["finish", "runs/y"]) == 0
    wanted = open_deltas(Path("runs/y/deltas"), params)
    for word in (run, state):
        rule, trainable, base = open_deltas(Path(word), params)
        assert base == Base(str(tiny / "model"))
        assert trainable.keys() == wanted[1].keys()
        a, b = (dict(tree.items(t)) for t in (trainable, wanted[1]))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[path], b[path]) for path in a)
        tokens = torch.tensor([[3, 5, 7, 11]])
        logits = model.forward(lora_apply(params, trainable, rule), tokens)
        torch.testing.assert_close(logits, model.forward(lora_apply(params, *wanted[1::-1]), tokens), rtol=0, atol=0)
    assert open_deltas(Path("runs/y"), params)[1].keys() == wanted[1].keys()  # the adapter that it saved

    # the verbs
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("Two lamps\n"))
    assert main(["chat", run, "--max-new-tokens", "3"]) == 0
    assert "opening runs/x, train at step 3 on" in capsys.readouterr().err
    assert main(["inspect", run]) == 0
    out = capsys.readouterr().out
    assert "step        3 of 4" in out
    assert "trains      deltas of rank 2, alpha 4.0" in out
    measured = ["data.heldout.path=" + str(tiny / "orders-heldout.jsonl"), "eval.limit=1", "eval.max_new_tokens=2"]
    losses = []
    for n, word in enumerate((run, "runs/y/deltas", "runs/y")):
        assert main(["eval", word, f"name=e{n}", *measured]) == 0
        losses.append(json.loads(Path(f"runs/e{n}/summary.json").read_text("utf-8"))["eval"]["loss_nats"])
    assert losses[0] == losses[1] == losses[2]
    assert main(["merge", run, "--dtype", "float32"]) == 0
    assert main(["merge", "runs/y/deltas", "--to", "m"]) == 0
    weights = checkpoint.load_tensors(Path("runs/merge-x/merged/model.safetensors"))
    merged = models.load("m")[0].forward(models.load("m")[1], torch.tensor([[3, 5, 7]]))
    assert {x.dtype for x in weights.values()} == {torch.float32}
    assert main(["eval", "m", "name=e3", *measured]) == 0
    assert merged.isfinite().all()
    loss = json.loads(Path("runs/e3/summary.json").read_text("utf-8"))["eval"]["loss_nats"]
    assert loss == pytest.approx(losses[0], rel=1e-3)


def test_eval_and_generate_of_a_run_take_its_held_out_rows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = '{ path = "tickets.csv", format = "chat", split = { fraction = 0.25, part = "heldout" } }'
    stages = '[[stage]]\nop = "train"\nevaluate = { data = "apart" }\n[[stage]]\nop = "eval"\ndata = "train"\n'
    text = f'{stages}[model]\npath = "base"\n[data]\ntrain = {{ path = "tickets.csv" }}\napart = {rows}\n'
    (run / "program.toml").write_text(text, encoding="utf-8")
    add(run / "merged", "config.json")
    for word in ("runs/x", "runs/x/merged"):
        for name, table in (("eval", "heldout"), ("generate", "prompts")):
            words = ["model.path=runs/x/merged", f"data.{table}={rows}"]
            assert with_model([word, "seed=3"], name) == [*words, "seed=3"]
            said = capsys.readouterr().err
            assert said.startswith(f"data.{table} is data.apart of ")
            assert said.endswith("runs/x/program.toml\n")
            source = program.load(SHIPPED[name], words).data[table]
            assert (source.path, source.split) == ("tickets.csv", Split(0.25, "heldout"))
            own = f"data.{table}.path=others.csv"
            assert with_model([word, own], name) == ["model.path=runs/x/merged", own]
    asked = "generate.prompt=How?"
    assert with_model(["runs/x", asked], "generate") == ["model.path=runs/x/merged", asked]
    assert with_model(["runs/x"], "quantize") == ["model.path=runs/x/merged"]
    assert with_model(["base"], "eval") == ["model.path=base"]


def test_words_that_run_a_program_stand_before_it(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for n, verb in enumerate(("run", "train")):
        assert start(tmp_path, tiny, LORA + TRAIN, verb=(verb,), name=f"p{n}") == 0
    assert main(["train", "lora.rank=3"]) == 2


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["merge", "runs/y"], "merge: runs/y does not exist, expected an adapter, a run or a training state; correct the path"),
        (["inspect", "runs/y"], "inspect: runs/y does not exist, expected a model, an adapter or a run folder; correct the path"),
        (
            ["finish", "runs/y"],
            "finish: runs/y does not exist, expected the folder of a run, such as runs/lora; correct",
        ),
        (["finish", "runs/x/program.toml"], "finish: runs/x/program.toml is a file, expected the folder of a run"),
        (["show", "runs/x"], "minitune: runs/x is a run, expected a program; write runs/x/program.toml"),
        (["runs/x"], "minitune: runs/x is a run, expected a program; write runs/x/program.toml"),
        (["eval", "runs/y"], "expected KEY=VALUE such as seed=1 or train.steps=100; no folder runs/y is here"),
    ],
)
def test_a_typo_or_a_folder_of_another_kind_is_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_what_holds_no_deltas_is_not_merged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "base"]) == 2
    assert "merge: base holds no deltas, expected an adapter, a run or a training state" in capsys.readouterr().err
    assert main(["merge", "runs/x"]) == 2
    assert "saved no model yet" in capsys.readouterr().err
    add(run / "merged", "config.json")
    assert main(["merge", "runs/x"]) == 2
    assert "merge: runs/x has saved a whole model, runs/x/merged, expected" in capsys.readouterr().err


def test_weights_that_train_whole_open_too(
    tmp_path: Path, tiny: Path, stop_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stages = '[[stage]]\nop = "full"\n' + TRAIN + '[[stage]]\nop = "save"\nwhat = "params"\ndtype = "float32"\n'
    stop_at(2)
    assert start(tmp_path, tiny, stages) == 128 + signal.SIGTERM
    _, params = models.load(str(tiny / "model"))
    rule, trainable, _ = open_deltas(Path("p"), params)
    assert rule is None
    assert main(["finish", "p"]) == 0
    assert_same(trainable, models.load("p/params")[1])


def assert_same(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name].float(), b[name].float()) for name in a)


@pytest.mark.parametrize(
    ("stages", "model", "message"),
    [
        ([{"op": "lora"}, {"op": "merge"}, {"op": "lora", "name": "b"}], {"path": "m"}, "trains weights that stage merge made"),
        ([{"op": "full"}], {"config": "c"}, r"trains weights that \[model\] config made"),
    ],
)
def test_deltas_on_weights_that_no_folder_holds_are_refused(stages: list[dict], model: dict, message: str) -> None:
    state = TrainedState(Path("r/checkpoints/train/step-00000003"), Path("r"), {"op": "train"}, tuple(stages), model)
    with pytest.raises(InputError, match=f"train of r {message}, expected .*; end it with `minitune finish r`"):
        _ = state.base


def test_many_adapters_are_no_deltas_yet() -> None:
    stage = {"op": "train", "sweep": {"seed": [1, 2]}}
    state = TrainedState(Path("r/checkpoints/train/step-00000003"), Path("r"), stage, ({"op": "lora"},), {"path": "m"})
    with pytest.raises(InputError, match="train of r trains many adapters at once, expected one; end it"):
        _ = state.base
