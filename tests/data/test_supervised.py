"""jsonl to batches: every error with its line, packing that never cuts, an order that is a value, and a cache that is used."""

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitune.data import supervised
from minitune.data.conversations import messages
from minitune.data.cursor import Cursor
from minitune.data.packing import epoch_rows, filled_rows
from minitune.data.prompts import prompts, questions
from minitune.data.readers import read_rows
from minitune.data.source import PREFERENCE_FORMATS, Source
from minitune.data.supervised import Dataset, batches, cache_key, prepare, take
from minitune.data.token_store import Report
from minitune.errors import InputError
from minitune.io import paths
from minitune.io.checksums import CHECKSUMS, write_checksums
from minitune.programs.program import load
from minitune.programs.stages.batches import describe
from minitune.programs.stages.train import Train
from minitune.text.chat import CHATML, encode_chat, encode_prompt, open_template
from minitune.text.template import Template, compile_template
from minitune.text.tokenizer import Tokenizer, open_tokenizer
from minitune.types import Batch
from support.programs import SHIPPED
from support.tokenizers import WORDS, llama, llama_config, sentencepiece_model, write_folder

TOKENIZER, TEMPLATE = llama()[0], compile_template(CHATML, {"eos_token": "</s>"}, "chatml")


def instruct_file(folder: Path, lengths: Sequence[int]) -> Path:
    """A jsonl of instruct samples with this many words each."""
    rows = [{"instruction": " ".join([WORDS[i % 7]] * n), "output": WORDS[-1 - i % 5]} for i, n in enumerate(lengths)]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepared(folder: Path, source: Source) -> Dataset:
    """The data set with the tokenizer and template of these tests."""
    return prepare(source, TOKENIZER, TEMPLATE, folder / "cache")


def documents(batch: Batch) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """(tokens, mask) of every document in a batch, row by row; checks that padding is empty and documents are numbered."""
    pieces = []
    for tokens, segments, mask in zip(*batch, strict=True):
        numbers = segments[segments > 0].unique().tolist()
        assert numbers == list(range(1, len(numbers) + 1))
        assert not mask[segments == 0].any()
        for number in numbers:
            (at,) = torch.where(segments == number)
            assert at.tolist() == list(range(int(at[0]), int(at[-1]) + 1))
            pieces.append((tuple(tokens[at].tolist()), tuple(mask[at].tolist())))
    return pieces


lengths_and_room = st.integers(1, 61).flatmap(lambda room: st.tuples(st.lists(st.integers(1, room), max_size=200), st.just(room)))


@given(given_=lengths_and_room, packed=st.booleans(), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_an_epoch_holds_every_document_once_and_no_row_overflows(
    given_: tuple[list[int], int], packed: bool, seed: int, epoch: int
) -> None:
    lengths, seq_len = given_
    rows = epoch_rows(lengths, seq_len, packed, seed, epoch)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= seq_len for row in rows)
    assert all(row for row in rows)
    assert packed or all(len(row) == 1 for row in rows)
    assert rows == epoch_rows(lengths, seq_len, packed, seed, epoch)


@given(given_=lengths_and_room)
def test_a_row_takes_the_longest_and_closes_with_the_best_one_or_two(given_: tuple[list[int], int]) -> None:
    lengths, seq_len = given_
    left, wanted = sorted(lengths, reverse=True), []
    while left:  # the naive way: try all
        row = [left.pop(0)]
        while fitting := [n for n in left if n <= seq_len - sum(row)]:
            room = seq_len - sum(row)
            pairs = [(a, b) for i, a in enumerate(fitting) for b in fitting[i + 1 :] if a + b <= room]
            choices = [(n,) for n in fitting] + pairs
            best = max(choices, key=lambda c: (sum(c), -len(c), c)) if room <= 2 * fitting[0] else (fitting[0],)
            for n in best:
                left.remove(n)
                row.append(n)
        wanted.append(row)
    rows = [[lengths[i] for i in row] for row in filled_rows(range(len(lengths)), lengths, seq_len)]
    assert rows == wanted
    assert all(seq_len - sum(row) < min(later) for i, row in enumerate(rows) for later in rows[i + 1 :])


def trained_on() -> list[tuple[str, str]]:
    """(program, data table) of whatever a shipped program trains on in packed rows; demo/pretrain's data is not there yet."""
    loaded = {name: load(file) for name, file in SHIPPED.items() if name != "demo/pretrain"}
    tables = {(name, stage.data) for name, one in loaded.items() for stage in one.stage if isinstance(stage, Train)}
    sources = {(name, key): loaded[name].data[key] for name, key in tables}
    return sorted(place for place, one in sources.items() if one.packed and one.format not in PREFERENCE_FORMATS)


@pytest.mark.parametrize(("name", "key"), trained_on())
def test_the_rows_of_every_shipped_program_are_97_percent_full(
    name: str, key: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = load(paths.shipped()[name]).data[key]
    source, folder = msgspec.structs.replace(source, path=str(paths.locate(source.path))), paths.locate("demo")
    tokenizer = open_tokenizer(folder)
    cache = tmp_path_factory.getbasetemp() / "fill"  # of all these programs
    dataset = prepare(source, tokenizer, open_template(folder, tokenizer), cache)
    assert all(dataset.fill(source, seed) >= 0.97 for seed in (0, 1))
    assert (dataset.report.n_dropped, dataset.report.n_truncated) == (0, 0)


@pytest.mark.parametrize("packed", [True, False])
def test_the_order_differs_between_epochs_and_seeds(packed: bool) -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 300).tolist()
    orders = [epoch_rows(lengths, 101, packed, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    together = [{frozenset(row) for row in rows} for rows in orders]
    assert not packed or together[0] != together[1]  # not the same rows in another order


@pytest.mark.parametrize(("mean", "spread", "seq_len"), [(120, 0.8, 2048), (500, 0.8, 2048), (300, 0.9, 4096), (125, 0.11, 512)])
def test_rows_of_realistic_lengths_are_97_percent_full(mean: int, spread: float, seq_len: int) -> None:
    lengths = np.random.default_rng(1).lognormal(np.log(mean), spread, 20_000).astype(int).clip(8, seq_len).tolist()
    rows = epoch_rows(lengths, seq_len, True, 0, 0)
    assert sorted(i for row in rows for i in row) == list(range(20_000))
    assert max(sum(lengths[i] for i in row) for row in rows) <= seq_len
    assert sum(lengths) / (len(rows) * seq_len) >= 0.97


class CountedLengths(list[int]):
    """Lengths of documents that count how often one is read."""

    n_reads = 0

    def __getitem__(self, i: Any) -> Any:
        self.n_reads += 1
        return super().__getitem__(i)


def test_packing_searches_among_lengths_and_not_among_documents() -> None:
    """Twice as many documents take twice as many steps of the interpreter; a search through all documents takes four times."""

    def n_lines(n_documents: int) -> int:
        lengths = CountedLengths(np.random.default_rng(1).lognormal(3.0, 0.5, n_documents).astype(int).clip(8, 128).tolist())
        counted = [0]

        def trace(frame: Any, event: str, _: Any) -> Any:
            counted[0] += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            filled_rows(range(n_documents), lengths, 128)
        finally:
            sys.settrace(before)
        assert lengths.n_reads <= 3 * n_documents
        return counted[0]

    assert n_lines(2000) < 2.5 * n_lines(1000)


@pytest.mark.parametrize("packed", [True, False])
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=12), seed=st.integers(0, 3))
def test_resuming_from_any_cursor_gives_the_same_batches(
    packed: bool, sizes: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, dataset = _shared(packed, tmp_path_factory)
    whole, _ = take(dataset, Cursor(0, 0), sum(sizes), source, seed)
    taken, cursor = [], Cursor(0, 0)
    for size in sizes:
        fresh = prepare(source, TOKENIZER, TEMPLATE, Path(source.path).parent / "cache")
        batch, cursor = take(fresh, Cursor(*json.loads(json.dumps(cursor))), size, source, seed)
        assert batch.tokens.shape[0] == size
        taken += documents(batch)
    assert taken == documents(whole)
    per_epoch = len(dataset.order(seed, 0))
    if packed:
        assert sum(len(dataset.order(seed, epoch)) for epoch in range(cursor.epoch)) + cursor.row == sum(sizes)
    else:
        assert (cursor.epoch * per_epoch + cursor.row, cursor.row < per_epoch) == (sum(sizes), True)


def _shared(packed: bool, factory: pytest.TempPathFactory) -> tuple[Source, Dataset]:
    folder = factory.getbasetemp() / "shared"
    folder.mkdir(exist_ok=True)
    source = Source(str(instruct_file(folder, [3, 9, 1, 7, 12, 2, 2, 20, 5, 4, 8])), "instruct", 61, packed)
    return source, prepared(folder, source)


@pytest.mark.parametrize("packed", [True, False])
def test_batches_hold_the_tokens_of_the_documents(packed: bool, tmp_path: Path) -> None:
    lengths = [3, 9, 1, 7, 12, 2, 2, 20, 5, 4, 8]
    source = Source(str(instruct_file(tmp_path, lengths)), "instruct", 61, packed)
    dataset = prepared(tmp_path, source)
    expected = []
    for number, row in read_rows(Path(source.path)):
        ids, mask, _ = encode_chat(TOKENIZER, TEMPLATE, messages(row, source, str(number)))
        expected.append((tuple(ids), tuple(mask)))
    in_file_order = list(batches(dataset, source, 2))
    assert [doc for batch in in_file_order for doc in documents(batch)] == expected
    assert all(len(batch.tokens) == 2 for batch in in_file_order[:-1])
    n_rows = len(dataset.order(5, 0))
    epoch, cursor = take(dataset, Cursor(0, 0), n_rows, source, 5)
    assert cursor == Cursor(1, 0)
    assert Counter(documents(epoch)) == Counter(expected)
    for batch in (epoch, *in_file_order):
        assert [x.dtype for x in batch] == [torch.int64, torch.int32, torch.bool]
        longest = max(int((row > 0).sum()) for row in batch.segment_ids)
        assert batch.tokens.shape[1] == (61 if packed else longest)
    two_epochs, cursor = take(dataset, Cursor(0, n_rows - 1), 2, source, 5)
    assert cursor == Cursor(1, 1)
    assert documents(two_epochs) == [
        *documents(take(dataset, Cursor(0, n_rows - 1), 1, source, 5)[0]),
        *documents(take(dataset, Cursor(1, 0), 1, source, 5)[0]),
    ]


def test_the_first_token_of_a_document_is_never_a_target(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"body": "two apples"}\n\n{"body": "<s>7<|im_end|>"}\n', encoding="utf-8")
    source = Source(str(path), "text", 32, columns={"text": "body"})
    (batch,) = batches(prepared(tmp_path, source), source, 4)
    plain = TOKENIZER.encode("two apples", parse_special=False)
    # the text format is raw: special tokens in it are tokens, and a bos that it writes is not doubled
    second = [*TOKENIZER.encode("<s>7<|im_end|>", parse_special=True), 2]
    assert documents(batch) == [
        ((*plain, 2), (False, *[True] * len(plain))),
        (tuple(second), (False, *[True] * (len(second) - 1))),
    ]
    answer_first = tmp_path / "chat.jsonl"
    answer_first.write_text(
        '{"messages": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]}', encoding="utf-8"
    )
    source = Source(str(answer_first), "chat", 32)
    bare = compile_template("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", {}, "bare")
    dataset = prepare(source, TOKENIZER, bare, tmp_path / "cache")
    assert dataset.mask.tolist() == [False, *[True] * (len(dataset.mask) - 1)]


def test_overlong_samples_are_dropped_or_cut_and_counted(tmp_path: Path) -> None:
    rows = [
        [("user", "two"), ("assistant", "7")],
        [("user", "two"), ("assistant", " ".join(["apples"] * 50))],
        [("user", " ".join(["apples"] * 50)), ("assistant", "7")],
        [("user", "two")],
    ]
    path = tmp_path / "chat.jsonl"
    chats = [{"messages": [{"role": role, "content": content} for role, content in row]} for row in rows]
    path.write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    whole = [encode_chat(TOKENIZER, TEMPLATE, chat["messages"]) for chat in chats]
    seq_len = 40
    dropped = prepared(tmp_path, Source(str(path), "chat", seq_len))
    longest = max(len(tokens.ids) for tokens in whole)
    assert dropped.report == Report(1, len(whole[0].ids), sum(whole[0].mask), 0, 2, 1, longest=longest)
    cut = prepared(tmp_path, Source(str(path), "chat", seq_len, overlong="truncate"))
    n_targets = sum(whole[0].mask) + sum(whole[1].mask[:seq_len])
    assert cut.report == Report(2, len(whole[0].ids) + seq_len, n_targets, 1, 0, 1, longest=longest, n_cut_off=1)
    assert cut.tokens[cut.offsets[1] :].tolist() == whole[1].ids[:seq_len]
    assert (cut.tokens.dtype, cut.mask.dtype, cut.offsets.dtype) == (np.int32, np.bool_, np.int64)


def test_rows_that_are_cut_before_their_first_answer_are_counted_as_that(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    turns = [("x", "y"), ("x " * 99, "y"), ("x " * 80, "y")]
    rows = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in turns]
    rows.append({"messages": [{"role": "user", "content": "x"}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = Source(str(path), "chat", 20, overlong="truncate")
    report = prepared(tmp_path, source).report
    assert (report.n_samples, report.n_cut_off, report.n_without_target, report.n_truncated) == (1, 2, 1, 0)
    said = "2 left out: cut at seq_len = 20 before the first answer; raise data.train.seq_len, 1 without a target"
    assert said in describe(report, "train", source)
    path.write_text(json.dumps(rows[1]), encoding="utf-8")
    expected = r"\(1 samples: 1 cut at seq_len = 20 before the first answer\), expected .* that fits; raise seq_len$"
    with pytest.raises(InputError, match=f"leaves nothing to train on {expected}"):
        prepared(tmp_path, source)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [{"role": "user", "content": "x"}]}', r"\(1 samples: 1 without a trained token\), .*; check the columns"),
        (
            json.dumps({"messages": [{"role": "user", "content": "x " * 99}, {"role": "assistant", "content": "x"}]}),
            r"\(1 samples: 1 longer than 20 tokens\), expected an assistant's turn that fits; raise seq_len, or set overlong",
        ),
    ],
)
def test_data_without_a_target_is_refused(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(InputError, match=f"data: {re.escape(str(path))} leaves nothing to train on {message}"):
        prepared(tmp_path, Source(str(path), "chat", 20))
    assert not (tmp_path / "cache").exists()


def test_the_cache_is_used_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = instruct_file(tmp_path, [3, 4, 5])
    calls = []
    filter_documents = supervised.filter_documents
    monkeypatch.setattr(supervised, "filter_documents", lambda *args: [calls.append(1), filter_documents(*args)][1])

    def n_calls(source: Source, tokenizer: Tokenizer = TOKENIZER, template: Template = TEMPLATE) -> int:
        dataset = prepare(source, tokenizer, template, tmp_path / "cache")
        assert isinstance(dataset.tokens, np.memmap)
        return len(calls)

    source = Source(str(path), "instruct", 61)
    assert [n_calls(source), n_calls(source)] == [1, 1]
    assert n_calls(msgspec.structs.replace(source, packed=False)) == 1  # packing is no part of what is cached
    assert n_calls(msgspec.structs.replace(source, seq_len=60)) == 2
    assert n_calls(msgspec.structs.replace(source, overlong="truncate")) == 3
    assert n_calls(msgspec.structs.replace(source, columns={"output": "output"})) == 4
    assert n_calls(source, tokenizer=TOKENIZER._replace(fingerprint="other")) == 5
    assert n_calls(source, template=compile_template(CHATML.replace("role", "role "), {"eos_token": "</s>"}, "other")) == 6
    moved = path.rename(tmp_path / "moved.jsonl")
    assert n_calls(msgspec.structs.replace(source, path=str(moved))) == 6
    moved.write_text(moved.read_text(encoding="utf-8").replace("order", "pears").replace("the", "a"), encoding="utf-8")
    assert n_calls(msgspec.structs.replace(source, path=str(moved))) == 7
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.name.startswith(".")]


def test_a_cache_that_another_process_finished_first_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(str(instruct_file(tmp_path, [3, 4, 5])), "instruct", 61)
    first = prepared(tmp_path, source)
    monkeypatch.setattr(Path, "is_dir", lambda self: False)
    save = supervised.save
    monkeypatch.setattr(supervised, "save", lambda *args, **more: [monkeypatch.undo(), save(*args, **more)][1])
    second = prepared(tmp_path, source)
    assert second.tokens.tolist() == first.tokens.tolist()
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("name", ["tokens.npy", "mask.npy", "offsets.npy", "file.npy", "report.json"])
def test_a_damaged_cache_is_made_again(name: str, tmp_path: Path) -> None:
    source = Source(str(instruct_file(tmp_path, [3, 4, 5])), "instruct", 61)
    tokens = prepared(tmp_path, source).tokens.tolist()
    (file,) = (tmp_path / "cache").glob(f"*/{name}")
    content = file.read_bytes()
    file.write_bytes(content[:-3])
    assert prepared(tmp_path, source).tokens.tolist() == tokens
    assert file.read_bytes() == content


def test_a_cache_with_arrays_of_other_sizes_is_refused(tmp_path: Path) -> None:
    source = Source(str(instruct_file(tmp_path, [3, 4, 5])), "instruct", 61)
    prepared(tmp_path, source)
    (file,) = (tmp_path / "cache").glob("*/mask.npy")
    np.save(file, np.ones(2, dtype=np.bool_))
    (file.parent / CHECKSUMS).unlink()
    write_checksums(file.parent, file.parent.iterdir())
    with pytest.raises(InputError, match=r"is damaged \(arrays of \d+, 2, 4, 3 entries, not"):
        prepared(tmp_path, source)


INSTRUCT, CHAT, TEXT = (Source("f.jsonl", kind, 8) for kind in ("instruct", "chat", "text"))
RENAMED = Source("f.jsonl", "instruct", 8, columns={"instruction": "q", "input": "context", "output": "a"})


@pytest.mark.parametrize(
    ("source", "row", "expected"),
    [
        (INSTRUCT, {"instruction": "i", "output": "o", "more": 1}, [("user", "i"), ("assistant", "o")]),
        (INSTRUCT, {"instruction": "i", "input": "", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        (INSTRUCT, {"instruction": "i", "input": None, "output": "o"}, [("user", "i"), ("assistant", "o")]),
        (INSTRUCT, {"instruction": "i", "input": "x", "output": "o"}, [("user", "i\nx"), ("assistant", "o")]),
        (RENAMED, {"q": "i", "context": "x", "a": "o", "input": 3}, [("user", "i\nx"), ("assistant", "o")]),
        (CHAT, {"messages": [{"role": "user", "content": "a"}]}, [("user", "a")]),
        (CHAT, {"messages": [{"role": "assistant", "content": None}], "conversations": 3}, None),
        (
            CHAT,
            {"conversations": [{"from": r, "value": r} for r in ("system", "human", "gpt", "tool")]},
            [("system", "system"), ("user", "human"), ("assistant", "gpt"), ("tool", "tool")],
        ),
        (
            Source("f.jsonl", "chat", 8, columns={"messages": "dialog"}),
            {"dialog": [{"from": "human", "value": "a"}], "conversations": 3},
            [("user", "a")],
        ),
    ],
)
def test_messages(source: Source, row: dict[str, Any], expected: list[tuple[str, str]] | None) -> None:
    turns = messages(row, source, "f:1")
    assert turns == (row["messages"] if expected is None else [{"role": role, "content": text} for role, text in expected])


def test_other_keys_of_a_message_stay() -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert messages({"messages": [turn]}, CHAT, "f:1") == [turn]
    turn = {"from": "gpt", "value": "a", "weight": 0}
    assert messages({"conversations": [turn]}, CHAT, "f:1") == [{"role": "assistant", "content": "a", "weight": 0}]


@pytest.mark.parametrize(
    ("source", "line", "message"),
    [
        (INSTRUCT, b'{"instruction": "i"', "JSON|truncated"),
        (INSTRUCT, b"[1]", "holds a list, expected one JSON object a line; correct the line"),
        (INSTRUCT, b"[" * 100_000, "expected one JSON object a line; correct the line"),
        (INSTRUCT, b'{"instruction": "\xff"}', "holds the byte 0xff .*, expected one JSON object a line; save the file as UTF-8"),
        (
            INSTRUCT,
            b'{"output": "o"}',
            r'has no "instruction" \(only output\), expected a string; name the column with columns = \{',
        ),
        (INSTRUCT, b"{}", r'has no "instruction" \(only nothing\)'),
        (
            RENAMED,
            b'{"q": "i"}',
            r'has no "a" \(only q\), expected a string; name the column with columns = \{ output = "\.\.\." \}',
        ),
        (INSTRUCT, b'{"instruction": 3, "output": "o"}', '"instruction" is a int, expected a string; correct the line'),
        (INSTRUCT, b'{"instruction": "i", "input": {}, "output": "o"}', '"input" is a dict, expected a string; correct the line'),
        (CHAT, b'{"dialog": []}', r'has no "messages" \(only dialog\), expected a list of messages or a string; name the column'),
        (CHAT, b'{"messages": "hi"}', "holds a str, expected a list of messages; correct the line"),
        (CHAT, b'{"messages": []}', "holds a conversation of no messages, expected at least one; remove the line"),
        (CHAT, b'{"messages": [3]}', 'message 1 has no "role", expected an object with "role" and "content"; correct it'),
        (CHAT, b'{"conversations": [{"from": 3, "value": "a"}]}', 'message 1 has no "role", expected an object'),
        (
            CHAT,
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": 3}]}',
            'message 2 has a "content" of type int, expected a string; correct it',
        ),
        (CHAT, b'{"messages": [{"role": "user"}]}', "chat: .* fails with .*, expected it to render a conversation of user"),
        (TEXT, b'{"text": ["a"]}', '"text" is a list, expected a string; correct the line'),
    ],
)
def test_errors_name_file_and_line(source: Source, line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    good = {"instruction": "i", "output": "o", "q": "i", "a": "o", "text": "t", "messages": [{"role": "user", "content": "a"}]}
    path.write_bytes(json.dumps(good).encode() + b"\n\n" + line + b"\n")
    template = compile_template("{% for m in messages %}{{ m.content + '' }}<|im_end|>{% endfor %}", {}, "test")
    with pytest.raises(InputError, match=f"^data: {re.escape(str(path))}:3 .*({message})"):
        prepare(msgspec.structs.replace(source, path=str(path)), TOKENIZER, template, tmp_path / "cache")


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    for read in (lambda path: list(read_rows(path)), lambda path: prepared(tmp_path, Source(str(path), "chat", 8))):
        with pytest.raises(
            InputError,
            match=r"data: .*none.jsonl is no file, expected a jsonl, json, csv, tsv, parquet or arrow file; correct the path",
        ):
            read(tmp_path / "none.jsonl")
        (tmp_path / "empty.jsonl").write_text("\n \n", encoding="utf-8")
        with pytest.raises(InputError, match=r"data: .*empty.jsonl holds no line, expected one JSON object a line; correct"):
            read(tmp_path / "empty.jsonl")


def test_a_source_is_checked_when_it_is_decoded() -> None:
    good = {"path": "a", "format": "chat", "seq_len": 8}
    assert msgspec.convert(good, Source) == Source("a", "chat", 8)
    for change, message in [
        ({"seq_len": 0}, "seq_len"),
        ({"format": "csv"}, "format"),
        ({"lenght": 3}, "lenght"),
        ({"overlong": "split"}, "overlong"),
        (
            {"columns": {"mesages": "x"}},
            "columns names 'mesages', expected messages or tools or system or history or weight with "
            "format = 'chat'; did you mean 'messages'",
        ),
    ]:
        with pytest.raises(msgspec.ValidationError, match=message):
            msgspec.convert({**good, **change}, Source)
    with pytest.raises(
        InputError,
        match=r"data: columns names 'text', expected instruction or input or output or system or history or tools or "
        "weight with format",
    ):
        Source("a", "instruct", 8, columns={"text": "x"})


def test_prompts(tmp_path: Path) -> None:
    path = instruct_file(tmp_path, [3, 4])
    source = Source(str(path), "instruct", 8)
    read_prompts = prompts(source, TOKENIZER, TEMPLATE)
    rows = [messages(row, source, "") for _, row in read_rows(path)]
    assert [prompt.messages for prompt in read_prompts] == [row[:-1] for row in rows]
    assert [prompt.reference for prompt in read_prompts] == [row[-1]["content"] for row in rows]
    assert [prompt.ids for prompt in read_prompts] == [encode_prompt(TOKENIZER, TEMPLATE, row[:-1]) for row in rows]
    assert prompts(source, TOKENIZER, TEMPLATE, limit=1) == read_prompts[:1]
    assert [one[:2] for one in questions(source, TOKENIZER, TEMPLATE)] == [(one.ids, "") for one in read_prompts]


def test_rows_without_an_answer_are_prompts_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    ask = {"role": "user", "content": "a"}
    for answer in ([], [{"role": "assistant", "content": ""}]):
        path.write_text(json.dumps({"messages": [ask, *answer]}), encoding="utf-8")
        (prompt,) = prompts(Source(str(path), "chat", 8), TOKENIZER, TEMPLATE)
        assert prompt == (encode_prompt(TOKENIZER, TEMPLATE, [ask]), "", [], [ask])
    for row in ({"instruction": "a"}, {"instruction": "a", "output": None}):
        path.write_text(json.dumps(row), encoding="utf-8")
        (prompt,) = prompts(Source(str(path), "instruct", 8), TOKENIZER, TEMPLATE)
        assert prompt == (encode_prompt(TOKENIZER, TEMPLATE, [ask]), "", [], [ask])


def test_prompts_of_other_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('{"text": "a"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"f.jsonl has format 'text', expected instruct or chat; plain text asks for no answer"):
        prompts(Source(str(path), "text", 8), TOKENIZER, TEMPLATE)
    path.write_text('{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "a"}]}', encoding="utf-8")
    with pytest.raises(InputError, match=r"^data: .*f.jsonl:1 chat: chatml fails with"):
        prompts(Source(str(path), "chat", 8), TOKENIZER, TEMPLATE)


def test_folders_that_differ_in_their_family_alone_share_no_tokens(tmp_path: Path) -> None:
    """Llama's tokenizer writes no space after a special token where those of other families do."""
    path = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "pears"}]
    path.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    config = llama_config()
    del config["legacy"]
    found = {}
    for family in ("llama", "mistral"):
        folder = write_folder(sentencepiece_model(True), config)
        (folder / "config.json").write_text(json.dumps({"model_type": family}), encoding="utf-8")
        dataset = prepare(Source(str(path), "chat", 64), open_tokenizer(folder), TEMPLATE, tmp_path / "cache")
        found[family] = dataset.tokens.tolist()
        before = dataset.key
        (folder / "config.json").write_text(json.dumps({"model_type": family, "vocab_size": 7}), encoding="utf-8")
        assert cache_key(Source(str(path), "chat", 64), open_tokenizer(folder), TEMPLATE) == before  # as it changes no id
    assert found["llama"] != found["mistral"]
