"""Files of rows: json, jsonl and parquet say the same, errors name the row, a split and a mixture are functions of the rows."""

import builtins
import json
import re
from collections import Counter
from collections.abc import Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitune.data import preference
from minitune.data.conversations import messages, tools
from minitune.data.cursor import Cursor
from minitune.data.packing import epoch_documents, epoch_rows, fill
from minitune.data.prompts import prompts
from minitune.data.readers import present, read_rows, rows_with_location
from minitune.data.source import MixtureComponent, Source, Split
from minitune.data.supervised import Dataset, cache_key, prepare, take
from minitune.errors import InputError
from minitune.io import paths
from minitune.text import tokenizer
from minitune.text.chat import CHATML, encode_chat, open_template
from minitune.text.template import compile_template
from support.tokenizers import WORDS, llama

TOOLS = (
    "{% if tools %}<|im_start|>{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ (c.function or c) | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER, TEMPLATE = llama()[0], compile_template(CHATML, {"eos_token": "</s>"}, "chatml")
CALLING = compile_template(TOOLS, {}, "tools")

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
objects = st.lists(st.dictionaries(st.text(max_size=4), values, max_size=3), min_size=1, max_size=5)


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(n: int, word: str = "two") -> list[dict[str, str]]:
    return [{"instruction": f"{word} {i}", "output": WORDS[i % 7]} for i in range(n)]


def opened(source: Source, folder: Path) -> Dataset:
    return prepare(source, TOKENIZER, TEMPLATE, folder / "cache")


@given(rows=objects, indent=st.sampled_from([None, 0, 3]), blanks=st.sampled_from(["", "\n\n", " \r\n\t"]))
def test_a_list_says_what_lines_say(
    rows: list[Any], indent: int | None, blanks: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    whole = blanks + json.dumps(rows, indent=indent) + blanks
    (folder / "a.json").write_text(whole, encoding="utf-8")
    located_rows = list(read_rows(folder / "a.json"))
    wanted = [present(row) for row in rows]  # a null is no value
    assert [row for _, row in located_rows] == wanted == [row for _, row in read_rows(jsonl(folder / "a.jsonl", rows))]
    assert [row for _, row in read_rows(jsonl(folder / "lines.json", rows))] == wanted  # as some data sets call it
    numbers = [number for number, _ in located_rows]
    assert numbers == sorted(numbers)
    lines = whole.split("\n")
    assert all(lines[number - 1].lstrip(" \t[,").startswith("{") for number in numbers)


def test_rows_of_a_list_know_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n[{"a":\n1}, {"a": 1}\n,\n\n{"b": "\\n"}]', encoding="utf-8")
    assert list(read_rows(path)) == [(2, {"a": 1}), (3, {"a": 1}), (6, {"b": "\n"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n{"a": 1},\n{"a" 1}]', r"a.json:3 .*, expected a list of JSON objects; correct the line"),
        (b'[\n{"a": 1},\n{"a": 1}', r"a.json:3 .*, expected a list of JSON objects"),
        (b'[\n{"a": 1},\n\n7]', r"a.json:4 holds a int, expected a list of JSON objects; correct the line"),
        (b'[\n{"a": "\xff"}]', r"a.json:2 .*, expected a list of JSON objects"),
        (b"[" * 100_000, r"a.json:1 .*, expected a list of JSON objects"),
        (b"[ ]", r"a.json holds an empty list, expected a list of JSON objects; correct the path"),
        (b"", r"a.json holds no line, expected one JSON object a line; correct the path"),
    ],
)
def test_a_damaged_list_is_refused_with_its_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=f"^data: {re.escape(str(tmp_path))}/{message}"):
        list(read_rows(tmp_path / "a.json"))


def test_parquet_says_what_lines_say(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}
    rows = [
        {
            "messages": [{"role": "user", "content": "a"}, call, {"role": "tool", "content": "7", "name": "f"}, call],
            "day": date(2024, 1, 2),
        },
        {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]},
    ] * 700  # more than one batch of them
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert [row for _, row in read_rows(path)] == rows  # no key of one message is in another one
    assert [number for number, _ in read_rows(path)] == list(range(1, len(rows) + 1))
    list(rows_with_location(Source(str(path), "chat", 8, split=Split(0.5, "train"))))  # a date can be hashed
    pq.write_table(pa.Table.from_pylist(rows[:2]), path)
    plain = [{key: value for key, value in row.items() if key != "day"} for row in rows[:2]]
    same = [
        prepare(Source(str(file), "chat", 200), TOKENIZER, CALLING, tmp_path / "cache")
        for file in (path, jsonl(tmp_path / "a.jsonl", plain))
    ]
    assert same[0].tokens.tolist() == same[1].tokens.tolist()


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"text": "a"}]), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"^data: .*a.parquet:1 .*, expected a parquet file; fetch the file again"):
        list(read_rows(path))
    pq.write_table(pa.Table.from_pylist([{"text": "a"}]).slice(0, 0), path)
    with pytest.raises(InputError, match=r"^data: .*a.parquet holds no row, expected a parquet file with rows; correct the path"):
        list(read_rows(path))
    with pytest.raises(
        InputError, match=r"none.parquet is no file, expected a jsonl, json, csv, tsv, parquet or arrow file; correct the path"
    ):
        list(read_rows(tmp_path / "none.parquet"))
    pq.write_table(pa.Table.from_pylist([{"text": "a"}, {"text": None}]), path)
    with pytest.raises(InputError, match=r'^data: .*a.parquet:2 has no "text" \(only nothing\)'):
        opened(Source(str(path), "text", 8), tmp_path)


def test_without_pyarrow_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__
    pq.write_table(pa.Table.from_pylist([{"text": "a"}]), tmp_path / "a.parquet")

    def refuse(name: str, *args: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"needs the package pyarrow, which is not installed; pip install 'minitune\[parquet\]'"):
        list(read_rows(tmp_path / "a.parquet"))


@given(n=st.integers(1, 300), more=st.integers(0, 300), fraction=st.floats(0.01, 0.99))
def test_a_split_has_two_parts_that_stay_when_rows_are_added(n: int, more: int, fraction: float) -> None:
    rows = asked(n + more)
    sides = [[Split(fraction, part).takes(row) for row in rows] for part in ("train", "heldout")]
    assert all(a != b for a, b in zip(*sides, strict=True))
    again = [{"output": row["output"], "instruction": row["instruction"]} for row in rows[:n]]
    assert [Split(fraction, "train").takes(row) for row in again] == sides[0][:n]  # the order of keys says nothing
    wider = [Split(min(fraction * 1.2, 0.995), "heldout").takes(row) for row in rows]
    assert all(b for a, b in zip(sides[1], wider, strict=True) if a)


def test_a_split_holds_out_its_fraction() -> None:
    n_heldout = sum(Split(0.05, "heldout").takes(row) for row in asked(10_000))
    assert abs(n_heldout - 500) < 5 * (10_000 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize("format", ["instruct", "pairs", "unpaired"])
def test_parts_of_a_split_make_up_the_data(format: Any, tmp_path: Path) -> None:
    rows: list[Any] = asked(60)
    if format != "instruct":
        rows = [{"prompt": f"two {i}", "chosen": "7", "rejected": "12"} for i in range(60)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    whole = Source(str(path), format, 128)
    parts = [msgspec.structs.replace(whole, split=Split(0.3, part)) for part in ("train", "heldout")]
    read = prepare if format == "instruct" else preference.prepare
    datasets = [read(source, TOKENIZER, TEMPLATE, tmp_path / "cache") for source in (whole, *parts)]
    sizes = [one.report.n_samples for one in datasets]
    assert sizes[0] == sizes[1] + sizes[2]
    assert min(sizes) > 0
    assert len({one.key for one in datasets}) == 3
    if format == "instruct":
        assert Counter(one.ids[0] for one in prompts(whole, TOKENIZER, TEMPLATE)).total() == 60
        asked_of = [[one.messages[0]["content"] for one in prompts(source, TOKENIZER, TEMPLATE)] for source in parts]
        assert sorted(asked_of[0] + asked_of[1]) == sorted(row["instruction"] for row in rows)


def test_an_empty_part_of_a_split_is_refused(tmp_path: Path) -> None:
    source = Source(str(jsonl(tmp_path / "a.jsonl", asked(3))), "instruct", 64, split=Split(1e-9, "heldout"))
    with pytest.raises(
        InputError, match=r"a.jsonl has no row of 3 in the part 'heldout' of split, expected one; change its fraction"
    ):
        opened(source, tmp_path)


mixtures = st.tuples(
    st.integers(1, 60), st.lists(st.tuples(st.integers(1, 25), st.floats(0.02, 0.3)), min_size=1, max_size=3), st.integers(0, 9)
)


@given(mixture=mixtures, epoch=st.integers(0, 5))
def test_an_epoch_of_a_mixture(mixture: tuple[int, list[tuple[int, float]], int], epoch: int) -> None:
    own, others, seed = mixture
    sizes, shares = [own, *(size for size, _ in others)], [share for _, share in others]
    chosen = epoch_documents(sizes, shares, seed, epoch)
    assert chosen == epoch_documents(sizes, shares, seed, epoch)
    counts, first = Counter(chosen), 0
    for number, size in enumerate(sizes):
        uses = [counts[i] for i in range(first, first + size)]
        first += size
        if number == 0:
            assert uses == [1] * own
            continue
        expected = max(1, round(own * shares[number - 1] / (1 - sum(shares))))
        assert sum(uses) == expected
        assert max(uses) - min(uses) <= (1 if epoch == 0 else 2)  # an epoch may begin in the middle of a round
    assert sum(counts.values()) == len(chosen)
    if own >= 50:
        assert all(abs(n / len(chosen) - share) < 0.05 for share, n in zip(shares, _sums(chosen, sizes)[1:], strict=True))
    # over epochs every document of every file comes equally often, but for a round that is not over
    total_uses = Counter(i for e in range(epoch + 1) for i in epoch_documents(sizes, shares, seed, e))
    first = 0
    for size in sizes:
        uses = [total_uses[i] for i in range(first, first + size)]
        assert max(uses) - min(uses) <= 1
        first += size


def _sums(chosen: Sequence[int], sizes: Sequence[int]) -> list[int]:
    borders = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    return [sum(a <= i < b for i in chosen) for a, b in pairwise(borders)]


@pytest.mark.parametrize("packed", [True, False])
def test_a_mixture_is_trained_on_in_its_shares_and_resumes(packed: bool, tmp_path: Path) -> None:
    jsonl(
        tmp_path / "b.jsonl",
        [{"messages": [{"role": "user", "content": f"pears {i}"}, {"role": "assistant", "content": "c"}]} for i in range(9)],
    )
    jsonl(tmp_path / "c.jsonl", [{"body": f"boxes {i}"} for i in range(200)])
    mix = (
        MixtureComponent(str(tmp_path / "b.jsonl"), 0.25, "chat"),
        MixtureComponent(str(tmp_path / "c.jsonl"), 0.15, "text", {"text": "body"}),
    )
    source = Source(str(jsonl(tmp_path / "a.jsonl", asked(60))), "instruct", 97, packed, mix=mix)
    dataset = opened(source, tmp_path)
    assert dataset.report.n_samples == 60 + 9 + 200
    assert sorted(i for row in dataset.order(3, 0) for i in row if i < 60) == list(range(60))
    n_rows = [len(dataset.order(3, epoch)) for epoch in range(4)]
    whole, cursor = take(dataset, Cursor(0, 0), sum(n_rows), source, 3)
    assert cursor == Cursor(4, 0)
    words = [TOKENIZER.decode(row.tolist(), skip_special=True) for row in whole.tokens]
    counts = Counter(word for text in words for word in re.findall(r"(two|pears|boxes) \d", text))
    assert counts == {"two": 240, "pears": 100, "boxes": 60}
    fresh = opened(source, tmp_path)
    first, cursor = take(fresh, Cursor(0, 0), n_rows[0] + 2, source, 3)
    rest, cursor = take(opened(source, tmp_path), cursor, sum(n_rows) - n_rows[0] - 2, source, 3)
    assert cursor == Cursor(4, 0)
    texts = [row[row > 0].tolist() for batch in (first, rest) for row in batch.tokens]
    assert texts == [row[row > 0].tolist() for row in whole.tokens]
    with pytest.raises(InputError, match=r"c.jsonl has format 'text', expected instruct or chat; plain text asks for no answer"):
        prompts(source, TOKENIZER, TEMPLATE)
    asks = prompts(msgspec.structs.replace(source, mix=mix[:1]), TOKENIZER, TEMPLATE)
    assert [one.reference for one in asks] == [*(WORDS[i % 7] for i in range(60)), *["c"] * 9]


def test_the_fill_of_a_table_counts_what_is_no_padding(tmp_path: Path) -> None:
    source = Source(str(jsonl(tmp_path / "a.jsonl", asked(30))), "instruct", 61)
    dataset = opened(source, tmp_path)
    epoch, _ = take(dataset, Cursor(0, 0), len(dataset.order(7, 0)), source, 7)
    assert dataset.fill(source, 7) == epoch.segment_ids.gt(0).sum().item() / epoch.tokens.numel()


def test_a_table_without_a_mixture_keeps_its_order(tmp_path: Path) -> None:
    lengths = [3, 9, 1, 7, 12, 2, 2, 20, 5, 4, 8]
    assert epoch_rows(lengths, 31, True, 5, 2) == epoch_rows(lengths, 31, True, 5, 2, sizes=[11], shares=[])


def test_a_file_of_a_mixture_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", [{"instruction": "x " * 200, "output": "y"}])
    source = Source(
        str(jsonl(tmp_path / "a.jsonl", asked(5))), "instruct", 64, mix=(MixtureComponent(str(tmp_path / "b.jsonl"), 0.5),)
    )
    with pytest.raises(
        InputError, match=r"b.jsonl leaves nothing to train on, expected an assistant's turn that fits; raise seq_len"
    ):
        opened(source, tmp_path)
    with pytest.raises(InputError, match=r"^data: .*b.jsonl is no file, expected"):
        opened(msgspec.structs.replace(source, mix=(MixtureComponent("b.jsonl", 0.5),)), tmp_path)
    jsonl(tmp_path / "b.jsonl", [{"instruction": "x", "output": 3}])
    with pytest.raises(InputError, match=r'^data: .*b.jsonl:1 "output" is a int, expected a string; correct the line'):
        opened(source, tmp_path)


def test_what_a_table_may_say() -> None:
    good = {"path": "a", "format": "chat", "seq_len": 8, "columns": {"tools": "functions"}, "train_on": "last"}
    assert msgspec.convert(good, Source).train_on == "last"
    for change, message in [
        ({"train_on": "user"}, "train_on"),
        (
            {"format": "text", "columns": {}},
            r"train_on = 'last' with format = 'text', expected .*; remove it: every token is trained",
        ),
        (
            {"format": "pairs", "columns": {}},
            r"train_on = 'last' with format = 'pairs', expected .*; remove it: the answer is trained",
        ),
        ({"split": {"fraction": 1.0, "part": "train"}}, "fraction"),
        ({"split": {"fraction": 0.5}}, "part"),
        ({"split": {"fraction": 0.5, "part": "test"}}, "part"),
        ({"mix": [{"path": "b"}]}, "share"),
        (
            {"format": "text", "columns": {}, "train_on": "assistant", "chat_template_kwargs": {"a": 1}},
            "chat_template_kwargs with format = 'text', expected it with conversations only; remove it",
        ),
        (
            {"mix": [{"path": "b", "share": 0.5}, {"path": "c", "share": 0.5}]},
            "mix has shares of 1 together, expected less than 1",
        ),
        ({"mix": [{"path": "b", "share": 0.5, "format": "pairs"}]}, "format"),
        ({"mix": [{"path": "b", "share": 0.5, "columns": {"text": "x"}}]}, "columns names 'text', expected messages or tools"),
        (
            {"format": "pairs", "columns": {}, "train_on": "assistant", "mix": [{"path": "b", "share": 0.5, "format": "chat"}]},
            r"mix with format = 'pairs', expected instruct, chat or text; remove it",
        ),
    ]:
        with pytest.raises(msgspec.ValidationError, match=message):
            msgspec.convert({**good, **change}, Source)


def test_the_files_of_a_table_are_tables_of_its_kind() -> None:
    mix = (
        MixtureComponent("demo/x.jsonl", 0.1),
        MixtureComponent("c", 0.1, "text", {"text": "body"}),
        MixtureComponent("d", 0.1, "instruct", {}, Split(0.5, "train")),
    )
    source = Source("a", "chat", 8, False, "truncate", {"messages": "m"}, "last", Split(0.1, "heldout"), mix)
    resolved = source.with_paths(lambda path: [paths.locate(path)])
    assert resolved.path == "a"
    assert Path(resolved.mix[0].path).is_absolute()  # demo/... is embedded for a file that is mixed in too
    assert [one.path for one in resolved.parts()] == [resolved.path, *(one.path for one in resolved.mix)]
    own, same, text, other = source.parts()
    assert own == msgspec.structs.replace(source, mix=())
    assert (same.format, same.columns, same.train_on, same.split) == ("chat", {}, "last", None)
    assert (text.format, text.columns, text.train_on) == ("text", {"text": "body"}, "assistant")
    assert (other.format, other.train_on, other.split) == ("instruct", "last", Split(0.5, "train"))
    options = [{"a": 1}, {"a": 1}, {}, {"b": 2}]
    components = (mix[0], mix[1], msgspec.structs.replace(mix[2], chat_template_kwargs={"b": 2}))
    asked = msgspec.structs.replace(source, chat_template_kwargs={"a": 1}, mix=components)
    assert [one.chat_template_kwargs for one in asked.parts()] == options
    assert {(one.seq_len, one.packed, one.overlong, one.mix) for one in source.parts()} == {(8, False, "truncate", ())}


def test_everything_that_tokens_depend_on_is_in_the_key(tmp_path: Path) -> None:
    rows = asked(8)
    path, other = jsonl(tmp_path / "a.jsonl", rows), jsonl(tmp_path / "b.jsonl", rows)
    source = Source(str(path), "instruct", 64)
    mixed = msgspec.structs.replace(source, mix=(MixtureComponent(str(other), 0.5),))

    def key(source: Source, template: Any = TEMPLATE) -> str:
        return cache_key(source, TOKENIZER, template)

    changes: list[dict[str, Any]] = [
        {"train_on": "last"},
        {"train_on": "all"},
        {"split": Split(0.5, "train")},
        {"split": Split(0.5, "heldout")},
        {"split": Split(0.4, "train")},
        {"chat_template_kwargs": {"date": 1}},
        {"chat_template_kwargs": {"date": True}},
        {"mix": mixed.mix},
        {"mix": (MixtureComponent(str(other), 0.5, chat_template_kwargs={"date": 1}),)},
        {"mix": mixed.mix * 1 + (MixtureComponent(str(other), 0.1),)},
        {"mix": (MixtureComponent(str(other), 0.5, split=Split(0.5, "train")),)},
        {"mix": (MixtureComponent(str(other), 0.5, columns={"output": "output"}),)},
        {"mix": (MixtureComponent(str(other), 0.5, format="chat"),)},
    ]
    keys = [key(source), *(key(msgspec.structs.replace(source, **change)) for change in changes)]
    assert len(set(keys)) == len(keys)
    assert key(msgspec.structs.replace(source, mix=(MixtureComponent(str(other), 0.3),))) == key(
        mixed
    )  # a share is no part of the tokens
    assert key(msgspec.structs.replace(source, path=str(other), packed=False)) == key(source)
    assert key(source, TEMPLATE._replace(tool_use=CALLING)) != key(source)
    assert key(source, TEMPLATE._replace(options={"date": 1})) != key(source)
    jsonl(other, rows[1:])
    assert key(msgspec.structs.replace(source, mix=mixed.mix)) != key(source)


FUNCTION = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CHAT = Source("f.jsonl", "chat", 64)


@pytest.mark.parametrize("written", [[FUNCTION], json.dumps([FUNCTION])])
@pytest.mark.parametrize("format", ["chat", "pairs", "unpaired"])
def test_tools_reach_the_template(written: Any, format: Any, tmp_path: Path) -> None:
    said = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "7"}]
    rows = {"chat": {"messages": said}, "pairs": {"prompt": "two", "chosen": "7", "rejected": "12"}}
    rows["unpaired"] = {"prompt": "two", "completion": "7", "label": True}
    other = {**rows[format], "prompt": "apples"} if format != "chat" else rows[format]
    path = jsonl(tmp_path / "a.jsonl", [{**rows[format], "functions": written}, other])
    source = Source(str(path), format, 256, columns={"tools": "functions"})
    read = prepare if format == "chat" else preference.prepare
    dataset = read(source, TOKENIZER, CALLING, tmp_path / "cache")
    documents = dataset if isinstance(dataset, Dataset) else dataset.answers
    first = documents.tokens[documents.offsets[0] : documents.offsets[1]].tolist()
    assert first == encode_chat(TOKENIZER, CALLING, said, tools=[FUNCTION]).ids
    assert "weather" in TOKENIZER.decode(first, skip_special=False)
    if format == "chat":
        asks = prompts(source, TOKENIZER, CALLING)
        assert ["weather" in TOKENIZER.decode(one.ids, skip_special=False) for one in asks] == [True, False]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{]", r'f:1 "tools" is no JSON \(.*\), expected a list of objects; correct the line'),
        ('{"a": 1}', 'f:1 "tools" is a dict, expected a list of objects; correct the line'),
        ([3], 'f:1 "tools" is a list, expected a list of objects'),
        (True, 'f:1 "tools" is a bool, expected a list of objects'),
    ],
)
def test_odd_tools_are_refused(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^data: {message}"):
        tools({"tools": value}, CHAT, "f:1")


@pytest.mark.parametrize("value", [None, "", " ", "null", "[]", []])
def test_no_tools(value: Any) -> None:
    assert tools({"tools": value}, CHAT, "f:1") == tools({}, CHAT, "f:1") == []


def test_calls_stay_as_they_are_written() -> None:
    for arguments in ('{"x": [1, "é"]}', {"x": [1, "é"]}, "not json", 3):
        turn = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}],
        }
        assert messages({"messages": [turn]}, CHAT, "f:1") == [turn]
    call = {"name": "f", "arguments": "{}"}  # OpenAI's first spelling of a call
    (found,) = messages({"messages": [{"role": "assistant", "content": "", "function_call": call}]}, CHAT, "f:1")
    assert found == {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    odd = [{"role": "assistant", "content": "", "tool_calls": value} for value in ([3], ["x"], [{"function": 3}], "x", None)]
    assert messages({"messages": odd}, CHAT, "f:1") == odd


def test_sharegpt_calls() -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": "{\\"x\\": 1}"}'},
        {"from": "observation", "value": "7"},
        {"from": "gpt", "value": "a"},
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert messages({"conversations": turns}, CHAT, "f:1") == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "a"},
    ]
    with pytest.raises(InputError, match=r'f:1 message 1 has a function_call that is no JSON object, expected "name" and'):
        messages({"conversations": [{"from": "function_call", "value": "f(1)"}]}, CHAT, "f:1")


def test_the_order_notes_fill_their_rows() -> None:
    """Notes have 85 to 172 tokens, 124 on average: a row of 256 takes two, hardly ever three, so 2 * 124 / 256 is the most."""
    folder = paths.locate("demo").parent
    text = tokenizer.open_tokenizer(folder / "model")
    template = open_template(folder / "model", text)
    notes = [row for _, row in read_rows(folder / "orders-train.jsonl")][:2000]

    def words(row: dict[str, str]) -> int:
        return len(text.encode(f"{row['instruction']}\n{row['input']}{row['output']}", parse_special=False))

    added = len(encode_chat(text, template, messages(notes[0], Source("f", "instruct", 8), "")).ids) - words(notes[0])
    lengths = [words(row) + added for row in notes]
    rows = epoch_rows(lengths, 256, True, 0, 0)
    assert max(map(len, rows)) <= 3
    assert fill(rows, lengths, 256) > 0.97
    assert len(rows) <= len(notes) // 2 + 1
