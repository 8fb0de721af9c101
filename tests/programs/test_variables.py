"""Variables of a program in what leaves the machine: trackers, cards, pages and registries have them as they were written."""

import json
import tomllib
from pathlib import Path

import pytest

from minitune.__main__ import main
from minitune.programs import program
from minitune.programs.variables import hidden
from support.programs import LORA, ONE_STEP, evaluation, run, start

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
# as long as a key of W&B, and in no other text
SECRET = "5ec7e75ec7e75ec7e75ec7e75ec7e75ec7e75ec7"
WORDS = ("model.path=${MODELS}/model", "data.train.path=${TRAIN_DIR}/orders-train.jsonl")
MODEL, DATA = 'path = "${MODELS}/model"', 'path = "${TRAIN_DIR}/orders-train.jsonl"'
SAVE = '[[stage]]\nop = "save"\nwhat = "merged"\n'
LOG = """
[log]
wandb = { project = "p", settings = { api_key = "${SECRET}" } }
mlflow = { tracking_uri = "sqlite:///${MLFLOW_DIR}/${SECRET}.db" }
tensorboard = {}
"""


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of the program, and trackers that send nothing."""
    variables = {"SECRET": SECRET, "MODELS": str(tiny), "TRAIN_DIR": str(tiny), "MLFLOW_DIR": str(tmp_path)}
    variables |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    variables |= {name: str(tmp_path / "w") for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR")}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "w").mkdir()
    monkeypatch.chdir(tmp_path)


def files_with(text: str, folder: Path) -> list[str]:
    """Files below a folder whose bytes hold a text."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [str(path.relative_to(folder)) for path in files if text.encode() in path.read_bytes()]


def test_no_file_that_leaves_the_machine_has_a_secret(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, tiny, LORA + ONE_STEP + evaluation("after") + SAVE + LOG, *WORDS)
    written = (tmp_path / "p/program.toml").read_text(encoding="utf-8")
    for text in (MODEL, DATA, 'api_key = "${SECRET}"', 'tracking_uri = "sqlite:///${MLFLOW_DIR}/${SECRET}.db"'):
        assert text in written
    # the run's folder, with the page, W&B's and TensorBoard's files; MLflow's artifacts; and its parameters
    assert (tmp_path / "p/report.html").is_file()
    assert (tmp_path / f"{SECRET}.db").is_file()
    assert files_with(SECRET, tmp_path) == []
    assert len(files_with("${SECRET}", tmp_path)) >= 5

    # a path that a variable holds stays out of cards and pages too
    capsys.readouterr()
    assert main(["upload", str(tmp_path / "p"), "somebody/orders", "--print-card"]) == 0
    card = capsys.readouterr().out
    assert "made from `${MODELS}/model`" in card or "fine-tuned from `${MODELS}/model`" in card
    assert "${TRAIN_DIR}/orders-train.jsonl" in card
    page = (tmp_path / "p/report.html").read_text(encoding="utf-8")
    for text in (card, page):
        assert f"{tiny}/model" not in text
        assert f"{tiny}/orders-train.jsonl" not in text
        assert "${MODELS}/model" in text


def test_a_run_goes_on_where_its_variables_are_not_set(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = LORA + ONE_STEP + SAVE + '[log]\ntensorboard = { dir = "tb/${SECRET}" }\n'
    run(tmp_path, tiny, stages, *WORDS)
    manifest = json.loads((tmp_path / "p/manifest.json").read_text(encoding="utf-8"))
    assert manifest["variables"] == {"MODELS": str(tiny), "TRAIN_DIR": str(tiny)}
    capsys.readouterr()
    # another token is no other run, and another folder is one
    monkeypatch.setenv("SECRET", "another")
    assert start(tmp_path, tiny, stages, *WORDS) == 0
    assert "is finished: nothing is left to run" in capsys.readouterr().out
    text = f"{tiny}/orders-train.jsonl"
    assert start(tmp_path, tiny, stages, f"model.path={tiny}/model", f"data.train.path={text}") == 0
    assert "is finished: nothing is left to run" in capsys.readouterr().out
    (tmp_path / "moved").symlink_to(tiny)
    monkeypatch.setenv("TRAIN_DIR", str(tmp_path / "moved"))
    assert start(tmp_path, tiny, stages, *WORDS) == 0
    assert "another program (" in capsys.readouterr().out

    # the verbs on a run need none of them
    for name in ("MODELS", "TRAIN_DIR", "SECRET"):
        monkeypatch.delenv(name)
    assert main(["inspect", str(tmp_path / "p.1/checkpoints/train/step-00000001")]) == 0
    assert f"{tiny}/model" in capsys.readouterr().out
    (tmp_path / "p.1/summary.json").unlink()
    assert main(["finish", str(tmp_path / "p.1")]) == 2
    assert "log.tensorboard.dir holds ${SECRET}, expected SECRET to be set; export it" in capsys.readouterr().err


def test_show_and_the_saved_program_have_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUN", "r1")
    overrides = ["model.path=${MODELS}/model", "name=${RUN}", "lora.targets=['${RUN}', '$${RUN}']", "log.mlflow.name=${RUN}"]
    assert main(["show", "lora", *overrides]) == 0
    shown = capsys.readouterr().out
    table = tomllib.loads(shown)
    # a name is what folders and pages are called
    assert (table["name"], table["log"]["mlflow"]["name"]) == ("r1", "r1")
    assert table["model"]["path"] == "${MODELS}/model"
    (lora,) = [stage for stage in table["stage"] if stage["op"] == "lora"]
    assert lora["targets"] == ["${RUN}", "$${RUN}"]
    (tmp_path / "shown.toml").write_text(shown, encoding="utf-8")
    asked = program.read(tmp_path / "shown.toml")
    assert asked.program == program.load(tmp_path / "shown.toml")
    assert asked.program.stage[1].targets == ("r1", "${RUN}")
    # what has changed since stands as it is now
    changed = asked._replace(program=type(asked.program)(**{**_fields(asked.program), "out": "elsewhere"}))
    assert tomllib.loads(changed.text)["out"] == "elsewhere"
    assert tomllib.loads(changed.text)["model"]["path"] == "${MODELS}/model"


def _fields(loaded: program.Program) -> dict:
    return {name: getattr(loaded, name) for name in loaded.__struct_fields__}


def test_values_in_running_text_are_hidden_the_longest_first() -> None:
    variables = {"A": "/data/of/mine", "B": "b", "C": "/data/of/mine/orders"}
    written = {"x": ["${A}/orders/$${A}", "${B}", "${C}", "${UNKNOWN}/y", "plain text"], "y": {"z": "${A}"}}
    texts = ["/data/of/mine/orders/${A} b", "data: /data/of/mine/orders", "at /data/of/mine", "plain text"]
    assert hidden(texts, written, variables) == ["${A}/orders/$${A} b", "data: ${C}", "at ${A}", "plain text"]
