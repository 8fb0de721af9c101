"""`--json` on every verb, exit codes for each kind of end, and the page for coding agents."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest

from minitune.__main__ import main
from minitune.cli import command_line
from minitune.cli.help import EXIT_CODES
from minitune.cli.verbs import VERBS
from minitune.errors import DiskFullError, InputError
from minitune.programs import progress
from support.paths import ROOT
from support.programs import LORA, ONE_STEP, start

COMMANDS = ("ls", "show lora", "check lora", "plan lora", "schema", "cache", "inspect demo", "skill", "lora --help")


@pytest.mark.parametrize("command", COMMANDS)
def test_stdout_has_one_line_of_json_and_stderr_the_rest(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # a slow machine has more lines of a loop than a fast one
    monkeypatch.setattr(progress, "LINE_EVERY_S", math.inf)
    words = command.split()
    assert main(words) == 0
    plain = capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    answer = json.loads(out)
    assert answer.keys() == {"exit_code", "result"}
    assert answer["exit_code"] == 0
    assert answer["result"]
    # what a verb prints is the same but for times
    assert re.sub(r"\d+", "", err) == re.sub(r"\d+", "", plain)


def test_the_result_of_a_run_is_its_summary(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(tmp_path, tiny, LORA + ONE_STEP, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    summary = json.loads((tmp_path / "p/summary.json").read_text(encoding="utf-8"))
    assert answer["result"] == {"folder": str(tmp_path / "p"), "summary": summary}


ENDS = {
    InputError("words: x is wrong, expected y; correct it"): (2, "words: x is wrong, expected y; correct it"),
    DiskFullError("words: the disk is full, expected room; free some"): (3, "words: the disk is full"),
    PermissionError(13, "Permission denied", "mine.toml"): (2, "mine.toml: Permission denied"),
    ZeroDivisionError("division by zero"): (1, "a fault of minitune"),
}


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_every_kind_of_end_has_its_code(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(words: object) -> None:
        raise error

    code, sentence = ENDS[error]
    monkeypatch.setattr(command_line, "_run_words", fails)
    assert main(["ls", "--json"]) == code
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["exit_code"] == code
    assert sentence in answer["error"]
    assert answer["error"] == err.removesuffix("\n")
    assert str(code) in EXIT_CODES


def test_the_page_has_the_codes_that_help_has() -> None:
    page = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |".replace("--debug", "`--debug`") in page


def test_the_commands_of_the_skill_page_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["skill"]) == 0
    page = capsys.readouterr().out
    block = re.search(r"```bash\n(.*?)```", page, re.DOTALL)
    assert block is not None
    commands = [shlex.split(line)[3:] for line in block[1].splitlines()]
    trained = [words for words in commands if words[0] not in ("report", "mine.toml")]
    assert len(trained) == len(commands) - 2
    for words in trained:
        assert main(words) == 0, words
    for verb in VERBS.values():
        assert f"minitune {verb.usage}`: {verb.summary}" in page
