"""`minitune data`: what it prints and its JSON are the facts of the rows, and no weight is read."""

import json
import re
import shutil
from pathlib import Path

import pytest

from minitune.__main__ import main
from minitune.programs import sharding

TURNS = [("two", "<think>\na\n</think>\n\n7"), ("Ten planks.", "<think>\nb\n</think>\n\n{}"), ("and then", "8")]
HISTORY = (  # a template that writes the reasoning of the last answer alone
    "{%- for m in messages %}{%- if m.role == 'user' %}<|user|>{{ m.content }}<|end|>"
    "{%- elif loop.last %}<|assistant|>{{ m.content }}<|end|>"
    "{%- else %}<|assistant|>{{ (m.content.split('</think>') | last).strip() }}<|end|>{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROMPTED = (
    "{%- for m in messages %}{%- if m.role == 'user' %}<|user|>{{ m.content }}<|end|>"
    "{%- else %}<|assistant|>{{ m.content }}<|end|>{%- endif %}{%- endfor %}"
    "{%- if messages[-1].role == 'assistant' or add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tiny_copy(tiny: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny / "model", tmp_path / "model")
    return tmp_path


def chat(n: int) -> dict:
    said = [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in TURNS[:n]]
    return {"messages": [message for turns in said for message in turns]}


def write(folder: Path, rows: list[dict], heldout: list[dict], template: str = "", more: str = "") -> Path:
    for name, table in (("train", rows), ("heldout", heldout)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    if template:
        (folder / "model/chat_template.jinja").write_text(template, encoding="utf-8")
        config = folder / "model/tokenizer_config.json"
        kept = {k: v for k, v in json.loads(config.read_text(encoding="utf-8")).items() if k != "chat_template"}
        config.write_text(json.dumps(kept), encoding="utf-8")
    path = folder / "p.toml"
    path.write_text(
        f'name = "p"\nout = "{folder}/runs"\n[model]\npath = "{folder}/model"\n'
        f'[data.train]\npath = "{folder}/train.jsonl"\nformat = "auto"\nseq_len = 64\n{more}'
        f'[data.heldout]\npath = "{folder}/heldout.jsonl"\nformat = "auto"\nseq_len = 64\n{more}'
        '[[stage]]\nop = "lora"\nrank = 1\nalpha = 1.0\ntargets = ["*.mlp.*_proj.weight"]\n'
        '[[stage]]\nop = "train"\ndata = "train"\nsteps = 3\nbatch_size = 2\n'
        'evaluate = { data = "heldout", every = 2 }\n',
        encoding="utf-8",
    )
    return path


def facts(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict, str]:
    assert main(["data", str(path), "--json"]) == 0
    said = capsys.readouterr()
    return json.loads(said.out)["result"], said.err


def test_rows_are_counted(tiny_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "load_base", lambda *_: pytest.fail("a weight was read"))
    short = [{"instruction": f"{n}", "output": "7"} for n in range(5)]
    long = {"instruction": "Ten planks to Oslo. " * 40, "output": "7"}
    heldout = [short[0], {"instruction": "1", "output": "8"}, {"instruction": "9", "output": "7"}]
    found, said = facts(write(tiny_copy, [*short, short[2], long], heldout), capsys)
    train = found["tables"]["train"]
    assert (train["n_samples"], train["n_repeated"], sum(train["lengths"]["counts"])) == (6, 1, 6)
    assert list(train["left_out"].values()) == [1]
    assert "longer than data.train.seq_len = 64" in next(iter(train["left_out"]))
    assert found["overlaps"] == [{"trained": "train", "measured": "heldout", "n_samples": 3, "n_equal": 1, "n_equal_prompts": 2}]
    (stage,) = found["stages"]
    assert (stage["stage"], stage["steps"], stage["epoch_steps"]) == ("train", 3, train["n_rows"] / 2)
    assert stage["time_is"] == "at least"
    assert [note[:30] for note in found["notes"]] == [
        "1 of the 6 samples of train (1",
        "1 of the 3 samples of heldout ",
    ]
    assert "overlap of heldout with train: 1 of 3 samples are equal, 2 have an equal prompt" in said


@pytest.mark.parametrize(
    ("template", "more", "counts", "note"),
    [
        ("", "", (3, 2, 0, 0), ""),
        (HISTORY, 'turns = "each"\n', (3, 2, 2, 0), ""),
        (HISTORY, 'train_on = "last"\n', (3, 2, 2, 0), 'in 2 of 2 conversations.*data.train.turns = "each"'),
        (PROMPTED, "", (3, 2, 0, 3), "ends 3 of 3 conversations of train with a prompt"),
    ],
)
def test_templates_are_checked(
    template: str, more: str, counts: tuple, note: str, tiny_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = facts(write(tiny_copy, [chat(1), chat(2), chat(3)], [chat(1)], template, more), capsys)
    assert tuple(found["tables"]["train"]["template"].values()) == counts
    of_template = [one for one in found["notes"] if re.search("the template .* of train with", one)]
    assert len(of_template) == bool(note)
    if note:
        assert re.search(note, of_template[0])


def test_time_is_that_of_an_earlier_run(tiny_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tiny_copy, [chat(1), chat(2)], [chat(3)])
    (tiny_copy / "runs/p").mkdir(parents=True)
    rows = [{"stage": "train", "step": n, "tokens_per_second": rate} for n, rate in enumerate((1.0, 50.0, 60.0))]
    (tiny_copy / "runs/p/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found, said = facts(path, capsys)
    (stage,) = found["stages"]
    assert stage["time_s"] == stage["tokens"] / 50.0
    assert "(as the earlier run)" in said


def test_a_program_without_such_a_stage_is_refused(tiny_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tiny_copy, [chat(1)], [chat(1)])
    path.write_text(path.read_text(encoding="utf-8").split('[[stage]]\nop = "train"')[0], encoding="utf-8")
    assert main(["data", str(path), "--json"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out) == {"exit_code": 2, "error": said.err.strip().splitlines()[-1]}
    assert "has no train stage and no eval stage, expected one that names a [data] table" in said.err
