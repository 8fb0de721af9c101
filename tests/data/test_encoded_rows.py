"""Rows that are refused: all of the first ones are named, or they are left out and counted."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from minitune.data import preference, supervised
from minitune.data.encoded_rows import Refused
from minitune.data.prompts import prompts
from minitune.data.readers import read_rows, require_rows
from minitune.data.source import Source
from minitune.data.tables import csv_rows
from minitune.errors import InputError
from minitune.losses.token import CrossEntropy
from minitune.programs.stages.batches import describe
from minitune.text.chat import CHATML
from minitune.text.template import compile_template
from minitune.types import Batch, Mean
from support.models import SMALL, model_of, random_params
from support.tokenizers import with_special_tokens

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TOKENIZER, HF = with_special_tokens(NAMES, ["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
TEMPLATE = compile_template(CHATML, NAMES, "chatml")


def table(tmp_path: Path, rows: list[Any]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "pears", **more}]}


LOST = chat(reasoning_content="three")


def test_the_first_refused_rows_are_named_together(tmp_path: Path) -> None:
    path = table(tmp_path, [chat(), LOST, chat(), LOST, {"messages": []}])
    with pytest.raises(InputError, match=r"rows.jsonl:2 chat: .* \(also refused: 4, 5; invalid = \"skip\" leaves such rows out"):
        supervised.prepare(Source(str(path), "chat", 64), TOKENIZER, TEMPLATE, tmp_path)
    path = table(tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q"}, {"prompt": "q"}])
    with pytest.raises(InputError, match=r"rows.jsonl:2 has no .*also refused: 3"):
        preference.prepare(Source(str(path), "pairs", 64), TOKENIZER, TEMPLATE, tmp_path)


def test_refused_rows_of_several_files_are_named_with_their_files(tmp_path: Path) -> None:
    first = table(tmp_path, [LOST, LOST]).rename(tmp_path / "first.jsonl")
    second = table(tmp_path, [chat(), LOST])
    source = Source((str(first), str(second)), "chat", 64)
    with pytest.raises(InputError, match=rf"first.jsonl:1 chat: .* \(also refused: 2, {second}:2;"):
        supervised.prepare(source, TOKENIZER, TEMPLATE, tmp_path)


def test_refused_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    path = table(tmp_path, [chat(), LOST, chat(name="x"), {"messages": []}])
    report = supervised.prepare(Source(str(path), "chat", 64, invalid="skip"), TOKENIZER, TEMPLATE, tmp_path).report
    assert (report.n_samples, report.n_refused, report.unwritten) == (2, 2, {"name": 1})


MALFORMED = {
    "a line that is no JSON": ("rows.jsonl", '{"instruction": "two", "output": "pe'),
    "a list in a line": ("rows.jsonl", "[1, 2]"),
    "a NaN": ("rows.jsonl", '{"instruction": "two", "output": "pears", "score": NaN}'),
    "an entry of a list": ("rows.json", "7"),
    "a row of csv without a field": ("rows.csv", "pears"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_row_is_left_out_and_counted(name: str, tmp_path: Path) -> None:
    file, bad = MALFORMED[name]
    good = '{"instruction": "two", "output": "pears"}'
    written = {
        ".jsonl": f"{bad}\n{good}\n{bad}\n{good}\n",
        ".json": f"[{bad}, {good}, {bad}, {good}]",
        ".csv": f"instruction,output\n{bad}\ntwo,pears\n{bad}\ntwo,pears\n",
    }
    path = tmp_path / file
    path.write_text(written[path.suffix], encoding="utf-8")
    source = Source(str(path), "instruct", 64, invalid="skip")
    require_rows(source)
    report = supervised.prepare(source, TOKENIZER, TEMPLATE, tmp_path).report
    assert (report.n_samples, report.n_malformed, report.n_refused) == (2, 2, 0)
    described = describe(report, "train", source)
    assert re.search(rf"2 malformed rows skipped; the first row skipped is {re.escape(str(path))}:\d: \w+", described)
    refused: list[Refused] = []
    answers = [one.reference for one in prompts(source, TOKENIZER, TEMPLATE, refused=refused)]
    assert (answers, [one.is_malformed for one in refused]) == (["pears", "pears"], [True, True])
    strict = msgspec.structs.replace(source, invalid="refuse")
    with pytest.raises(InputError, match=rf"^data: {re.escape(str(path))}:\d .*, expected"):
        supervised.prepare(strict, TOKENIZER, TEMPLATE, tmp_path)
    with pytest.raises(InputError, match=rf"^data: {re.escape(str(path))}:\d .*, expected"):
        require_rows(strict)


def test_a_table_of_which_all_rows_are_refused_says_why(tmp_path: Path) -> None:
    path = table(tmp_path, [LOST, LOST])
    source = Source(str(path), "chat", 64, invalid="skip")
    with pytest.raises(InputError, match=r"rows.jsonl:1 .*reasoning.* \(all 2 rows of .*rows.jsonl are refused, expected one"):
        supervised.prepare(source, TOKENIZER, TEMPLATE, tmp_path)


def test_rows_that_evaluation_can_not_read_are_left_out_as_in_training(tmp_path: Path) -> None:
    path = table(tmp_path, [chat(), LOST, chat(), {"messages": []}])
    source = Source(str(path), "chat", 64, invalid="skip")
    refused: list[Refused] = []
    assert len(prompts(source, TOKENIZER, TEMPLATE, refused=refused)) == 2
    assert [one.where for one in refused] == [f"{path}:2", f"{path}:4"]
    # a row after the limit is never looked at
    assert len(prompts(msgspec.structs.replace(source, invalid="refuse"), TOKENIZER, TEMPLATE, 1)) == 1


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ('"open, and never closed\nc,d\n', r"table\.csv:3 opens a quotation mark that is never closed, expected csv; close it$"),
        (
            "x" * 131_073,
            r"table\.csv:3 has a cell of more than 131,072 characters, expected at most so many; close the",
        ),
    ],
    ids=["open", "long"],
)
def test_a_cell_of_csv_that_does_not_end_says_so(cell: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f"question,answer\na,b\nc,{cell}\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        list(csv_rows(path))


def test_rows_of_csv_are_named_by_the_line_that_they_begin_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('"in\nstruction",output\n"a\n\nb",c\nonly\nd,e\n', encoding="utf-8")
    assert [(n, row["output"]) for n, row in csv_rows(path) if isinstance(row, dict)] == [(3, "c"), (7, "e")]
    with pytest.raises(InputError, match=r"rows.csv:6 has 1 fields, expected the 2 of the first line"):
        list(read_rows(path))


def test_long_texts_are_split_and_every_token_is_a_target_once(tmp_path: Path) -> None:
    text = "apples and pears and plums " * 9
    path = table(tmp_path, [{"text": text}, {"text": "two"}])
    source = Source(str(path), "text", 7, packed=False, overlong="split")
    dataset = supervised.prepare(source, TOKENIZER, TEMPLATE, tmp_path)
    ids = [*TOKENIZER.encode(text, parse_special=True), TOKENIZER.eos_id]
    assert not TOKENIZER.add_bos  # so there is none
    assert np.diff(dataset.offsets).max() == 7
    short = [*TOKENIZER.encode("two", parse_special=True), TOKENIZER.eos_id]
    assert dataset.tokens[dataset.mask].tolist() == ids[1:] + short[1:]
    assert dataset.report.n_split == 1
    with pytest.raises(InputError, match=r'data: overlong = "split" with format = .chat., expected it with text only'):
        Source("a", "chat", 8, overlong="split")


def test_a_turn_counts_in_the_loss_what_its_weight_says(tmp_path: Path) -> None:
    first, second = chat(weight=0.25)["messages"], chat()["messages"]
    path = table(tmp_path, [{"messages": [*first, *second]}])
    source = Source(str(path), "chat", 64, packed=False)
    dataset = supervised.prepare(source, TOKENIZER, TEMPLATE, tmp_path)
    (batch,) = supervised.batches(dataset, source, 1)
    weights = batch.loss_mask
    assert sorted(set(weights.flatten().tolist())) == [0, 0.25, 1]
    config = msgspec.structs.replace(SMALL, vocab_size=TOKENIZER.vocab_size)
    model, params = model_of(config), random_params(config)
    plain = Batch(batch.tokens, batch.segment_ids, weights > 0)
    nats = model.token_losses(params, plain, CrossEntropy())
    for summed in (False, True):
        weighted = model.token_losses(params, batch, CrossEntropy(), summed=summed)
        torch.testing.assert_close(weighted, nats * weights)
    mean = Mean.of(weighted, batch.target_mask()).value()
    torch.testing.assert_close(mean, (nats * weights).sum() / weights.sum())


def test_answers_that_are_compared_are_not_weighed(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": [{"role": "assistant", "content": "a", "weight": 0.5}], "rejected": "b"}
    with pytest.raises(InputError, match="weighs an answer by a fraction, expected 0 or 1 where answers are compared"):
        preference.prepare(Source(str(table(tmp_path, [row])), "pairs", 64), TOKENIZER, TEMPLATE, tmp_path)


ANSWERED = {
    "instruct": {"instruction": "two", "output": "pears"},
    "chat": {"messages": [*chat(weight=0.5)["messages"], *chat()["messages"]]},
    "text": {"text": "apples and pears"},
}


@pytest.mark.parametrize("format", ANSWERED)
@pytest.mark.parametrize(("key", "columns"), [("weight", {}), ("quality", {"weight": "quality"})])
def test_a_weight_of_a_row_multiplies_those_of_its_targets(
    format: str, key: str, columns: dict[str, str], tmp_path: Path
) -> None:
    row = ANSWERED[format]
    plain = Source(str(table(tmp_path, [row])), format, 64)  # pyright: ignore[reportArgumentType]
    wanted = supervised.prepare(plain, TOKENIZER, TEMPLATE, tmp_path)
    weights = [0.25, 0, 1, None]
    path = table(tmp_path, [{**row, key: weight} for weight in weights])
    source = msgspec.structs.replace(plain, path=str(path), columns=columns)
    if columns:
        with pytest.raises(InputError, match=r'rows.jsonl:4 has no "quality" \(only .*expected a number from 0 to 1'):
            supervised.prepare(source, TOKENIZER, TEMPLATE, tmp_path)
        path = table(tmp_path, [{**row, key: weight} for weight in [*weights[:3], "1.0"]])
    dataset = supervised.prepare(source, TOKENIZER, TEMPLATE, tmp_path)
    assert (dataset.report.n_samples, dataset.report.n_without_target) == (3, 1)
    mask = wanted.mask.astype(np.float32)
    assert np.array_equal(dataset.mask, np.concatenate([0.25 * mask, mask, mask]))
    assert np.array_equal(dataset.tokens, np.tile(wanted.tokens, 3))


@pytest.mark.parametrize("weight", [-0.1, 1.5, "much", "nan", [1], {"a": 1}, "1e999", 10**400])
def test_a_weight_that_means_nothing_is_refused(weight: Any, tmp_path: Path) -> None:
    for format, row in ANSWERED.items():
        path = table(tmp_path, [{**row, "weight": weight}])
        source = Source(str(path), format, 64)  # pyright: ignore[reportArgumentType]
        with pytest.raises(InputError, match=r'rows.jsonl:1 has "weight" = .*, expected a number from 0 to 1; correct'):
            supervised.prepare(source, TOKENIZER, TEMPLATE, tmp_path)
        # a column of that name that holds something else
        unread = msgspec.structs.replace(source, columns={"weight": ""})
        assert supervised.prepare(unread, TOKENIZER, TEMPLATE, tmp_path).report.n_samples == 1


def test_a_row_of_preferences_has_no_weight(tmp_path: Path) -> None:
    row = {"prompt": "two", "chosen": "pears", "rejected": "apples"}
    path = table(tmp_path, [{**row, "weight": 0.5}])
    with pytest.raises(InputError, match=r'rows.jsonl:1 has "weight" = 0.5, expected no weight or 1 where answers are'):
        preference.prepare(Source(str(path), "pairs", 64), TOKENIZER, TEMPLATE, tmp_path)
    path = table(tmp_path, [{**row, "weight": 1.0}])
    assert preference.prepare(Source(str(path), "pairs", 64), TOKENIZER, TEMPLATE, tmp_path).report.n_samples == 1


def test_a_row_of_weight_0_is_not_compared_either(tmp_path: Path) -> None:
    path = table(tmp_path, [{**chat(), "weight": 0}, chat()])
    asked = prompts(Source(str(path), "chat", 64), TOKENIZER, TEMPLATE)
    assert [one.reference for one in asked] == ["", "pears"]


def test_a_row_without_an_answer_to_train_is_counted_with_each_turn_too(tmp_path: Path) -> None:
    path = table(tmp_path, [chat(), chat(weight=0), {"messages": chat()["messages"][:1]}])
    for turns in ("whole", "each"):
        report = supervised.prepare(Source(str(path), "chat", 64, turns=turns), TOKENIZER, TEMPLATE, tmp_path).report
        assert (report.n_samples, report.n_without_target) == (1, 2)


def test_each_answer_is_a_sample_where_the_source_says_so(tmp_path: Path) -> None:
    path = table(tmp_path, [{"messages": [*chat()["messages"], *chat()["messages"]]}])
    whole = supervised.prepare(Source(str(path), "chat", 64), TOKENIZER, TEMPLATE, tmp_path)
    each = supervised.prepare(Source(str(path), "chat", 64, turns="each"), TOKENIZER, TEMPLATE, tmp_path)
    assert (whole.report.n_samples, each.report.n_samples) == (1, 2)
    assert whole.report.n_target_tokens == each.report.n_target_tokens
    with pytest.raises(InputError, match=r'turns = "each" with train_on = .last., expected train_on = "assistant"'):
        Source("a", "chat", 8, turns="each", train_on="last")
    with pytest.raises(InputError, match="turns = 'each' with format = 'text', expected it with instruct or chat"):
        Source("a", "text", 8, turns="each")
