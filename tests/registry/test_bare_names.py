"""Bare names of models in MLflow's registry, NAME and NAME:VERSION, where a folder may stand."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minitune.__main__ import main
from minitune.errors import InputError
from minitune.io.paths import locate
from minitune.programs import program
from minitune.programs.loading import ModelSource
from minitune.programs.model_paths import MODELS
from minitune.programs.program import Program
from minitune.programs.stages.stage import Stage
from minitune.registry import mlflow_models
from minitune.registry.mlflow_models import MlflowModels
from minitune.registry.names import spelled_out
from minitune.registry.opened import bring
from support.hub_server import contents
from support.programs import LORA, evaluation, run, start

# of mlflow and of what it uses
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("folder"),
]
BOTH = '[[stage]]\nop = "save"\nwhat = "deltas"\nname = "deltas"\n[[stage]]\nop = "save"\nwhat = "merged"\n'
NAMES = ("orders", "orders:1", "orders:latest", "orders:best")


def model_files(place: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(place).items() if not name.startswith(".")}


def test_programs_and_verbs_open_a_bare_name(
    folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run whose model lies beside an adapter, two graphs and a GGUF file."""
    run(folder, tiny, LORA + BOTH, name="made")
    for name, graph in (("onnx", "model.onnx"), ("executorch", "model.pte")):  # as exports leave them
        (folder / "made" / name).mkdir()
        shutil.copyfile("made/merged/config.json", f"made/{name}/config.json")
        (folder / "made" / name / graph).write_bytes(b"a graph")
    (folder / "made/model.gguf").write_bytes(b"GGUF")
    assert main(["register", "made", "orders", "--alias", "best"]) == 0
    assert main(["register", "made/onnx", "graph"]) == 0
    assert model_files(bring("mlflow:orders", print).folder) == model_files(folder / "made/merged")
    assert main(["register", "made/deltas", "orders-lora"]) == 0
    capsys.readouterr()
    for name in NAMES:
        assert start(folder, tiny, evaluation("after"), f"model.path={name}", name="q", verb=("check",)) == 0
        assert f"model: mlflow:{name} is mlflow:orders:1, in " in capsys.readouterr().out
    words = ["model.path=orders:best", f"model.tokenizer={tiny}/model", "model.deltas=orders-lora"]
    after = run(folder, tiny, evaluation("after"), *words, name="q")
    direct = run(folder, tiny, evaluation("after"), "model.path=made/merged", "model.deltas=made/deltas", name="r")
    assert after["after"]["loss_nats"] == direct["after"]["loss_nats"]
    assert 'path = "mlflow:orders:best"' in (folder / "q/program.toml").read_text("utf-8")
    capsys.readouterr()

    verbs = [
        ["inspect", "orders:best"],
        ["inspect", "made"],
        ["chat", "made", "--max-new-tokens", "1"],
        ["upload", "made", "me/orders", "--print-card"],
        ["upload", "made/onnx", "me/orders", "--print-card"],
        ["upload", "made/executorch", "me/orders", "--print-card"],
        ["verify", "orders", "--against", "orders:1", "--max-new-tokens", "2"],
        ["merge", "orders-lora", "--base", "orders:1", "--to", "new"],
        ["register", "orders:1", "other"],
        ["upload", "orders", "me/orders", "--print-card"],
        ["show", "lora", "orders:1"],
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    for verb in verbs:
        assert main(verb) == 0, (verb, capsys.readouterr())
    said = capsys.readouterr()
    assert "orders-lora:1 is in" in said.err
    for line in ("library_name: onnx", "library_name: executorch", 'TextLLMRunner(folder + "/model.pte"', "InferenceSession("):
        assert line in said.out
    assert "opened by transformers" in said.out
    # whose figures are not written among the files of the version
    assert not list(locate("mlflow:orders:1").glob("verify.json"))
    # what lies here comes first, and a name that is written whole stays as it is
    shutil.copytree(tiny / "model", "orders")
    assert spelled_out("orders") == "orders"
    assert spelled_out("orders:1") == "mlflow:orders:1"
    assert spelled_out("mlflow:orders") == "mlflow:orders"
    # as does the folder that a stage of the program writes
    shutil.rmtree("orders")
    stages = '[[stage]]\nop = "save"\nwhat = "params"\npath = "orders"\n[[stage]]\nop = "load"\nmodel = { path = "orders" }\n'
    start(folder, tiny, stages, name="s", verb=("check",))
    assert program.load(folder / "s.toml").stage[1].model.path == "orders"
    variable = stages.replace('path = "orders"\n', "").replace('"orders"', '"${NAME}:1"')
    (folder / "s.toml").write_text((folder / "s.toml").read_text("utf-8").replace(stages, variable), encoding="utf-8")
    written = program.read(folder / "s.toml", variables={"NAME": "orders"})
    assert written.program.stage[1].model.path == "mlflow:orders:1"
    assert 'path = "mlflow:${NAME}:1"' in written.text


def test_every_key_that_holds_a_model_is_looked_at() -> None:
    fields = {
        field
        for struct in (Program, *Stage.__args__)
        for field, kind in struct.__annotations__.items()
        if ModelSource in (kind, *getattr(kind, "__args__", ()))
    }
    assert fields == set(MODELS)


MISSPELT = """
import sys
from pathlib import Path
from minitune.__main__ import main

codes = [main(["check", "lora", "model.path=oders"]), main(["chat", "oders:3"]), main(["eval", "oders"])]
assert codes == [2, 2, 2], codes
assert "mlflow" not in sys.modules
"""


@pytest.mark.parametrize("has_registry", [False, True])
def test_a_misspelt_folder_is_told_as_ever(has_registry: bool, folder: Path) -> None:
    if not has_registry:
        shutil.rmtree("runs")
    done = subprocess.run([sys.executable, "-c", MISSPELT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check, chat, evaluate = done.stderr.splitlines()
    assert check.startswith("models: oders/config.json does not exist, expected a Hugging Face folder")
    assert chat.startswith("models: oders:3/config.json does not exist, expected a Hugging Face folder")
    assert evaluate.startswith("program: 'oders' on the command line, expected KEY=VALUE")
    assert evaluate.endswith("no folder oders is here")
    assert Path("runs").exists() == has_registry


def test_a_server_is_asked_for_a_bare_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/absent.db")
    assert spelled_out("orders") == "orders"
    assert not (folder / "absent.db").exists()
    (folder / "absent.db").write_bytes(b"no database")
    assert spelled_out("orders") == "orders"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    # a folder may be meant, and a version of a model only
    assert spelled_out("orders") == "orders"
    assert spelled_out("orders:3") == "mlflow:orders:3"
    monkeypatch.setattr(mlflow_models, "MlflowModels", lambda: MlflowModels.__new__(MlflowModels))
    monkeypatch.setattr(MlflowModels, "versions", lambda _, name: ["1"] if name == "orders" else [])
    assert (spelled_out("orders"), spelled_out("oders"), spelled_out("oders:3")) == ("mlflow:orders", "oders", "oders:3")


def test_what_was_fetched_opens_without_its_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")

    def dead(self: MlflowModels) -> None:
        raise InputError("registry: the MLflow server can't be reached")

    monkeypatch.setattr(MlflowModels, "__init__", dead)
    monkeypatch.setattr("minitune.registry.names.locate", lambda text: folder if ":" in text else locate(text))
    assert spelled_out("orders") == "mlflow:orders"
