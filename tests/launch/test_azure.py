"""Files of launch/azureml/: their commands run here as Azure ML runs them, and submit.py says in a sentence what is missing."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.launching import LAUNCH, azure_variables, filled, read_only, recorded, run_toy, snapshot, words_of
from support.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
AZURE = LAUNCH / "azureml"
JOB, PIPELINE, ENVIRONMENT = (
    yaml.safe_load((AZURE / f"{name}.yml").read_text("utf-8")) for name in ("job", "pipeline", "environment")
)


@pytest.fixture
def job_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a job."""
    (tmp_path / "job").mkdir()
    monkeypatch.chdir(tmp_path / "job")
    return tmp_path / "job"


@pytest.fixture
def mounts(tmp_path: Path, tiny: Path) -> dict[str, Path]:
    """Input folders by their names, which nobody may write into."""
    model = {file.name: file for file in (tiny / "model").iterdir()}
    files = {"model": model, **{name: {"a.jsonl": tiny / f"orders-{name}.jsonl"} for name in ("train", "pairs", "heldout")}}
    return {name: read_only(tmp_path / "mounts" / name, each) for name, each in files.items()}


def test_a_job_leaves_its_outputs_and_metrics_where_azure_shows_them(
    job_folder: Path, mounts: dict[str, Path], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    run_id = azure_variables(tmp_path, monkeypatch)
    before = snapshot(tmp_path / "mounts")
    values = {f"inputs.{name}": str(given) for name, given in (JOB["inputs"] | mounts).items()}
    _, (call,) = recorded(["bash", "-c", filled(JOB["command"], values)], job_folder, ("python",))
    assert run_toy(words_of(call), tiny) == 0
    assert (job_folder / "outputs/sft/merged/config.json").is_file()
    assert (job_folder / "outputs/sft/deltas/adapter_config.json").is_file()
    losses = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_metric_history(run_id, "loss")
    assert [each.step for each in losses] == [1, 2, 3]
    assert snapshot(tmp_path / "mounts") == before


@pytest.mark.parametrize("code", [0, 2])
def test_a_job_keeps_its_log_and_its_exit_code(code: int, job_folder: Path) -> None:
    values = {f"inputs.{name}": "absent" for name in JOB["inputs"]}
    (job_folder / "python").write_text(f"#!/bin/bash\necho said\necho told >&2\nexit {code}\n", encoding="utf-8")
    (job_folder / "python").chmod(0o755)
    variables = os.environ | {"PATH": f"{job_folder}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-c", filled(JOB["command"], values)]
    done = subprocess.run(command, cwd=job_folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert (job_folder / "logs/minitune.txt").read_text("utf-8") == done.stdout == "said\ntold\n"


def test_the_jobs_of_the_pipeline_hand_models_on(
    job_folder: Path, mounts: dict[str, Path], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(tmp_path / "mounts")
    places = {f"parent.inputs.{name}": str(mounts[name]) for name in PIPELINE["inputs"]}
    for name, job in PIPELINE["jobs"].items():
        output = tmp_path / "outputs" / name
        output.mkdir(parents=True)
        places[f"parent.jobs.{name}.outputs.model"] = str(output)
        values = {f"inputs.{key}": filled(value, places) for key, value in job["inputs"].items()}
        values["outputs.model"] = str(output)
        command, _, copying = filled(job["command"], values).partition("&&")
        (job_folder / name).mkdir()
        monkeypatch.chdir(job_folder / name)
        words = words_of(command.split())
        words.remove("log.mlflow={}")  # the job above has it
        if name in ("sft", "dpo"):
            words.append("data.train.holdout=0.2")  # of 40 rows
        assert run_toy(words, tiny) == 0, name
        assert ("outputs" in job) is bool(copying)
        subprocess.run(["bash", "-c", copying], check=True)
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"sft", "dpo", "evaluate", "quantize"}
    quantized = json.loads((tmp_path / "outputs/quantize/config.json").read_text("utf-8"))
    assert quantized["quantization_config"]["quant_method"] == "compressed-tensors"
    assert PIPELINE["jobs"]["quantize"]["outputs"]["model"] == "${{parent.outputs.model}}"
    assert snapshot(tmp_path / "mounts") == before


def test_jobs_name_the_environment_that_is_made_here() -> None:
    assert ENVIRONMENT["name"] == "minitune"
    for job in (JOB, *PIPELINE["jobs"].values()):
        assert job["environment"] == f"azureml:{ENVIRONMENT['name']}@latest"
        assert "distribution" not in job, "training is one process"
    build = ENVIRONMENT["build"]
    assert (AZURE / build["path"]).resolve() == ROOT
    assert (AZURE / build["path"] / build["dockerfile_path"]).is_file()


def test_what_is_registered_is_what_the_job_saves() -> None:
    made = runpy.run_path(str(AZURE / "submit.py"))["MADE"]
    (saved,) = re.findall(r"paths/(.*)$", made["job.yml"])
    assert saved == "outputs/sft/merged"
    assert made["pipeline.yml"].endswith("/outputs/model")
    assert "model" in PIPELINE["outputs"]
    assert all((AZURE / name).is_file() for name in made)


def test_the_version_of_data_is_its_content(tmp_path: Path) -> None:
    content = runpy.run_path(str(AZURE / "submit.py"))["content"]
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name / "in").mkdir(parents=True)
        (tmp_path / name / "in/rows.jsonl").write_text(text, encoding="utf-8")
    a, b, c = (content(tmp_path / name) for name in "abc")
    assert a == b != c
    (tmp_path / "b/in/rows.jsonl").rename(tmp_path / "b/rows.jsonl")
    assert content(tmp_path / "b") != a


def refused(capsys: pytest.CaptureFixture, *words: str) -> str:
    """What submit.py says on stderr of a call that it refuses."""
    with pytest.raises(SystemExit) as info:
        runpy.run_path(str(AZURE / "submit.py"))["main"](words)
    assert info.value.code == 2
    return capsys.readouterr().err


def test_submit_without_its_packages_is_one_sentence(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("azure", "azure.ai", "azure.ai.ml", "azure.identity"):
        monkeypatch.setitem(sys.modules, name, None)
    message = "submit: azure-ai-ml or azure-identity is not installed, expected both; pip install 'minitune[azure]'\n"
    assert refused(capsys) == message


def test_submit_with_a_folder_that_is_absent_is_one_sentence(capsys: pytest.CaptureFixture) -> None:
    message = "submit: --input train=gone is no NAME=FOLDER, expected a folder; correct the path\n"
    assert refused(capsys, "--input", "train=gone") == message


class Workspace:
    """A client of azure-ai-ml that has nothing, and remembers what it is given."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.data = self.environments = self.compute = self.jobs = self.models = self

    def get(self, name: str, *rest: str, **options: str) -> Any:
        from azure.core.exceptions import ResourceNotFoundError

        raise ResourceNotFoundError(name)

    def create_or_update(self, entity: Any) -> Any:
        self.made.append(entity)
        if type(entity).__name__ == "Data":
            entity._id = f"azureml:{entity.name}:{entity.version}"
        return entity

    def begin_create_or_update(self, entity: Any) -> Any:
        self.made.append(entity)
        return self

    def result(self) -> Any:
        return self.made[-1]

    def stream(self, name: str) -> None:
        self.streamed = name

    def download(self, name: str, version: str, download_path: Path) -> None:
        self.downloaded = download_path


@pytest.mark.parametrize("name", ["job.yml", "pipeline.yml", "environment.yml"])
def test_the_loader_of_azure_takes_the_files(name: str) -> None:
    azure = pytest.importorskip("azure.ai.ml", reason="azure-ai-ml is not installed: pip install 'minitune[azure]'")
    if name == "environment.yml":
        assert azure.load_environment(AZURE / name).name == "minitune"
        return
    job = azure.load_job(AZURE / name)
    job._to_rest_object()
    if name == "pipeline.yml":
        assert job._validate().passed


@pytest.mark.parametrize("name", ["job.yml", "pipeline.yml"])
def test_submit_makes_what_the_workspace_has_not(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("azure.ai.ml", reason="azure-ai-ml is not installed: pip install 'minitune[azure]'")
    (tmp_path / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    submit = runpy.run_path(str(AZURE / "submit.py"))
    words = ["--job", name, "--input", f"train={tmp_path}", "--size", "STANDARD_NC24ADS_A100_V4", "--download", "here"]
    given, client = submit["parse"](words), Workspace()
    submit["submit"](client, given, submit["inputs_of"](given.input))
    cluster, environment, data, job, model = client.made
    assert (cluster.name, cluster.size, cluster.max_instances) == ("gpu", "STANDARD_NC24ADS_A100_V4", 1)
    assert (environment.name, data.name) == ("minitune", "minitune-train")
    assert job.inputs["train"].path == data.id
    assert (model.name, client.downloaded) == ("minitune", Path("here"))
    assert "registered minitune" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "rows={folder}"], r"--input rows is not in job.yml, expected one of \['model', 'train', 'epochs'\]"),
        (["--compute", "none"], "--compute none is not in the workspace, expected a cluster of it; .* give --size"),
    ],
)
def test_submit_names_what_is_wrong(words: list[str], message: str, tmp_path: Path) -> None:
    pytest.importorskip("azure.ai.ml", reason="azure-ai-ml is not installed: pip install 'minitune[azure]'")
    submit = runpy.run_path(str(AZURE / "submit.py"))
    given = submit["parse"]([word.format(folder=tmp_path) for word in words])
    with pytest.raises(submit["SubmitError"], match=message):
        submit["submit"](Workspace(), given, submit["inputs_of"](given.input))
