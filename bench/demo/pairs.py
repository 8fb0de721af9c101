"""The demo's preferences: a note, the JSON that it calls for, and JSON with the faults that a hasty reader makes.

The notes are of the kind that the main job trains on, from a stream of their own.
"""

import json
import random
from collections.abc import Callable
from typing import Any

from minitune import seeds
from orders import TASK, rows

Answer = dict[str, Any]

KEYS = (("customer", "name"), ("items", "goods"), ("city", "town"), ("date", "day"))
TAILS = (" Thank you.", " Done.", " That is the order.", "}", " Please check.", "\n\n" + '{"customer":"')


def pair_rows(seed: int, n_rows: int) -> list[dict[str, str]]:
    """n_rows rows of the `pairs` format, a pure function of its arguments; the rejected answer has one fault or two."""
    rng = random.Random(seeds.derive(seed, "demo", "faults"))
    notes = rows(seed, "pairs", TASK, n_rows)
    return [
        {
            "prompt": f"{row['instruction']}\n{row['input']}",
            "chosen": row["output"],
            "rejected": rejected(rng, row["output"], notes[i - 1]["output"]),
        }
        for i, row in enumerate(notes)
    ]


def rejected(rng: random.Random, right: str, other: str) -> str:
    """The right answer with one fault or, a third of the time, two; `other` is the answer to another note."""
    wrong = right
    while wrong == right:  # a fault may find nothing to spoil, and two may undo each other
        answer = json.loads(right)
        for fault in sorted(rng.sample(FAULTS, rng.choice((1, 1, 2))), key=FAULTS.index):
            answer = fault(rng, answer, json.loads(other))
        wrong = json.dumps(answer, separators=(",", ":")) + (rng.choice(TAILS) if rng.random() < 0.1 else "")
    return wrong


def wrong_count(rng: random.Random, answer: Answer, other: Answer) -> Answer:
    """Another number for one item: a digit lost, doubled or changed."""
    name = rng.choice(list(answer["items"]))
    n = answer["items"][name]
    counts = [count for count in (n % 10, n // 10, 10 * n, n + 1, n - 1, n + 10) if count > 0]
    return {**answer, "items": {**answer["items"], name: rng.choice(counts)}}


def wrong_day(rng: random.Random, answer: Answer, other: Answer) -> Answer:
    """Day and month in each other's place, or the year next door."""
    year, month, day = answer["date"].split("-")
    swapped = f"{year}-{day}-{month}"
    return {**answer, "date": rng.choice((swapped, swapped, f"{int(year) + rng.choice((-1, 1))}-{month}-{day}"))}


def lost_item(rng: random.Random, answer: Answer, other: Answer) -> Answer:
    """One of several items left out."""
    dropped = rng.choice(list(answer["items"])) if len(answer["items"]) > 1 else None
    return {**answer, "items": {name: n for name, n in answer["items"].items() if name != dropped}}


def lost_word(rng: random.Random, answer: Answer, other: Answer) -> Answer:
    """An item without its adjective, a customer without title."""
    if rng.random() < 0.5:
        return {**answer, "customer": answer["customer"].split()[-1]}
    return {**answer, "items": {name.split()[-1]: n for name, n in answer["items"].items()}}


def wrong_key(rng: random.Random, answer: Answer, other: Answer) -> Answer:
    """A key that means the same but is not what was asked for."""
    key, instead = rng.choice(KEYS)
    return {instead if name == key else name: value for name, value in answer.items()}


def wrong_name(rng: random.Random, answer: Answer, other: Answer) -> Answer:
    """The customer or the city of another note."""
    key = rng.choice(("customer", "city"))
    return {**answer, key: other[key]}


def swapped(rng: random.Random, answer: Answer, other: Answer) -> Answer:
    """Customer and city in each other's place."""
    return {**answer, "customer": answer["city"], "city": answer["customer"]}


FAULTS: tuple[Callable[[random.Random, Answer, Answer], Answer], ...] = (
    wrong_count,
    wrong_day,
    lost_item,
    lost_word,
    wrong_name,
    swapped,
    wrong_key,  # the last, as the others look for the right keys
)
