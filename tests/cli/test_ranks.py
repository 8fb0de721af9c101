"""Option --ranks, and what the ranks of a launcher do of a command."""

import pytest

from minitune.__main__ import main
from minitune.cli.ranks import ranks_asked
from minitune.errors import InputError

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["lora", "seed=1"], (1, ["lora", "seed=1"])),
        (["lora", "--ranks", "2", "seed=1"], (2, ["lora", "seed=1"])),
        (["--ranks=3", "lora"], (3, ["lora"])),
        (["finish", "runs/lora", "--ranks", "2"], (2, ["finish", "runs/lora"])),
        (["lora", "--ranks", "1"], (1, ["lora"])),
    ],
)
def test_ranks_may_stand_anywhere(words: list[str], asked: tuple[int, list[str]]):
    assert ranks_asked(words) == asked


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["lora", "--ranks"],
            r"minitune: --ranks '', expected one number of processes on this machine from 1 to 1024, as",
        ),
        (["lora", "--ranks", "two"], r"--ranks 'two', expected one number"),
        (["lora", "--ranks=0"], r"--ranks '0', expected one number"),
        (["lora", "--ranks", "2", "--ranks", "3"], r"--ranks '2', '3', expected one number"),
        (["check", "lora", "--ranks", "2"], r"--ranks with check, expected a program to run; leave it out"),
        (["--ranks", "2"], r"--ranks without a program"),
    ],
)
def test_what_is_no_number_of_processes_is_refused(words: list[str], message: str):
    with pytest.raises(InputError, match=message):
        ranks_asked(words)


def test_ranks_within_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["lora", "--ranks", "2"]) == 2
    assert "--ranks within a launcher that has started 2 processes, expected one of the two" in capsys.readouterr().err


def test_a_verb_is_the_first_ranks_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert [main(words) for words in (["ls"], ["check", "lora"], ["lora", "--help"])] == [0, 0, 0]
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert main(["ls"]) == 0
    assert "lora" in capsys.readouterr().out
