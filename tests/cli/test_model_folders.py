"""Folders that people point at: a run, an adapter and a model each open, or say what to point at."""

import json
from pathlib import Path

import pytest

from minitune.__main__ import main
from minitune.cli.model_folders import ModelFolder, open_model_folder, result_of
from minitune.errors import InputError

pytestmark = pytest.mark.fast


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder without results, and the base of its adapter beside it."""
    monkeypatch.chdir(tmp_path)
    for file in ("runs/x/manifest.json", "runs/x/program.toml", "base/config.json"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("{}", encoding="utf-8")
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
    with pytest.raises(InputError, match=r"chat: runs/x is a run that has saved no model yet, expected one with a save"):
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
    assert main(["inspect", "runs/x"]) == 2  # its weights are missing
    lines = capsys.readouterr().out.splitlines()
    assert "runs/x/merged" in lines[0]
    assert any(line.endswith(f"{'A' * 40}, {'B' * 40}") for line in lines)
    assert all(line == line.rstrip() for line in lines)
