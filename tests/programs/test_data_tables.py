"""What a data table leaves open is found when its program is loaded: the format from the columns, and the held-out rows."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minitune.__main__ import main
from minitune.data.readers import read_rows
from minitune.data.source import Source, Split
from minitune.errors import InputError
from minitune.programs import program
from support.paths import ROOT
from support.programs import SHIPPED

ASKED, ANSWER = "Two plus two?", "Four."
TURNS = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWER}]
SHARED = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWER}]
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"id": 1, "messages": TURNS}, "chat"),
    "conversations": ({"conversations": SHARED}, "chat"),
    "prompt and completion": ({"prompt": ASKED, "completion": ANSWER}, "chat"),
    "instruction": ({"instruction": ASKED, "input": "", "output": ANSWER, "text": "both"}, "instruct"),
    "response": ({"instruction": ASKED, "response": ANSWER}, "instruct"),
    "prompt and response": ({"prompt": ASKED, "response": ANSWER}, "instruct"),
    "question and answer": ({"question": ASKED, "answer": ANSWER, "level": 3}, "instruct"),
    "query": ({"query": ASKED, "response": ANSWER}, "instruct"),
    "problem": ({"problem": ASKED, "solution": ANSWER, "answer": "4"}, "instruct"),
    "input and output": ({"input": ASKED, "output": ANSWER}, "instruct"),
    "text": ({"text": f"{ASKED} {ANSWER}", "meta": {}}, "text"),
    "pairs": ({"prompt": ASKED, "chosen": ANSWER, "rejected": "Five."}, "pairs"),
    "pairs of conversations": ({"chosen": TURNS, "rejected": TURNS[:1] + TURNS[1:]}, "pairs"),
    "pairs of a tutorial": ({"chosen_conversations": TURNS, "rejected_conversations": TURNS}, "pairs"),
    "label": ({"prompt": ASKED, "completion": ANSWER, "label": True}, "unpaired"),
}


def written(folder: Path, rows: list[dict[str, Any]], name: str = "own.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ROWS)
def test_a_format_is_found_from_the_columns_and_reads_the_same_text(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    row, expected = ROWS[name]
    path = written(tmp_path, [row])
    words = [f"data.train.path={path}", f"data.heldout.path={path}"]
    source = program.load(SHIPPED["sft"], words).data["train"]
    assert (source.format, source.split) == (expected, None)
    if expected in ("instruct", "chat", "text"):
        assert main(["show-sample", str(SHIPPED["sft"]), *words]) == 0
        shown = capsys.readouterr().out.replace("⟦", "").replace("⟧", "")
        assert ASKED in shown
        assert ANSWER in shown


def test_the_case_of_column_names_is_ignored(tmp_path: Path) -> None:
    rows = {
        "alpaca": (
            {"Instruction": ASKED, "Input": "", "output": ANSWER},
            "instruct",
            {"instruction": "Instruction", "input": "Input"},
        ),
        "questions": ({"Question": ASKED, "answer": ANSWER}, "instruct", {"instruction": "Question", "output": "answer"}),
        "pairs": ({"Prompt": "", "chosen": "", "Rejected": ""}, "pairs", {"prompt": "Prompt", "rejected": "Rejected"}),
        "texts": ({"TEXT": ASKED}, "text", {"text": "TEXT"}),
        "both": ({"TEXT": "", "text": ASKED}, "text", {}),
    }
    for name, (row, format, columns) in rows.items():
        path = written(tmp_path, [row], f"{name}.jsonl")
        source = program.load(SHIPPED["sft"], [f"data.train.path={path}"]).data["train"]
        assert (source.format, source.columns) == (format, columns)


@pytest.mark.parametrize(
    ("word", "form"),
    [
        ("model=qwen", "model is a table, expected a key of it; write model.path=qwen"),
        ("data=a.csv", "data is a table, expected a key of it; write data.train.path=a.csv"),
        ("--model=qwen", "options have no dashes: model.path=qwen"),
        ("--data", "options have no dashes: data.train.path=VALUE"),
        ("lora.targets=all-linear", """write 'lora.targets=["*_proj.weight"]'"""),
        ("lora.targets=q_proj,v_proj", """write 'lora.targets=["*.q_proj.weight", "*.v_proj.weight"]'"""),
        ("lora.targets=*_proj.weight", """write 'lora.targets=["*_proj.weight"]'"""),
    ],
)
def test_words_of_other_tools_are_answered_with_what_to_type(word: str, form: str) -> None:
    with pytest.raises(InputError, match=re.escape(form)):
        program.load(SHIPPED["sft"], [word])


def test_pairs_given_to_sft_name_the_program_for_them_and_the_table_that_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = written(tmp_path, [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(60)])
    assert main(["check", str(SHIPPED["sft"]), f"data.train.path={path}"]) == 2
    shown = capsys.readouterr().err
    assert "stage before asks for data 'train', which has format 'pairs'" in shown
    assert "the program preference trains on preferences; for such rows under other names write data.train.format" in shown


def test_columns_that_are_named_come_first(tmp_path: Path) -> None:
    path = written(tmp_path, [{"question": ASKED, "answer": "no", "gold": ANSWER}])
    words = [f"data.train.path={path}", "data.train.columns.output=gold"]
    source = program.load(SHIPPED["sft"], words).data["train"]
    assert source.columns == {"instruction": "question", "output": "gold"}


def test_columns_without_a_format_are_named_with_what_was_expected(tmp_path: Path) -> None:
    path = written(tmp_path, [{"q": ASKED, "a": ANSWER}])
    found = r"data.train.format is 'auto', but the first row of .*own\.jsonl has the columns q, a"
    write = r"""write data.train.format=instruct 'data.train.columns=\{ instruction = "q", output = "a" \}'$"""
    match = rf"{found}, expected names that are known .* {write}"
    with pytest.raises(InputError, match=match):
        program.load(SHIPPED["sft"], [f"data.train.path={path}"])
    path.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"own\.jsonl"):
        program.load(SHIPPED["sft"], [f"data.train.path={path}"])
    with pytest.raises(InputError, match=r"missing\.jsonl is no file, expected a jsonl"):
        program.load(SHIPPED["sft"], ["data.train.path=missing.jsonl"])


def test_held_out_rows_are_a_table_and_every_row_is_on_one_side(tmp_path: Path) -> None:
    rows = [{"question": f"{i} plus {i}?", "answer": f"{2 * i}."} for i in range(300)]
    path = written(tmp_path, rows)
    data = program.load(SHIPPED["sft"], [f"data.train.path={path}", "data.train.holdout=0.2"]).data
    sides: dict[str, set[str]] = {}
    for name in ("train", "heldout"):
        split = data[name].split
        assert split is not None
        sides[name] = {row["question"] for _, row in read_rows(path) if split.takes(row)}
    assert sides["train"] | sides["heldout"] == {row["question"] for row in rows}
    assert not sides["train"] & sides["heldout"]
    assert 30 <= len(sides["heldout"]) <= 90  # 60 expected, five standard deviations of 7
    # what a run writes down is decoded to the same program
    loaded = program.load(SHIPPED["sft"], [f"data.train.path={path}"])
    (tmp_path / "resolved.toml").write_text(program.resolved(loaded), encoding="utf-8")
    assert program.load(tmp_path / "resolved.toml") == loaded


def test_a_file_of_ones_own_takes_the_place_of_held_out_rows(tmp_path: Path) -> None:
    train = written(tmp_path, [{"question": ASKED, "answer": ANSWER}])
    heldout = written(tmp_path, [{"text": ANSWER}], "heldout.jsonl")
    words = [f"data.train.path={train}", f"data.heldout.path={heldout}", "data.train.seq_len=77"]
    data = program.load(SHIPPED["sft"], words).data
    assert (data["train"].format, data["train"].split) == ("instruct", None)
    assert (data["heldout"].format, data["heldout"].split, data["heldout"].seq_len) == ("text", None, 77)


@pytest.mark.parametrize("name", ["sft", "sweep", "lora"])
def test_of_a_holdout_and_a_held_out_path_the_one_of_the_command_line_holds(name: str, tmp_path: Path) -> None:
    """sft.toml has a holdout, the others a [data.heldout] with the demo's path."""
    path = written(tmp_path, [{"question": ASKED, "answer": ANSWER}])
    words = [f"data.train.path={path}", "data.train.format=auto"]
    data = program.load(SHIPPED[name], [*words, "data.train.holdout=0.3", "data.heldout.packed=false"]).data
    train, heldout = data["train"], data["heldout"]
    assert (train.split, heldout.split) == (Split(0.3, "train"), Split(0.3, "heldout"))
    assert (heldout.path, heldout.format, heldout.columns) == (str(path), "instruct", train.columns)
    assert (heldout.seq_len, heldout.packed) == (train.seq_len, False)
    both = [*words, "data.train.holdout=0.3", f"data.heldout.path={path}"]
    with pytest.raises(InputError, match=r"line: data.train.holdout beside data.heldout.path, expected one of them"):
        program.load(SHIPPED[name], both)


def test_a_file_with_both_a_holdout_and_a_held_out_path_is_refused(tmp_path: Path) -> None:
    text = SHIPPED["sweep"].read_text(encoding="utf-8").replace("packed  = true", "holdout = 0.1")
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"mine\.toml:\d+: data.train.holdout beside data.heldout.path, expected one of them"):
        program.load(tmp_path / "mine.toml")


def test_rows_that_are_trained_and_measured_are_refused_by_check(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"question": f"{i}?", "answer": f"{i}."} for i in range(60)]
    path, copy = written(tmp_path, rows), written(tmp_path, rows, "copy.jsonl")
    words = ["check", str(SHIPPED["sft"]), f"data.train.path={path}"]
    for heldout in (f'"{path}"', f'["{copy}", "{path}"]'):
        assert main([*words, f"data.heldout.path={heldout}"]) == 2
        shown = capsys.readouterr().err
        assert f"check: data.train and data.heldout both read {path}, so that what is measured was trained on" in shown
        assert "write data.train.holdout=0.05 in place of data.heldout.path" in shown
    mix = f'data.heldout.mix=[{{path = "{path}", share = 0.5}}]'
    assert main([*words, f"data.heldout.path={copy}", mix]) == 2
    assert main([*words, f"data.heldout.path={copy}"]) == 0
    assert main([*words, "data.train.holdout=0.2"]) == 0
    # measuring the training rows under their own name is what a program says it does
    assert main([*words, "before.data=train", "after.data=train"]) == 0


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["data.train.holdout=3"], "data.train.holdout is 3, expected a share between 0 and 1; 0 keeps no rows apart"),
        (["data.heldout=3"], "data.heldout is 3, expected table"),
        (["data.heldout.holdout=0.1"], "data.heldout.holdout is one too many, expected it in one table"),
        (['data.train.split={fraction=0.1,part="train"}'], "data.train has both holdout and split, expected one of them"),
        (["data.train.path=3"], "data.train.path"),
    ],
)
def test_what_can_not_be_held_out_is_said(words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        program.load(SHIPPED["sft"], words)


def test_check_says_how_the_rows_are_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = written(tmp_path, [{"question": f"{i}?", "answer": f"{i}."} for i in range(60)])
    assert main(["check", str(SHIPPED["sft"]), f"data.train.path={path}", "data.train.holdout=0.25"]) == 0
    shown = capsys.readouterr().out.replace("\n", "")
    assert f"train is 0.75 of {path} (instruct: instruction = question, output = answer)" in shown
    assert f"heldout is 0.25 of {path} (instruct: instruction = question, output = answer)" in shown


def test_a_source_made_in_python_has_a_format() -> None:
    with pytest.raises(InputError, match="keys of a program, which are decided when it is loaded"):
        Source("a.jsonl", "auto", 8)
    with pytest.raises(InputError, match="keys of a program, which are decided when it is loaded"):
        Source("a.jsonl", "text", 8, holdout=0.1)


def test_a_program_for_ones_own_model_needs_a_folder_and_a_file_alone() -> None:
    for name in ("sft", "preference"):
        text = (ROOT / f"programs/{name}.toml").read_text(encoding="utf-8")
        first = text.splitlines()[0]
        assert first.endswith(f"python -m minitune {name} model.path=FOLDER data.train.path=FILE")


def test_preferences_on_questions_and_answers_name_the_columns_of_a_pair(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = written(tmp_path, [{"question": f"{i}?", "answer": f"{i}."} for i in range(60)])
    assert main(["check", str(SHIPPED["preference"]), f"data.train.path={path}"]) == 2
    expected = "which has format 'instruct', expected pairs (prompt, chosen and rejected); for such rows under other names write "
    named = 'data.train.format = "pairs" and its columns = { prompt = "...", chosen = "...", rejected = "..." }'
    assert expected + named in capsys.readouterr().err
    kto = ["train.loss.kind=kto", f"data.train.path={path}"]
    assert main(["check", str(SHIPPED["preference"]), *kto]) == 2
    assert "expected unpaired (prompt, completion and label)" in capsys.readouterr().err


def test_a_column_that_no_row_has_is_refused_by_check(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = written(tmp_path, [{"question": f"{i}?", "answer": f"{i}.", "persona": "a"} for i in range(60)])
    for verb in ("check", "show-sample"):
        assert main([verb, str(SHIPPED["sft"]), f"data.train.path={path}", "data.train.columns.system=persone"]) == 2
        assert "has no column 'persone' in any row (only question, answer, persona), " in capsys.readouterr().err
