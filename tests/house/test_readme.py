"""What the README says is true: its commands work, its snippet runs, its picture is the house."""

import io
import re
import shlex
from pathlib import Path

import pytest

from minitune.__main__ import main
from minitune.io import paths
from support.house import FLOORS
from support.paths import ROOT
from support.programs import toy

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)


def commands() -> list[str]:
    return [
        line.partition("  #")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line.strip()
    ]


def test_the_python_snippet_runs() -> None:
    (snippet,) = (text for kind, text in BLOCKS if kind == "python")
    assert len(snippet.strip().splitlines()) <= 16
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["metrics"]["skipped"] == 0
    assert names["metrics"]["target_tokens"] == 4 * 63
    assert all(delta.b.any() for delta in names["deltas"].values())


def test_every_command_is_known_and_those_of_minitune_run(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands():
        if command.startswith("pip install"):  # .ci/run is held to the second by test_tools.py, and test_demo.py runs the program
            assert command in ("pip install -e . && python -m minitune programs/lora.toml", "pip install -e '.[test]' && pytest")
            continue
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "minitune"], command
        words = [word for word in words[3:] if not word.startswith(("model.path=", "data."))]
        if words[0] == "chat":
            monkeypatch.setattr("sys.stdin", io.StringIO("Two lamps to Oslo.\n"))
            words += ["--max-new-tokens", "4"]
        if words[0] == "lora":
            words += toy("lora", tiny, tmp_path)
        assert main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "mine.toml").is_file()


def test_the_table_of_programs_and_the_picture_of_the_house_are_complete() -> None:
    assert {f"programs/{name}.toml" for name in paths.shipped()} == set(re.findall(r"`(programs/[\w/]+\.toml)`", README))
    (house,) = (text for kind, text in BLOCKS if not kind)
    drawn: dict[str, str] = {}
    for line in house.splitlines():
        floor = line.split()[0] if line[0].isdigit() else list(drawn)[-1]
        drawn = {**drawn, floor: drawn.get(floor, "") + line}
    for floor, modules in FLOORS.items():
        for module in modules.split():
            if floor == int(floor) and floor < 9 and "/" not in module and not module.startswith("__init__"):
                assert re.search(rf"\b{re.escape(module)}\b", drawn[str(int(floor))]), f"{module} is missing on floor {floor:g}"
