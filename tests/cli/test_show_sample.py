"""show-sample: what stands between the marks is what is trained, with and without colour, for every format."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from minitune.__main__ import main
from minitune.cli.show_sample import CLOSE, OPEN, show
from minitune.errors import InputError
from minitune.io import paths
from minitune.text import tokenizer
from minitune.text.chat import encode_chat, open_template

SAID = [
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "Ten planks."},
    {"role": "assistant", "content": "{}"},
]
ROWS: dict[str, dict[str, Any]] = {
    "instruct": {"instruction": "two", "output": "7"},
    "chat": {"messages": SAID},
    "text": {"text": "Ten planks."},
    "pairs": {"prompt": "two", "chosen": "7", "rejected": "12"},
    "unpaired": {"prompt": "two", "completion": "7", "label": False},
}
TARGETS = {
    "instruct": ["7<|end|>"],
    "chat": ["7<|end|>", "{}<|end|>"],
    "text": ["en planks.</s>"],  # the demo has no bos, and nothing predicts the first token
    "pairs": ["7<|end|>", "12<|end|>"],
    "unpaired": ["7<|end|>"],
}


def program(folder: Path, format: str, n: int = 5, **rules: Any) -> Path:
    """A program on the demo model with one table of n rows."""
    data = folder / "data.jsonl"
    data.write_text((json.dumps(ROWS[format]) + "\n") * n, encoding="utf-8")
    more = "".join(f"{key} = {value}\n" for key, value in rules.items())
    path = folder / "p.toml"
    path.write_text(
        f'name = "p"\n[model]\npath = "demo"\n[data.train]\npath = "{data}"\nformat = "{format}"\nseq_len = 64\n{more}'
        '[[stage]]\nop = "lora"\nrank = 1\nalpha = 1.0\ntargets = ["*.mlp.*_proj.weight"]\n',
        encoding="utf-8",
    )
    return path


def shown(file: Path, *words: str, colour: bool = False) -> str:
    screen = Console(file=io.StringIO(), force_terminal=colour, color_system="standard" if colour else None, width=40)
    assert show(file, words, screen).code == 0
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


@pytest.mark.parametrize("format", ROWS)
def test_marks_stand_around_what_is_trained(format: str, tmp_path: Path) -> None:
    text = shown(program(tmp_path, format), "--n", "1")
    assert text.count("data.jsonl:1") == (2 if format == "pairs" else 1)
    assert "data.jsonl:2" not in text
    samples = text.split("\n\n")[1:]
    between_marks = [
        piece for sample in samples for piece in re.findall(f"{OPEN}(.*?){CLOSE}", sample.partition("\nids ")[0], re.DOTALL)
    ]
    assert between_marks == TARGETS[format]
    folder = paths.locate("demo")
    text_ids = tokenizer.open_tokenizer(folder)
    for sample in samples:
        words, ids, mask = re.fullmatch(r"[^\n]*\n(.*)\nids (.*)\nmask (.*?)\n?", sample, re.DOTALL).groups()  # pyright: ignore
        numbers = [int(number) for number in re.findall(r"\d+", ids)]
        assert text_ids.decode(numbers, skip_special=False) == words.replace(OPEN, "").replace(CLOSE, "")
        runs = [(int(n), flag == "1") for n, flag in re.findall(r"(\d+) x ([01])", mask)]
        assert sum(n for n, _ in runs) == len(numbers)
        flags = [flag for n, flag in runs for _ in range(n)]
        marked = [int(number) for part in re.findall(f"{OPEN}(.*?){CLOSE}", ids) for number in part.split()]
        assert marked == [number for number, flag in zip(numbers, flags, strict=True) if flag]
    if format == "chat":
        whole = encode_chat(text_ids, open_template(folder, text_ids), SAID)
        assert (numbers, flags) == (whole.ids, whole.mask)


def test_what_is_counted_is_shown_by_name(tmp_path: Path) -> None:
    file = program(tmp_path, "chat", invalid='"skip"')
    named = [{**SAID[0], "name": "Ann", "id": 7}, {**SAID[1], "id": 8, "weight": 0.25}, *SAID[2:]]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    rows = [json.dumps({"messages": turns}) for turns in (named, [SAID[0], call], SAID)]
    (tmp_path / "data.jsonl").write_text("\n".join([rows[0], "{", rows[1], rows[2]]) + "\n", encoding="utf-8")
    text = shown(file)
    assert "not written by the template: name of 1 message, id of 2 messages" in text
    assert "2 x 0.25" in text  # what the turn counts
    assert re.search(r"data.jsonl:1: \d+ tokens, [1-9] of them targets\n", text)
    assert re.search(r"data.jsonl:2 is left out \(malformed\): .*expected one JSON object a line", text)
    assert re.search(r"data.jsonl:3 is left out \(refused\): chat: .* does not write the tool_calls of message 2", text)


def test_labels_of_answers(tmp_path: Path) -> None:
    assert [f"data.jsonl:1 {word}:" in shown(program(tmp_path, "pairs")) for word in ("chosen", "rejected")] == [True, True]
    assert "data.jsonl:1 undesirable:" in shown(program(tmp_path, "unpaired"))


def test_colours_only_add_to_the_marks(tmp_path: Path) -> None:
    file = program(tmp_path, "chat")
    plain, coloured = shown(file), shown(file, colour=True)
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    assert re.search(rf"\x1b\[1;32m{OPEN}7<\|end\|>{CLOSE}", coloured)


def test_data_cannot_steer_the_terminal(tmp_path: Path) -> None:
    file = program(tmp_path, "instruct")
    (tmp_path / "data.jsonl").write_text(json.dumps({"instruction": "a\x1b[2J\x07b\tc", "output": "7"}), encoding="utf-8")
    text = shown(file)
    assert "\x1b" not in text
    assert "\x07" not in text


def test_what_becomes_of_samples_is_told(tmp_path: Path) -> None:
    file = program(tmp_path, "chat")
    assert "(longer than seq_len = 12: dropped)" in shown(file, "data.train.seq_len=12")
    assert "(longer than seq_len = 12: cut there)" in shown(file, "data.train.seq_len=12", "data.train.overlong=truncate")
    last = shown(file, "data.train.train_on=last", "--n=1").partition("\nids")[0]
    assert f"{OPEN}{{}}<|end|>{CLOSE}" in last
    assert last.count(OPEN) == 2  # the first line says what they mean
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": SAID[:1]}), encoding="utf-8")
    assert "0 of them targets (left out: nothing in it is trained)" in shown(file)


def test_files_of_a_mixture_are_shown_each(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps(ROWS["chat"]), encoding="utf-8")
    mix = f'[{{ path = "{tmp_path / "b.jsonl"}", share = 0.5, format = "chat" }}]'
    text = shown(program(tmp_path, "instruct", mix=mix), "--n", "2")
    assert re.findall(r"train .*/(\w+\.jsonl:\d)", text) == ["data.jsonl:1", "data.jsonl:2", "b.jsonl:1"]


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-sample", "lora", "--n", "2", "--data", "heldout", "data.heldout.seq_len=100"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"(\w+) /\S+:(\d)", text) == [("heldout", "1"), ("heldout", "2")]
    assert "longer than seq_len = 100" in text
    assert main(["show-sample"]) == 2
    assert "minitune: show-sample without a program, expected show-sample PROGRAM" in capsys.readouterr().err
    assert main(["show-sample", "lroa"]) == 2
    assert "did you mean 'lora'?" in capsys.readouterr().err
    file = str(program(tmp_path, "chat"))
    (tmp_path / "data.jsonl").write_text('{"messages": 3}', encoding="utf-8")
    assert main(["show-sample", file]) == 2
    assert 'data.jsonl:1 "messages" is a int, expected a list of messages' in capsys.readouterr().err


def test_options_of_the_model_and_of_the_table_reach_the_template(tmp_path: Path) -> None:
    folder = shutil.copytree(paths.locate("demo"), tmp_path / "told")
    source = open_template(folder, tokenizer.open_tokenizer(folder)).source
    (folder / "chat_template.jinja").write_text("{{ first }} {{ second }}\n" + source, encoding="utf-8")
    file = program(tmp_path, "chat", chat_template_kwargs='{ second = "pears" }')
    words = [f"model.path={folder}", 'model.chat_template_kwargs={ first = "Two", second = "Ten" }', "--n", "1"]
    assert "Two pears" in shown(file, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "0"], r"sample: -n is 0, expected 1 to \d+; correct it"),
        (["--n", "x"], "sample: .*invalid int value: 'x', expected options as in"),
        (["--m", "2"], "sample: .*--m.*, expected options as in `python -m minitune show-sample --help`; correct"),
        (["--data", "trian"], "sample: --data trian, expected a .data. table: train; did you mean 'train'?"),
        (["seq_len=3"], "program: 'seq_len=3' on the command line"),
    ],
)
def test_bad_words_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        shown(program(tmp_path, "chat"), *words)


def test_a_shape_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    file = program(tmp_path, "chat")
    file.write_text(
        file.read_text(encoding="utf-8").replace('path = "demo"', 'config = "configs/models/demo.toml"'), encoding="utf-8"
    )
    with pytest.raises(
        InputError, match=r"sample: .*p.toml has \[model\] config but no tokenizer, expected the folder that holds"
    ):
        shown(file)
