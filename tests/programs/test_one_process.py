"""A launcher of several processes is refused: each would train the whole job."""

from pathlib import Path

import pytest

from minitune.__main__ import main
from minitune.errors import InputError
from minitune.programs.one_process import WORLD_SIZES, require_one_process

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_several_processes_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(InputError, match=f"minitune: {name} is 2, .* expected one process; start it without torchrun"):
        require_one_process()


@pytest.mark.parametrize("size", ["1", "", "many"])
def test_a_world_of_one_is_none(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WORLD_SIZES:
        monkeypatch.setenv(name, size)
    require_one_process()


@pytest.mark.parametrize("words", [["check", "lora"], ["lora"]], ids=" ".join)
def test_a_run_and_check_refuse_before_a_folder_is_made(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main(words) == 2
    assert "WORLD_SIZE is 8, which torchrun or accelerate sets, expected one process" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
