"""Preference data: the last answer alone is trained, pairs stay together, an epoch is a permutation, errors name the line."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitune.data import preference
from minitune.data.cursor import Cursor
from minitune.data.preference import PairSet, batches, select, take
from minitune.data.preference_rows import conversations
from minitune.data.prompts import prompts
from minitune.data.source import Source
from minitune.data.supervised import prepare
from minitune.errors import InputError
from minitune.io import paths
from minitune.text import tokenizer
from minitune.text.chat import CHATML, encode_chat, encode_prompt, open_template
from minitune.text.template import Template, compile_template
from minitune.text.tokenizer import Tokenizer
from minitune.types import Batch, Pairs, UnpairedBatch
from support.tokenizers import WORDS, llama

TINY = llama()[0], compile_template(CHATML, {"eos_token": "</s>"}, "chatml")
DEMO_TOKENIZER = tokenizer.open_tokenizer(paths.locate("demo"))
DEMO = DEMO_TOKENIZER, open_template(paths.locate("demo"), DEMO_TOKENIZER)
SPEAKERS = pytest.mark.parametrize("speaker", [TINY, DEMO], ids=["chatml", "demo"])
Speaker = tuple[Tokenizer, Template]

text = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)
texts = st.lists(st.tuples(text, text, text), min_size=1, max_size=9)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def prepared(folder: Path, rows: Iterable[Any], speaker: Speaker = TINY, **rules: Any) -> tuple[Source, PairSet]:
    """The rows as a file, and the set that is made of it."""
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = Source(str(path), **{"format": "pairs", "seq_len": 256, **rules})
    return source, preference.prepare(source, *speaker, folder / "cache")


def written(batch: Batch, speaker: Speaker = TINY) -> list[tuple[str, str]]:
    """(all of a row, what is trained of it) as text; checks that rows are one document each, padded on the right."""
    texts = []
    for tokens, segment_ids, mask in zip(*batch, strict=True):
        length = int(segment_ids.sum())
        assert segment_ids.tolist() == [1] * length + [0] * (len(tokens) - length)
        assert tokens[length:].eq(0).all()
        assert not mask[length:].any()
        decode = speaker[0].decode
        texts.append((decode(tokens[:length].tolist(), skip_special=False), decode(tokens[mask].tolist(), skip_special=False)))
    return texts


def chat(speaker: Speaker, *turns: dict[str, str]) -> str:
    return speaker[0].decode(encode_chat(*speaker, list(turns)).ids, skip_special=False)


def end(speaker: Speaker) -> str:
    return "<|end|>" if speaker is DEMO else "<|im_end|>"


@SPEAKERS
@given(rows=texts)
def test_what_is_trained_is_the_answer_and_its_end_of_turn(
    speaker: Speaker, rows: list[tuple[str, str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [(prompt, chosen, f"{chosen} {rejected}") for prompt, chosen, rejected in rows]
    named = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
    source, pairset = prepared(tmp_path_factory.mktemp("pairs"), named, speaker)
    (batch,) = batches(pairset, source, len(rows))
    assert isinstance(batch, Pairs)
    assert batch.chosen.tokens.shape == batch.rejected.tokens.shape
    assert batch.chosen.tokens.shape[1] == np.diff(pairset.answers.offsets).max()
    assert [x.dtype for x in batch.chosen] == [torch.int64, torch.int32, torch.bool]
    for side, half in ((1, batch.chosen), (2, batch.rejected)):
        assert written(half, speaker) == [
            (chat(speaker, user(row[0]), assistant(row[side])), row[side] + end(speaker)) for row in rows
        ]
    for i, row in enumerate(rows):
        for side in (0, 1):
            answer = pairset.answers.at(2 * i + side)
            whole = encode_chat(*speaker, [user(row[0]), assistant(row[1 + side])])
            asked = encode_prompt(*speaker, [user(row[0])])
            assert answer.tokens.tolist() == whole.ids
            assert whole.ids[: len(asked)] == asked
            assert answer.mask.tolist() == [n >= len(asked) and trained for n, trained in enumerate(whole.mask)]
            assert answer.mask.argmax() == len(asked)


@SPEAKERS
def test_only_the_last_answer_is_trained(speaker: Speaker, tmp_path: Path) -> None:
    front = [user("two"), assistant("apples"), user("7")]
    row = {"chosen": [*front, assistant("pears")], "rejected": [*front, assistant("apples"), user("two"), assistant("7")]}
    source, pairset = prepared(tmp_path, [row], speaker)
    (batch,) = batches(pairset, source, 1)
    assert isinstance(batch, Pairs)
    assert written(batch.chosen, speaker) == [(chat(speaker, *row["chosen"]), "pears" + end(speaker))]
    assert written(batch.rejected, speaker) == [(chat(speaker, *row["rejected"]), "7" + end(speaker))]


def test_an_answer_right_behind_another_one_is_told_from_it(tmp_path: Path) -> None:
    bare = compile_template("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", {}, "bare")
    front = [user("two"), assistant("apples")]
    row = {"chosen": [*front, assistant("pears")], "rejected": [*front, assistant("7")]}
    source, pairset = prepared(tmp_path, [row], (TINY[0], bare))
    (batch,) = batches(pairset, source, 1)
    assert isinstance(batch, Pairs)
    assert [trained for _, trained in written(batch.chosen) + written(batch.rejected)] == ["pears<|im_end|>", "7<|im_end|>"]


PAIRS, UNPAIRED = Source("f.jsonl", "pairs", 64), Source("f.jsonl", "unpaired", 64)
RENAMED = Source("f.jsonl", "pairs", 64, columns={"prompt": "q", "chosen": "good", "rejected": "bad"})
Q, A, B, S = user("q"), assistant("a"), assistant("b"), {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("source", "row", "expected"),
    [
        (PAIRS, {"prompt": "q", "chosen": "a", "rejected": "b", "label": 3}, [([Q, A], True), ([Q, B], False)]),
        (PAIRS, {"prompt": [S, Q], "chosen": [A], "rejected": [B]}, [([S, Q, A], True), ([S, Q, B], False)]),
        (PAIRS, {"prompt": [S, Q], "chosen": "a", "rejected": "b"}, [([S, Q, A], True), ([S, Q, B], False)]),
        (PAIRS, {"prompt": [S], "chosen": [Q, A], "rejected": [Q, B]}, [([S, Q, A], True), ([S, Q, B], False)]),
        (PAIRS, {"prompt": "q", "chosen": [A], "rejected": [B]}, [([Q, A], True), ([Q, B], False)]),
        (PAIRS, {"chosen": [S, Q, A], "rejected": [S, Q, B]}, [([S, Q, A], True), ([S, Q, B], False)]),
        # the prompt is there twice in some data sets
        (PAIRS, {"prompt": "q", "chosen": [S, Q, A], "rejected": [S, Q, B]}, [([S, Q, A], True), ([S, Q, B], False)]),
        (PAIRS, {"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]}, [([Q, A], True), ([Q, B], False)]),
        (
            PAIRS,
            {"chosen": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "rejected": [Q, B]},
            [([Q, A], True), ([Q, B], False)],
        ),
        (RENAMED, {"q": "q", "good": "a", "bad": "b", "prompt": 3}, [([Q, A], True), ([Q, B], False)]),
        (UNPAIRED, {"prompt": "q", "completion": "a", "label": False}, [([Q, A], False)]),
        (UNPAIRED, {"prompt": [Q], "completion": [A], "label": True, "chosen": 3}, [([Q, A], True)]),
        (UNPAIRED, {"completion": [S, Q, A], "label": True}, [([S, Q, A], True)]),
        (UNPAIRED, {"prompt": "q", "chosen": "a", "rejected": "b"}, [([Q, A], True), ([Q, B], False)]),
    ],
)
def test_conversations(source: Source, row: dict[str, Any], expected: list[Any]) -> None:
    assert conversations(row, source, "f:1") == expected


@pytest.mark.parametrize(
    ("source", "row", "message"),
    [
        (
            PAIRS,
            {"prompt": "q", "chosen": "a"},
            r'has no "rejected" \(only prompt, chosen\), expected a string or a list of messages',
        ),
        (PAIRS, {"chosen": "a", "rejected": "b"}, r'has no "prompt" .*name the column with columns = \{ prompt = "\.\.\." \}'),
        (PAIRS, {"prompt": 3, "chosen": "a", "rejected": "b"}, '"prompt" is a int, expected a string or a list of messages'),
        (PAIRS, {"prompt": "q", "chosen": 3, "rejected": "b"}, '"chosen" is a int, expected a string or a list of messages'),
        (PAIRS, {"prompt": "q", "chosen": [], "rejected": "b"}, "holds a conversation of no messages, expected at least one"),
        (PAIRS, {"chosen": [Q, A], "rejected": [S, Q, B]}, "has answers to different prompts, expected one at the start of both"),
        (PAIRS, {"chosen": [A], "rejected": [A]}, "has an answer to nothing, expected a prompt before it; correct the line"),
        (PAIRS, {"chosen": [Q], "rejected": [Q, B]}, "ends with a message of 'user', expected an answer of 'assistant'"),
        (PAIRS, {"prompt": [3], "chosen": "a", "rejected": "b"}, 'message 1 has no "role"'),
        (RENAMED, {"q": "q", "good": "a"}, r'has no "bad"'),
        (UNPAIRED, {"prompt": "q", "completion": "a"}, r'has no "label" \(only prompt, completion\), expected true or false'),
        (
            UNPAIRED,
            {"prompt": "q", "completion": "a", "label": 2},
            '"label" is 2, expected true or false, or 1 or 0; correct the line',
        ),
        (UNPAIRED, {"prompt": "q"}, r'has no "label"|has no "completion"'),
        (PAIRS, {"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "chat: chatml fails with"),
    ],
)
def test_errors_name_file_and_line(source: Source, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"prompt": "q", "chosen": "a", "rejected": "b", "completion": "a", "label": True, "q": "q", "good": "a", "bad": "b"}
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"^data: {re.escape(str(path))}:3 .*({message})"):
        preference.prepare(msgspec.structs.replace(source, path=str(path)), *TINY, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_formats_are_not_mixed_up(tmp_path: Path) -> None:
    for read in (lambda source: prepare(source, *TINY, tmp_path), lambda source: prompts(source, *TINY)):
        with pytest.raises(InputError, match=r"data: f.jsonl has format 'pairs', expected instruct(,| or) chat"):
            read(PAIRS)
    with pytest.raises(InputError, match=r"data: f.jsonl has format 'text', expected pairs or unpaired; a row there is no pair"):
        preference.prepare(Source("f.jsonl", "text", 8), *TINY, tmp_path)
    with pytest.raises(
        InputError,
        match="columns names 'messages', expected prompt or chosen or rejected or tools or system or history with format",
    ):
        Source("f.jsonl", "pairs", 8, columns={"messages": "x"})


def test_pairs_are_cut_dropped_and_left_out_as_a_whole(tmp_path: Path) -> None:
    long = " ".join(["apples"] * 50)
    rows = [
        {"prompt": "two", "chosen": "7", "rejected": "two"},
        {"prompt": "two", "chosen": "7", "rejected": long},
        {"prompt": "two", "chosen": long, "rejected": long + " 7"},  # the same when cut
        {"prompt": long, "chosen": "7", "rejected": "two"},
        {"prompt": "two", "chosen": "7", "rejected": "7"},
    ]
    _, pairset = prepared(tmp_path, rows, seq_len=40)
    assert pairset.report[:2] == (1, pairset.answers.offsets[-1])
    assert pairset.report[3:7] == (0, 3, 0, 1)
    _, pairset = prepared(tmp_path, rows, seq_len=40, overlong="truncate")
    assert pairset.report[3:7] == (1, 0, 0, 2)
    assert pairset.report.n_cut_off == 1
    assert np.diff(pairset.answers.offsets).tolist()[3] == 40
    assert pairset.report.n_target_tokens == pairset.answers.mask.sum()
    with pytest.raises(InputError, match=r"leaves nothing to train on \(1 samples: 1 with two answers that are the same"):
        prepared(tmp_path, rows[-1:])


def numbered(n: int) -> list[dict[str, str]]:
    return [{"prompt": f"two {i}", "chosen": f"apples {i}", "rejected": f"pears {i} {i}"} for i in range(n)]


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=9), seed=st.integers(0, 3))
def test_resuming_from_any_cursor_gives_the_same_batches(
    sizes: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    n = 11
    folder = tmp_path_factory.getbasetemp() / "numbered"
    folder.mkdir(exist_ok=True)
    source, pairset = prepared(folder, numbered(n))
    known = np.arange(2.0 * n, dtype=np.float32).reshape(n, 2)
    whole, _ = take(pairset, Cursor(0, 0), sum(sizes), source, seed, known)
    assert isinstance(whole, Pairs)
    pairs, said, cursor = [], [], Cursor(0, 0)
    for size in sizes:
        fresh = preference.prepare(source, *TINY, folder / "cache")
        batch, cursor = take(fresh, Cursor(*json.loads(json.dumps(cursor))), size, source, seed, known)
        assert isinstance(batch, Pairs)
        assert isinstance(batch.reference, torch.Tensor)
        pairs += zip(written(batch.chosen), written(batch.rejected), strict=True)
        said += batch.reference.tolist()
    assert pairs == list(zip(written(whole.chosen), written(whole.rejected), strict=True))
    assert isinstance(whole.reference, torch.Tensor)
    assert said == whole.reference.tolist()
    for (chosen, _), (left, _) in pairs:  # the halves belong together, and the reference to them
        assert chosen.replace("apples", "") == left.replace("pears", "").replace(f" {(i := _number(chosen))} {i}", f" {i}")
    assert [row[0] / 2 for row in said] == [_number(chosen) for (chosen, _), _ in pairs]
    numbers = [_number(chosen) for (chosen, _), _ in pairs]
    for start in range(0, len(numbers) - n + 1, n):
        assert sorted(numbers[start : start + n]) == list(range(n))
    assert (cursor.epoch * n + cursor.row, cursor.row < n) == (sum(sizes), True)


def _number(written: str) -> int:
    return int(re.findall(r"\d+", written)[-1])


def test_epochs_and_seeds_differ(tmp_path: Path) -> None:
    _, pairset = prepared(tmp_path, numbered(40))
    orders = [pairset.order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_evaluation_reads_the_file_in_order(tmp_path: Path) -> None:
    source, pairset = prepared(tmp_path, numbered(7))
    known = np.arange(14, dtype=np.float32).reshape(7, 2)
    read_batches = list(batches(pairset, source, 3, known))
    assert [len(batch.reference) for batch in read_batches] == [3, 3, 1]
    assert torch.cat([torch.as_tensor(batch.reference) for batch in read_batches]).tolist() == known.tolist()
    assert [_number(row) for batch in read_batches for row, _ in written(batch[0])] == list(range(7))


@SPEAKERS
@given(rows=st.lists(st.tuples(st.sampled_from(WORDS[:4]), text, st.booleans()), min_size=2, max_size=12))
def test_a_mismatched_answer_is_the_one_to_another_prompt(
    speaker: Speaker, rows: list[tuple[str, str, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    named = [dict(zip(("prompt", "completion", "label"), row, strict=True)) for row in rows]
    folder = tmp_path_factory.mktemp("unpaired")
    if len({prompt for prompt, _, _ in rows}) == 1:
        with pytest.raises(InputError, match=r"data: .*pairs.jsonl has answers to one prompt only, expected two or more: each"):
            prepared(folder, named, speaker, format="unpaired")
        return
    source, pairset = prepared(folder, named, speaker, format="unpaired")
    (batch,) = batches(pairset, source, len(rows))
    assert isinstance(batch, UnpairedBatch)
    assert batch.desirable.tolist() == [label for _, _, label in rows]
    assert batch.reference == ()
    assert written(batch.answers, speaker) == [
        (chat(speaker, user(prompt), assistant(answer)), answer + end(speaker)) for prompt, answer, _ in rows
    ]
    assert pairset.mismatched is not None
    partners = [rows[j] for j in pairset.mismatched]
    assert all(prompt != other for (prompt, _, _), (other, _, _) in zip(rows, partners, strict=True))
    expected = [(prompt, answer) for (prompt, _, _), (_, answer, _) in zip(rows, partners, strict=True)]
    assert written(batch.mismatched, speaker) == [
        (chat(speaker, user(prompt), assistant(answer)), answer + end(speaker)) for prompt, answer in expected
    ]
    one, _ = take(pairset, Cursor(0, 0), 1, source, 0)  # a batch of one has a mismatched answer too
    assert isinstance(one, UnpairedBatch)
    assert written(one.mismatched)[0] in written(batch.mismatched)


def test_a_mismatched_answer_half_the_data_away_or_next(tmp_path: Path) -> None:
    rows = [{"prompt": p, "completion": "7", "label": True} for p in ("two", "two", "apples", "two", "pears", "two")]
    _, pairset = prepared(tmp_path, rows, format="unpaired")
    assert pairset.mismatched is not None
    assert pairset.mismatched.tolist() == [4, 4, 5, 2, 1, 2]


def test_unpaired_answers_are_cut_at_seq_len_and_keep_their_labels(tmp_path: Path) -> None:
    long = " ".join(["apples"] * 25)
    rows = [
        {"prompt": "two " * 90, "completion": "7", "label": True},  # leaves nothing to train when cut
        {"prompt": "two", "completion": long, "label": False},
        {"prompt": long, "chosen": "7", "rejected": "two"},
    ]
    source, pairset = prepared(tmp_path, rows, format="unpaired", seq_len=60, overlong="truncate")
    (batch,) = batches(pairset, source, 4)
    assert isinstance(batch, UnpairedBatch)
    assert batch.desirable.tolist() == [False, True, False]
    assert (pairset.report.n_cut_off, pairset.report.n_without_target) == (1, 0)
    assert batch.mismatched.tokens.shape[1] == 60
    assert batch.mismatched.loss_mask.any(1).all()
    longest = pairset._replace(mismatched=np.array([1, 0, 0]))
    assert int(select(longest, [1], source)[1].segment_ids.sum()) == 60


def test_the_cache_is_used_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    filter_documents = preference.filter_documents
    monkeypatch.setattr(preference, "filter_documents", lambda *args: [calls.append(1), filter_documents(*args)][1])
    source, pairset = prepared(tmp_path, numbered(3))
    assert isinstance(pairset.answers.tokens, np.memmap)
    again = preference.prepare(source, *TINY, tmp_path / "cache")
    assert (len(calls), again.key) == (1, pairset.key)
    _, unpaired = prepared(tmp_path, numbered(3), format="unpaired")
    assert (len(calls), unpaired.report.n_samples) == (2, 6)
    assert unpaired.key != pairset.key


@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "report.json", "desirable.npy", "mismatched.npy"])
@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b"", None], ids=["cut", "empty", "gone"])
def test_a_damaged_cache_is_made_again(name: str, damage: Callable[[bytes], bytes] | None, tmp_path: Path) -> None:
    source, before = prepared(tmp_path, numbered(3), format="unpaired")
    (file,) = (tmp_path / "cache").glob(f"*/{name}")
    content = file.read_bytes()
    file.unlink()
    if damage is not None:
        file.write_bytes(damage(content))
    after = preference.prepare(source, *TINY, tmp_path / "cache")
    assert after.answers.tokens.tolist() == before.answers.tokens.tolist()
    assert file.read_bytes() == content


def test_the_demo_has_pairs(tmp_path: Path) -> None:
    lines = paths.locate("demo/orders-pairs.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 1500
    longest = sorted(lines, key=len)[-50:]
    _, pairset = prepared(tmp_path, map(json.loads, longest), DEMO)
    assert pairset.report.n_samples == 50
    assert pairset.report[3:7] == (0, 0, 0, 0)
