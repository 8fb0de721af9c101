"""Files that start minitune elsewhere: their commands, taken out and run here at toy size."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from minitune.__main__ import main
from minitune.cli.verbs import program_file
from minitune.programs import program
from support.paths import ROOT
from support.programs import small_stages

LAUNCH = ROOT / "launch"
# Stands for a program on the PATH: adds its words to a file, and ends with a code that the test sets.
RECORDER = """#!{python}
import json, os, sys
with open(os.environ["RECORDED"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
name = os.path.basename(sys.argv[0])
if name == "srun":
    os.execvp(sys.argv[1], sys.argv[1:])
sys.exit(int(os.environ.get("CODE_OF_" + name, "0")))
"""


def recorded(
    command: list[str], folder: Path, names: tuple[str, ...], variables: Mapping[str, str] | None = None
) -> tuple[int, list[list[str]]]:
    """Exit code of a command, and the calls that it made of the programs with these names, none of which is run."""
    shims = folder / "shims"
    shims.mkdir(exist_ok=True)
    for name in names:
        (shims / name).write_text(RECORDER.format(python=sys.executable), encoding="utf-8")
        (shims / name).chmod(0o755)
    calls = folder / "calls.jsonl"
    calls.unlink(missing_ok=True)
    surroundings = {"PATH": f"{shims}{os.pathsep}{os.environ['PATH']}", "RECORDED": str(calls), **(variables or {})}
    done = subprocess.run(command, cwd=folder, env=os.environ | surroundings, check=False)
    lines = calls.read_text("utf-8").splitlines() if calls.exists() else []
    return done.returncode, [json.loads(line) for line in lines]


def words_of(call: list[str]) -> list[str]:
    """Words that a recorded call gives to minitune."""
    assert call[:3] == ["python", "-m", "minitune"], call
    return call[3:]


def run_toy(words: list[str], tiny: Path) -> int:
    """Exit code of minitune with these words, in this process, with the stages of its program made small."""
    changes = [word for word in words[1:] if "=" in word]
    small = small_stages(program.load(program_file(words[0]), changes), tiny)
    keys = {word.partition("=")[0] for word in small}
    kept = [word for word in words if word.partition("=")[0].replace(".epochs", ".steps") not in keys]
    return main([*kept, *small])


def filled(text: str, values: Mapping[str, str]) -> str:
    """Command of Azure ML with ${{...}} replaced; KeyError for an input that the job does not declare."""
    return re.sub(r"\$\{\{([\w.]+)\}\}", lambda found: values[found[1]], text)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Files below a folder by their paths: root can write where modes forbid it, so that a test compares."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def read_only(folder: Path, files: Mapping[str, Path]) -> Path:
    """A folder with copies of files, into which nobody can write, as a mounted input is."""
    folder.mkdir(parents=True)
    for name, source in files.items():
        (folder / name).write_bytes(source.read_bytes())
        (folder / name).chmod(0o444)
    folder.chmod(0o555)
    return folder


def minitune_lines(script: str) -> list[list[str]]:
    """Words of the lines of a shell script that run minitune, in their order."""
    lines = [line for line in script.splitlines() if line.startswith("python -m minitune")]
    return [shlex.split(line)[3:] for line in lines]


def azure_variables(folder: Path, patch: pytest.MonkeyPatch) -> str:
    """Set what Azure ML sets in a job, with a local file as its MLflow server; returns the id of the job's run."""
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{folder}/azure.db"
    client = MlflowClient(uri)
    run = client.create_run(client.create_experiment("azure", artifact_location=(folder / "artifacts").as_uri()))
    values = {
        "AZUREML_RUN_ID": run.info.run_id,
        "AZUREML_ROOT_RUN_ID": run.info.run_id,
        "AZUREML_EXPERIMENT_ID": run.info.experiment_id,
        "AZUREML_ARM_SUBSCRIPTION": "0",
        "AZUREML_ARM_RESOURCEGROUP": "group",
        "AZUREML_ARM_WORKSPACE_NAME": "workspace",
        "AZUREML_ARM_PROJECT_NAME": "minitune",
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_RUN_ID": run.info.run_id,
        "MLFLOW_EXPERIMENT_NAME": "azure",
    }
    for name, value in values.items():
        patch.setenv(name, value)
    return run.info.run_id
