"""The embedded demo: what its generators promise, that nothing held out leaks, and that the committed files are theirs."""

import itertools
import json
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import make as demo
import orders
import pairs
import texts
import words
from minitune import checkpoint, models
from minitune.io import paths
from minitune.text import tokenizer
from minitune.text.chat import encode_chat, open_template

seeds = st.integers(min_value=0, max_value=2**32)
MODEL = paths.locate("demo")
N_GRAM = 5  # words


@pytest.fixture(scope="module")
def pretraining() -> list[str]:
    return list(texts.pretraining_texts(demo.SEED, 2_000_000))


def read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def word_set(lines: Iterable[str]) -> set[str]:
    return {word for line in lines for word in re.findall(r"[a-z]+", line.lower())}


def n_grams(lines: Iterable[str], n: int) -> set[tuple[str, ...]]:
    split = (re.findall(r"\w+|\{\w+\}", line.lower()) for line in lines)
    return {tuple(line[i : i + n]) for line in split for i in range(len(line) - n + 1)}


@given(seeds, st.sampled_from([orders.TRAIN, orders.TASK, orders.HELDOUT]))
def test_every_field_of_the_answer_stands_in_the_note(seed: int, kind: orders.Words) -> None:
    for row in orders.rows(seed, "test", kind, 3):
        note, answer = row["input"], json.loads(row["output"])
        assert list(answer) == ["customer", "items", "city", "date"]
        assert answer["customer"] in note
        assert answer["city"] in note
        assert json.dumps(answer, separators=(",", ":")) == row["output"]
        for item, count in answer["items"].items():
            assert re.search(rf"\b({count}|{words.NUMBERS[count - 1]}) {item}\b", note, re.IGNORECASE)
            assert 1 <= count <= 20
        year, month, day = answer["date"].split("-")
        named = rf"\b{int(day)}\D.*{words.MONTHS[int(month) - 1]}|{words.MONTHS[int(month) - 1]} {int(day)}\b"
        assert answer["date"] in note or (re.search(named, note) and year in note)


@given(seeds, seeds)
def test_rows_are_a_function_of_the_seed(seed: int, other: int) -> None:
    first = orders.rows(seed, "test", orders.TRAIN, 5)
    assert first == orders.rows(seed, "test", orders.TRAIN, 5)
    assert first[:3] == orders.rows(seed, "test", orders.TRAIN, 3)
    assert (first == orders.rows(other, "test", orders.TRAIN, 5)) == (seed == other)


@given(seeds)
def test_texts_are_a_function_of_the_seed(seed: int) -> None:
    drawn = list(texts.pretraining_texts(seed, 3000))
    assert drawn == list(texts.pretraining_texts(seed, 3000))
    assert drawn[:2] == list(texts.pretraining_texts(seed, 6000))[:2]
    assert sum(map(len, drawn)) >= 3000 > sum(map(len, drawn[:-1]))


@given(seeds)
def test_invented_words_are_never_held_out(seed: int) -> None:
    rng = random.Random(seed)
    invented = [draw(rng) for _ in range(50) for draw in (words.invented, words.scrambled)]
    assert all(word.isalpha() and word.islower() for word in invented)
    assert not {form for word in invented for form in (word, f"{word}s")} & words.HELDOUT


def test_a_word_whose_plural_is_held_out_is_refused() -> None:
    assert words.held_out("naple")
    assert words.held_out("anvil")
    assert words.held_out("anvils")
    assert not words.held_out("lamp")


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (1, "1st"),
        (2, "2nd"),
        (3, "3rd"),
        (4, "4th"),
        (11, "11th"),
        (12, "12th"),
        (13, "13th"),
        (22, "22nd"),
        (30, "30th"),
        (31, "31st"),
    ],
)
def test_ordinal_suffix(n: int, text: str) -> None:
    assert f"{n}{orders.ordinal_suffix(n)}" == text


def test_listed() -> None:
    assert [orders.listed(list("abcd"[:n])) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


@given(seeds, seeds)
def test_pairs_are_a_function_of_the_seed(seed: int, other: int) -> None:
    drawn = pairs.pair_rows(seed, 8)
    assert drawn == pairs.pair_rows(seed, 8)
    assert (drawn == pairs.pair_rows(other, 8)) == (seed == other)
    for row, note in zip(drawn, orders.rows(seed, "pairs", orders.TASK, 8), strict=True):
        assert row["prompt"] == f"{note['instruction']}\n{note['input']}"
        assert row["chosen"] == note["output"]
        assert row["rejected"] != row["chosen"]


@pytest.mark.parametrize("fault", pairs.FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_spoils_most_answers_and_only_its_own_part(fault: Callable[..., dict[str, object]]) -> None:
    parts = {
        "wrong_count": {"items"},
        "wrong_day": {"date"},
        "lost_item": {"items"},
        "lost_word": {"items", "customer"},
        "wrong_name": {"customer", "city"},
        "swapped": {"customer", "city"},
    }
    rng = random.Random(0)
    answers = [json.loads(row["output"]) for row in orders.rows(0, "test", orders.TASK, 50)]
    n_spoiled = 0
    for right, other in itertools.pairwise(answers):
        wrong = fault(rng, right, other)
        n_spoiled += wrong != right
        spoiled = {key for key in right if wrong.get(key) != right[key]}
        assert spoiled <= parts[fault.__name__] if fault is not pairs.wrong_key else len(spoiled) == 1
        assert len(wrong) == 4
    assert n_spoiled >= 25


def test_committed_rows_are_those_of_the_generator() -> None:
    assert read_jsonl(MODEL.parent / "orders-train.jsonl") == demo.train_rows()
    assert read_jsonl(MODEL.parent / "orders-heldout.jsonl") == demo.heldout_rows()
    assert read_jsonl(MODEL.parent / "orders-pairs.jsonl") == demo.preference_rows()
    assert len(demo.heldout_rows()) >= 200


def test_no_heldout_word_is_trained(pretraining: list[str]) -> None:
    rows = [*demo.train_rows(), *demo.preference_rows()]
    trained = word_set([*pretraining, *(text for row in rows for text in row.values())])
    assert not trained & words.HELDOUT
    used = word_set(row["output"] for row in demo.heldout_rows()) - {"customer", "items", "city", "date", "mr", "ms", "dr"}
    assert used <= words.HELDOUT  # so that every name, item and city of the held-out rows is covered


def test_no_heldout_note_or_phrasing_is_trained(pretraining: list[str]) -> None:
    rows = demo.train_rows()
    preferences = demo.preference_rows()
    preferred = [row["prompt"].removeprefix(f"{orders.INSTRUCTION}\n") for row in preferences]
    trained = [*pretraining, *(row["input"] for row in rows), *preferred]
    assert not {row["input"] for row in demo.heldout_rows()} & set(trained)
    assert not {row["input"] for row in rows} & set(preferred)
    answers = {row["output"] for row in rows} | {row[side] for row in preferences for side in ("chosen", "rejected")}
    assert not {row["output"] for row in demo.heldout_rows()} & answers
    phrasings = [orders.PHRASINGS, texts.STORY_OPENINGS, texts.STORY_MIDDLES, texts.STORY_ENDINGS, texts.VISITS, texts.SHELVES]
    known = n_grams((line for kind in phrasings for line in kind), N_GRAM)
    shared = n_grams(orders.HELDOUT_PHRASINGS, N_GRAM) & known
    assert not shared
    assert not set(orders.HELDOUT_REMARKS) & {*orders.REMARKS, ""} - {""}
    # no training note has the shape of a held-out phrasing, whatever stands in its blanks
    shapes = [re.compile(re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(phrasing))) for phrasing in orders.HELDOUT_PHRASINGS]
    wordy = [shape for shape, p in zip(shapes, orders.HELDOUT_PHRASINGS, strict=True) if len(re.findall(r"\b[a-z]+\b", p)) > 8]
    assert len(wordy) >= 5
    assert not [line for line in trained if any(shape.search(line) for shape in wordy)]


def test_no_order_is_json_in_the_pretraining_text(pretraining: list[str]) -> None:
    whole = "\n".join(pretraining)
    assert '"shelf":' in whole
    assert '"items":' in whole  # on shelves: what the base knows is the keys, one or two at a time
    assert '"customer":' not in whole
    objects = re.findall(r"\{[^{}]*(?:\{[^{}]*\})?[^{}]*\}", whole)
    assert max(len({"items", "city", "date"} & set(re.findall(r'"(\w+)":', one))) for one in objects) == 1
    assert orders.INSTRUCTION not in whole


def test_committed_folder_is_small() -> None:
    files = [path for path in MODEL.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files if path.parent == MODEL) <= 6e6
    assert (MODEL.parent / "orders-train.jsonl").stat().st_size <= 1.5e6
    assert (MODEL.parent / "orders-pairs.jsonl").stat().st_size <= 0.6e6
    params = checkpoint.load_params(MODEL, models.open(MODEL).shapes())
    assert sum(w.numel() for w in params.values()) <= 3_000_000
    assert {w.dtype for w in params.values()} == {torch.bfloat16}
    assert models.open(MODEL) == models.open_config(paths.locate("configs/models/demo.toml"))


def test_tokenizer_is_what_the_generators_make(pretraining: list[str]) -> None:
    text = tokenizer.open_tokenizer(MODEL)
    made = demo.train_tokenizer(demo.tokenizer_texts())
    assert made == (MODEL / "tokenizer.model").read_bytes()
    assert json.loads((MODEL / "tokenizer_config.json").read_text(encoding="utf-8")) == demo.tokenizer_config()
    for line in [*pretraining[:300], *(row["input"] for row in demo.heldout_rows())]:
        ids = text.encode(line, parse_special=True)
        assert text.decode(ids, skip_special=False) == line
        assert text.special["<unk>"] not in ids


def test_a_word_has_the_same_pieces_wherever_it_stands() -> None:
    text = tokenizer.open_tokenizer(MODEL)
    for row in demo.heldout_rows():
        city = json.loads(row["output"])["city"]
        alone = text.encode(city, parse_special=False)
        for whole in (f"in {city}.", f'{{"city":"{city}","date"', f"{city} is"):
            ids = text.encode(whole, parse_special=False)
            assert any(ids[i : i + len(alone)] == alone for i in range(len(ids)))


def test_generation_stops_at_the_turn_that_is_trained() -> None:
    text = tokenizer.open_tokenizer(MODEL)
    turn = encode_chat(
        text, open_template(MODEL, text), [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )
    assert text.decode(turn.ids, skip_special=False) == "<s><|user|>a<|end|><|assistant|>b<|end|>"
    assert [text.decode([i], skip_special=False) for i, m in zip(turn.ids, turn.mask, strict=True) if m] == ["b", "<|end|>"]
    stops = json.loads((MODEL / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert text.special["<|end|>"] in stops


def test_transformers_reads_the_folder() -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(str(MODEL)), tokenizer.open_tokenizer(MODEL)
    row = demo.heldout_rows()[0]
    ids = ours.encode("<s>" + row["input"] + "\n" + row["output"], parse_special=True)
    assert theirs("<s>" + row["input"] + "\n" + row["output"], add_special_tokens=False)["input_ids"] == ids
    model = transformers.AutoModelForCausalLM.from_pretrained(str(MODEL), dtype=torch.float32)
    params = {name: w.float() for name, w in checkpoint.load_params(MODEL, models.open(MODEL).shapes()).items()}
    logits = models.open(MODEL).forward(params, torch.tensor([ids]))
    with torch.no_grad():
        torch.testing.assert_close(logits, model(torch.tensor([ids])).logits, rtol=1e-4, atol=1e-4)
