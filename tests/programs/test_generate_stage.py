"""Answers to the prompts of a file and to one prompt, and how a person sees them."""

import json
from pathlib import Path

import pytest

from minitune.__main__ import main
from minitune.programs.stages.generate import conversation_text
from support.programs import LORA, evaluation, run, start

GENERATE = '[[stage]]\nop = "generate"\nmax_new_tokens = 3\n'


def test_one_prompt_is_asked_as_the_prompt_of_a_file(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "prompts.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "Two lamps"}]}) + "\n", encoding="utf-8")
    given = (f"data.heldout.path={rows}", "data.heldout.format=chat")
    run(tmp_path, tiny, GENERATE + 'data = "heldout"\n', *given, name="file")
    asked = (tmp_path / "file/generate.jsonl").read_text(encoding="utf-8")
    capsys.readouterr()
    # the key typed takes the place of the program's data
    run(tmp_path, tiny, GENERATE + 'data = "heldout"\n', "generate.prompt=Two lamps", name="typed")
    assert (tmp_path / "typed/generate.jsonl").read_text(encoding="utf-8") == asked
    out = capsys.readouterr().out
    assert "prompt  Two lamps\nanswer  " in out
    answer = json.loads(asked)["answer"]
    assert f"answer  {answer} (cut)" in out


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ('data = "heldout"\nprompt = "x"\n', "stages: generate has both data and prompt, expected one"),
        ("", "stages: generate has neither data nor prompt, expected one"),
    ],
)
def test_generate_asks_for_data_or_a_prompt(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], keys: str, message: str
) -> None:
    assert start(tmp_path, tiny, GENERATE + keys) == 2
    assert message in capsys.readouterr().err
    assert start(tmp_path, tiny, GENERATE, "generate.prompt=x", verb=("check",)) == 0
    assert main(["plan", str(tmp_path / "p.toml"), "generate.prompt=x", "generate.batch_size=2"]) == 2  # nothing trains


def test_a_sample_shows_the_conversation_and_where_it_was_cut(tmp_path: Path, tiny: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you again")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    given = (f"data.heldout.path={tmp_path}/chats.jsonl", "data.heldout.format=chat")
    (sample,) = run(tmp_path, tiny, LORA + evaluation("after"), *given)["after"]["samples"]
    assert sample["prompt"] == "system: Be brief.\nuser: Hi\nassistant: Hello\nuser: Bye"
    assert sample["answer"].endswith(" (cut)")


def test_one_message_is_shown_as_it_is() -> None:
    assert conversation_text([{"role": "user", "content": "Hi"}]) == "Hi"
