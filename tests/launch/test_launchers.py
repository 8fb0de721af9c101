"""Files of launch/ for clusters and clouds: each parses, and the command of minitune in it runs at toy size."""

import ast
import itertools
import re
import runpy
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitune.io import paths
from support.launching import LAUNCH, minitune_lines, recorded, run_toy, words_of
from support.paths import ROOT


@pytest.mark.parametrize("name", ["Dockerfile", "azureml/Dockerfile"])
def test_a_dockerfile_copies_what_is_there_and_runs_what_exists(name: str) -> None:
    text = (LAUNCH / name).read_text("utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert {line.split()[0] for line in lines} <= {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "CMD"}
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all((ROOT / path).exists() for path in copied), copied
    # what the package is built of, and nothing more
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert {"pyproject.toml", "README.md", "LICENSE", "minitune"} <= set(copied)
    assert set(re.findall(r'^(\w+) = "minitune/_shipped', project, re.M)) <= set(copied)
    extras = re.search(r'EXTRAS="(.*)"|\.\[([\w,]+)\]', text)
    assert extras
    for extra in (extras[1] or extras[2]).split(","):
        assert re.search(rf"^{extra} = \[", project, re.M), extra
    torch = re.search(r'pip install .*"(torch.*?)"', text)
    assert torch is None or f'"{torch[1]}"' in project
    assert "://" not in text, "an index is the user's to name"
    for line in lines:
        if line.startswith("RUN"):
            subprocess.run(["bash", "-n", "-c", line.removeprefix("RUN ")], check=True)


def test_the_command_of_the_image_is_one_of_minitune() -> None:
    (command,) = re.findall(r"^CMD (.*)$", (LAUNCH / "Dockerfile").read_text("utf-8"), re.M)
    words = ast.literal_eval(command)
    assert words[:3] == ["python", "-m", "minitune"]
    from minitune.__main__ import main

    assert main(words[3:]) == 0


@pytest.mark.parametrize("script", ["slurm.sh", "huggingface_job.sh"])
def test_a_script_is_bash(script: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


def test_a_slurm_job_runs_its_command(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    given = [str(tiny / "model"), str(tiny / "orders-train.jsonl"), f"out={tmp_path / 'runs'}"]
    code, calls = recorded(["bash", str(LAUNCH / "slurm.sh"), *given], tmp_path, ("srun", "python", "scontrol"))
    assert code == 0
    srun, python = calls
    assert srun[1:] == python
    assert run_toy(words_of(python), tiny) == 0
    assert (tmp_path / "runs/sft/merged/config.json").is_file()


@pytest.mark.parametrize(("ended", "requeued"), [(138, True), (1, False), (2, False), (143, False)])
def test_a_slurm_job_goes_back_to_the_queue_after_its_signal_alone(ended: int, requeued: bool, tmp_path: Path) -> None:
    command = ["bash", str(LAUNCH / "slurm.sh"), "model", "train.jsonl"]
    variables = {"CODE_OF_python": str(ended), **SLURM}
    code, calls = recorded(command, tmp_path, ("srun", "python", "scontrol"), variables)
    assert (["scontrol", "requeue", "7"] in calls) is requeued
    assert code == (0 if requeued else ended)


def test_a_slurm_job_asks_for_the_signal_that_minitune_knows() -> None:
    text = (LAUNCH / "slurm.sh").read_text("utf-8")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M))
    assert options["signal"] == "USR1@300"  # without B:, so that the step gets it
    assert {"requeue", "open-mode"} <= options.keys()
    assert options["ntasks-per-node"] == options["nodes"] == "1"  # training is one process


def test_a_task_of_skypilot_runs_its_command_and_continues(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, stop_at: Any
) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text("utf-8"))
    assert task["resources"]["use_spot"] is True
    (mount,) = task["file_mounts"]
    download, run = minitune_lines(task["run"])
    assert download == ["download", "$MODEL", "--to", "model"]
    assert f"out={mount}" in run
    stand_ins = {"model": tiny / "model", "train.jsonl": tiny / "orders-train.jsonl", mount: tmp_path / "bucket"}
    words = [key if not value else f"{key}={stand_ins[value]}" for key, _, value in (word.partition("=") for word in run)]
    stop_at(2)
    assert run_toy(words, tiny) == 128 + 15  # the machine is taken away
    assert run_toy(words, tiny) == 0
    assert (tmp_path / "bucket/sft/merged/config.json").is_file()
    log = (tmp_path / "bucket/sft/log.txt").read_text("utf-8")
    assert "continu" in log


def test_a_job_of_hugging_face_runs_its_commands(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["https://host/minitune", "owner/model", "owner/data", "owner/to"]
    code, (call,) = recorded(["bash", str(LAUNCH / "huggingface_job.sh"), *names], tmp_path, ("hf",))
    assert code == 0
    assert call[:3] == ["hf", "jobs", "run"]
    variables = dict(word.split("=", 1) for before, word in itertools.pairwise(call) if before == "--env")
    assert [*variables.values()] == names
    tools = ("pip", "hf", "python")
    code, calls = recorded(call[call.index("bash") :], tmp_path, tools, variables)
    assert code == 0
    pip, model, data, train, upload = calls
    assert pip[-1] == "minitune[hf,parquet] @ git+https://host/minitune"
    assert words_of(model) == ["download", "owner/model", "--to", "model"]
    assert words_of(data) == ["download", "owner/data", "--dataset", "--to", "data"]
    (tmp_path / "model").symlink_to(tiny / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_bytes((tiny / "orders-train.jsonl").read_bytes())
    assert run_toy(words_of(train), tiny) == 0
    assert upload[:3] == ["hf", "upload", "owner/to"]
    assert (tmp_path / upload[3] / "adapter_config.json").is_file()


class Modal(types.ModuleType):
    """The names of modal that the file uses; what is decorated stays as it is."""

    def __init__(self) -> None:
        super().__init__("modal")
        self.committed = 0
        self.Volume = self.Image = self
        self.App = lambda name: self

    def from_name(self, name: str, create_if_missing: bool) -> Any:
        return self

    def from_dockerfile(self, path: str, context_dir: str) -> Any:
        assert (ROOT / context_dir / path).is_file()
        return self

    def function(self, **options: Any) -> Any:
        assert "/data" in options["volumes"]
        return lambda function: function

    def local_entrypoint(self) -> Any:
        return lambda function: function

    def commit(self) -> None:
        self.committed += 1


def test_an_app_of_modal_runs_its_command(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modal = Modal()
    monkeypatch.setitem(sys.modules, "modal", modal)
    names = runpy.run_path(str(LAUNCH / "modal_app.py"))
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda words, check: calls.append(words))
    names["train"](shlex.split(names["main"].__defaults__[0]))
    assert modal.committed == 1
    (call,) = calls
    places = {"/data/model": tiny / "model", "/data/train.jsonl": tiny / "orders-train.jsonl", "/data/runs": tmp_path}
    words = [re.sub(r"(?<==)/.*", lambda found: str(places[found[0]]), word) for word in words_of(call)]
    assert run_toy(words, tiny) == 0
    assert (tmp_path / "sft/merged/config.json").is_file()


def test_a_job_of_sagemaker_runs_its_command(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = runpy.run_path(str(LAUNCH / "sagemaker.py"))["job"]("image", "role", "s3://b/f", "name")
    algorithm = job["AlgorithmSpecification"]
    assert {f"SM_CHANNEL_{each['ChannelName'].upper()}" for each in job["InputDataConfig"]} == set(job["Environment"])
    assert job["CheckpointConfig"]["LocalPath"] == "/opt/ml/checkpoints"
    assert f"out={job['CheckpointConfig']['LocalPath']}" in algorithm["ContainerArguments"]
    monkeypatch.setenv("SM_CHANNEL_MODEL", str(tiny / "model"))
    monkeypatch.setenv("SM_CHANNEL_TRAIN", str(tiny / "orders-train.jsonl"))
    words = words_of([*algorithm["ContainerEntrypoint"], *algorithm["ContainerArguments"]])
    words = [f"out={tmp_path}" if word.startswith("out=") else word for word in words]
    assert run_toy(words, tiny) == 0
    assert (tmp_path / "sft/merged/config.json").is_file()


def test_sagemaker_without_its_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    main = runpy.run_path(str(LAUNCH / "sagemaker.py"))["main"]
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(SystemExit, match="sagemaker: boto3 is not installed, expected it; pip install boto3"):
        main(["image", "role", "s3://b/f"])


def test_every_program_that_is_started_is_shipped() -> None:
    texts = "\n".join(file.read_text("utf-8") for file in LAUNCH.rglob("*") if file.suffix in (".sh", ".yml", ".yaml", ".py"))
    started = set(re.findall(r"python -m minitune (\w+)", texts)) - {"download"}
    assert started == {"sft", "preference", "eval", "quantize"}
    assert started <= set(paths.shipped())
