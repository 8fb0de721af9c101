"""Trackers that every run may have: the same values in each, read back by each one's own reader."""

import io
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from minitune.__main__ import main
from minitune.errors import InputError
from minitune.programs.log import Log, LogConfig
from minitune.trackers import background
from minitune.trackers.background import Trackers
from minitune.trackers.mlflow import MlflowConfig
from minitune.trackers.tensorboard import TensorboardConfig
from minitune.trackers.tracker import Artifact, Histogram, Kept, StepValues
from minitune.trackers.trackio import TrackioConfig
from support.programs import small_program

PROGRAM = {"name": "tiny", "seed": 3, "model": {"path": "demo"}, "stage": [{"op": "lora", "rank": 8}]}
RECORD = {"loss_nats": 0.25, "tasks": {"t": {"acc": 0.5}}, "samples": [{"prompt": "p", "reference": "r", "answer": "a"}]}


def run_folder(folder: Path) -> Path:
    run = folder / "runs/tiny"
    run.mkdir(parents=True, exist_ok=True)
    (run / "program.toml").write_text('name = "tiny"\n', encoding="utf-8")
    return run


def logged(folder: Path, config: LogConfig, steps: range) -> str:
    """What the terminal said of a run with these steps, of which `folder` is the run folder."""
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    with Log(folder, config, PROGRAM, console) as out:
        out.begin("train")
        out.rewind(steps.start - 1)
        for step in steps:
            out.metrics(step, {"loss": 1.0 / step, "lr": 3e-4})
        out.histograms(steps.start, {"gradients/w": Histogram([1.0, 3.0], [0.0, 0.5, 1.0])})
        out.begin("after")
        out.record("after", RECORD)
        out.summarize({"after": RECORD})
    return console.file.getvalue()  # type: ignore[union-attr]


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_server")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_mlflow_has_every_step_once_and_the_files(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    folder = run_folder(tmp_path)
    assert logged(folder, LogConfig(mlflow=MlflowConfig(tags={"team": "x"})), range(1, 5)) == ""
    # killed after step 4, the last saved state was step 2
    assert logged(folder, LogConfig(mlflow=MlflowConfig()), range(3, 7)) == ""
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = [each for each in client.search_experiments() if each.name == "minitune"]
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, 1.0 / step) for step in range(1, 7)]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["after/tasks/t/acc"] == 0.5
    assert (run.data.params["seed"], run.data.params["model.path"]) == ("3", "demo")
    assert json.loads(run.data.params["stage"]) == PROGRAM["stage"]
    assert run.data.tags["team"] == "x"
    assert run.info.run_id == (folder / "mlflow-id").read_text("utf-8")
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"program.toml", "samples", "summary.json"}


@pytest.mark.usefixtures("no_server")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_run_that_a_job_has_begun_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/other.db"
    client = MlflowClient(uri)
    run = client.create_run(client.create_experiment("job", artifact_location=tmp_path.as_uri()))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    logged(run_folder(tmp_path), LogConfig(mlflow=MlflowConfig()), range(1, 3))
    assert client.get_run(run.info.run_id).data.metrics["loss"] == 0.5
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(InputError, match=r"log: mlflow says: .*0000.*, expected a run to begin; correct"):
        logged(run_folder(tmp_path), LogConfig(mlflow=MlflowConfig()), range(1, 3))


def test_tensorboard_has_every_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run_folder(tmp_path)
    logged(folder, LogConfig(tensorboard=TensorboardConfig()), range(1, 5))
    logged(folder, LogConfig(tensorboard=TensorboardConfig()), range(3, 7))
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    scalars = {event.step: event.value for event in events.Scalars("loss")}
    assert scalars == {step: pytest.approx(1.0 / step, rel=1e-6) for step in range(1, 7)}
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 7))
    assert events.Scalars("after/loss_nats")[-1].value == 0.25
    assert {"program/text_summary", "after/sample 1/text_summary"} <= set(events.Tags()["tensors"])
    assert sum(events.Histograms("gradients/w")[-1].histogram_value.bucket) == 4.0


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_trackio_has_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trackio
    from trackio import sqlite_storage, utils

    for module in (trackio, sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    folder = run_folder(tmp_path)
    logged(folder, LogConfig(trackio=TrackioConfig(project="p")), range(1, 5))
    logged(folder, LogConfig(trackio=TrackioConfig(project="p")), range(3, 7))
    logs = sqlite_storage.SQLiteStorage.get_logs("p", "tiny")
    assert [row["step"] for row in logs if "loss" in row] == list(range(1, 7))
    assert [row["loss"] for row in logs if "loss" in row] == [1.0 / step for step in range(1, 7)]


class Slow:
    """A tracker whose server answers when it is told to, and keeps what it got."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.rows: list[StepValues] = []
        self.calls: list[str] = []

    @property
    def artifacts(self) -> tuple[Kept, ...]:
        return ("deltas",)

    def check(self) -> None:
        pass

    def start(self, folder: Path, program: Mapping[str, Any]) -> "Slow":
        return self

    def log(self, rows: Sequence[StepValues]) -> None:
        assert self.answers.wait(30)
        self.rows += rows

    def record(self, step: int, label: str, record: Mapping[str, Any]) -> None:
        self.calls.append(f"record {step} {label}")

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        self.calls.append(f"histograms {step}")

    def artifact(self, artifact: Artifact) -> None:
        self.calls.append(f"artifact {artifact.name}")

    def summarize(self, content: Mapping[str, Any]) -> None:
        self.calls.append("summarize")

    def finish(self, *, failed: bool) -> None:
        self.calls.append(f"finish {failed}")


class Broken(Slow):
    """A tracker whose connection is gone."""

    def log(self, rows: Sequence[StepValues]) -> None:
        raise BrokenPipeError("the service is gone.")


def test_no_step_waits_for_a_tracker_and_nothing_is_lost(tmp_path: Path) -> None:
    slow, said = Slow(), []
    trackers = Trackers({"slow": slow}, tmp_path, {}, said.append)
    for step in range(1, 1001):
        trackers.log(step, {"loss": 1.0 / step})  # would hang here if it waited
    trackers.record(1000, "after", {})
    trackers.artifact("deltas", Artifact("a", tmp_path, {}, is_best=False))
    trackers.artifact("merged", Artifact("b", tmp_path, {}, is_best=False))
    assert not slow.rows
    slow.answers.set()
    trackers.finish(failed=False)
    assert [row.step for row in slow.rows] == list(range(1, 1001))
    assert slow.calls == ["record 1000 after", "artifact a", "finish False"]
    assert said == []


def test_a_tracker_that_breaks_is_dropped_with_one_line(tmp_path: Path) -> None:
    said: list[str] = []
    other = Slow()
    other.answers.set()
    trackers = Trackers({"broken": Broken(), "other": other}, tmp_path, {}, said.append)
    trackers.log(1, {"loss": 1.0})
    trackers._fed["broken"]._thread.join(30)
    for step in range(2, 5):
        trackers.log(step, {"loss": 1.0})
    trackers.finish(failed=True)
    assert said == ["broken takes no more rows (the service is gone); training goes on, metrics.jsonl has them"]
    assert [row.step for row in other.rows] == [1, 2, 3, 4]
    assert other.calls == ["finish True"]


def test_a_server_that_never_answers_does_not_hold_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "FINISH_S", 0.1)
    slow, said = Slow(), []
    trackers = Trackers({"slow": slow}, tmp_path, {}, said.append)
    trackers.log(1, {"loss": 1.0})
    trackers.finish(failed=False)
    assert said == ["slow did not finish (it has not taken everything after 0 s); metrics.jsonl has every row"]
    slow.answers.set()


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = __import__("sys").modules
    for name in ("mlflow", "mlflow.tracking", "torch.utils.tensorboard", "trackio", "wandb"):
        monkeypatch.setitem(modules, name, None)


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("name", ["mlflow", "tensorboard", "trackio"])
def test_a_package_that_is_missing_is_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.toml").write_text(f"{small_program()}[log]\n{name} = {{}}\n", encoding="utf-8")
    assert main(["check", "t.toml"]) == 2
    said = f"log: the package {name} is not installed, expected it for [log] {name}; pip install 'minitune[{name}]'\n"
    assert capsys.readouterr().err == said


def test_a_server_of_mlflow_that_is_not_there_is_found_by_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitune.trackers.mlflow.unreachable", lambda address: "no such host")
    with pytest.raises(InputError, match=r"log: the MLflow server http://m can't be reached \(no such host\)"):
        MlflowConfig(tracking_uri="http://m").check()
