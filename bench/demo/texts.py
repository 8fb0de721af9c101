"""The pretraining text: prose about small orders, and exercises in what an extractor has to know.

Exercises: number words and digits, written dates and ISO dates, copying, lists as JSON, and JSON of other kinds (people,
weather, trains, shelves). There is no order as JSON anywhere; a test holds all of it apart from the held-out words and phrasings.
"""

import json
import random
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any

import words
from minitune import seeds
from orders import TRAIN, day, item, listed, order, person, pick, upper_first, written_count, written_day

KIND = TRAIN._replace(invented=0.85)

STORY_OPENINGS = (
    "It was {date} when {customer} walked into the shop and looked for {items}.",
    "{customer} lives in {city} and often buys {items} for the house.",
    "The clerk counted {items} for {customer} and wrote {date} on the label.",
    "In {city} there is a small shop. On {date} it sold {items} to {customer}.",
    "{customer} came to {city} on {date} with an empty bag and went home with {items}.",
    "Nobody knew why {customer} had to have {items} before {date}.",
    "An order came in from {city} this morning. It was {customer} again, and again it was about {items}.",
    "There was a letter from {customer} in {city}: please keep {items} for me until {date}.",
)
STORY_MIDDLES = (
    "{first} paid at once and asked for a receipt.",
    "The parcel with {items} went to {city} with the first train.",
    "The clerk put {items} into a box and wrote {customer} on it.",
    "The book says {date}, {customer}, {items}.",
    "That was in {city}, on {date}.",
    "{first} was happy, because {items} had been hard to find.",
    "A cart took everything to {city}, where {customer} was waiting.",
    "The price of {items} was fair.",
    "On {date} the box was opened in {city}. Inside were {items}.",
    "{customer} looked at {items} for a long time.",
    "Somebody in {city} had sent {items} too early.",
    "Order after order came in, and {first} counted the items.",
    "What a city! What a date! {first} was tired of every order.",
    "The road to {city} was closed, so {first} had to wait until {date}.",
)
STORY_ENDINGS = (
    "In the end all was well.",
    "{first} told the story to everyone in {city}.",
    "The shop closed early that day.",
    "{customer} came back a week later and bought more.",
    "Since then {first} has been a good customer.",
    "{date} was a good day for the shop.",
)
WEATHER = ("rain", "snow", "fog", "wind", "sun", "hail", "frost", "storm", "clouds", "drizzle")
JOBS = ("baker", "teacher", "driver", "nurse", "farmer", "painter", "tailor", "miner", "clerk", "singer", "pilot", "cook")


def chat(*turns: str) -> str:
    """User and assistant in turn, between the markers that the tokenizer knows as single pieces."""
    return "".join(f"<|{('user', 'assistant')[i % 2]}|>{turn}<|end|>" for i, turn in enumerate(turns))


def as_json(value: Any) -> str:
    """Compact JSON; dates in ISO form."""
    return json.dumps(value, default=str, separators=(",", ":"))


def story(rng: random.Random) -> str:
    """Three to six sentences around one order; the same counts and dates come back in other written forms."""
    drawn = order(rng, KIND)
    sentences = [
        rng.choice(STORY_OPENINGS),
        *rng.sample(STORY_MIDDLES, rng.randint(1, 4)),
        *rng.sample(STORY_ENDINGS, rng.randint(0, 1)),
    ]
    return " ".join(
        upper_first(
            sentence.format(
                customer=drawn.customer,
                first=drawn.customer.split()[0],
                items=listed([f"{written_count(rng, n)} {name}" for name, n in drawn.items.items()]),
                city=drawn.city,
                date=written_day(rng, drawn.date),
            )
        )
        for sentence in sentences
    )


def number_facts(rng: random.Random) -> str:
    """Numbers in letters and in digits, side by side."""
    numbers = [rng.randint(1, 20) for _ in range(rng.randint(2, 8))]
    letters = [words.NUMBERS[n - 1] for n in numbers]
    mixed = [written_count(rng, n) for n in numbers]
    things = [f"{written_count(rng, n)} {item(rng, KIND, n)}" for n in numbers[:3]]
    return rng.choice(
        (
            ", ".join(f"{name} ({n})" for name, n in zip(letters, numbers, strict=True)),
            ", ".join(f"{n} is {name}" for name, n in zip(letters, numbers, strict=True)),
            ". ".join(f"{name.capitalize()} is {n}" for name, n in zip(letters, numbers, strict=True)),
            chat("Digits:\n" + ", ".join(mixed), as_json(numbers), "In letters?", as_json(letters)),
            chat("How many?\n" + upper_first(things[0]) + ".", str(numbers[0]), "Letters?", letters[0]),
            chat("How many are there?\n" + upper_first(listed(things)) + ".", as_json(numbers[:3])),
        )
    )


def date_facts(rng: random.Random) -> str:
    """Dates in several written forms and as ISO dates."""
    days = [day(rng) for _ in range(rng.randint(1, 6))]
    months = [rng.randint(1, 12) for _ in range(rng.randint(2, 8))]
    return rng.choice(
        (
            ". ".join(f"{upper_first(written_day(rng, d))} is {d}" for d in days),
            ". ".join(f"{d} is {written_day(rng, d)}" for d in days),
            ", ".join(f"{words.MONTHS[m - 1]} {m:02d}" for m in months),
            chat(*(turn for d in days[:3] for turn in (f"ISO date:\n{written_day(rng, d)}", str(d)))),
            chat("Dates:\n" + listed([written_day(rng, d) for d in days]), as_json(days)),
            chat("Months:\n" + ", ".join(words.MONTHS[m - 1] for m in months), as_json([f"{m:02d}" for m in months])),
        )
    )


def copies(rng: random.Random) -> str:
    """Names and things, repeated word by word, as a JSON list, and picked from a list."""
    drawn: list[Callable[[], str]] = [
        lambda: person(rng, KIND),
        lambda: pick(rng, KIND.cities, KIND.invented),
        lambda: item(rng, KIND, rng.randint(1, 2)),
        lambda: words.invented(rng),
        lambda: words.scrambled(rng),
        lambda: words.scrambled(rng).capitalize(),
        lambda: words.spliced(rng),
    ]
    one_kind = rng.choice(drawn)
    parts = [one_kind() if rng.random() < 0.5 else rng.choice(drawn)() for _ in range(rng.randint(1, 6))]
    asked = rng.randrange(len(parts))
    plain = f"{', '.join(parts)}. And again: {', '.join(parts)}. As a list: {as_json(parts)}"
    turns = [
        ("Repeat:", ", ".join(parts)),
        ("List:", as_json(parts)),
        ("The last one?", parts[-1]),
        (f"What comes after {parts[asked - 1]}?", parts[asked]),
    ]
    (first, answer), *rest = rng.sample(turns, rng.randint(2, 4))
    text = rng.choice((", ".join(parts), listed(parts)))
    return rng.choice((plain, chat(f"{first}\n{text}", answer, *(part for turn in rest for part in turn))))


def shelf(rng: random.Random) -> str:
    """What lies on a shelf: a plain list, the same as a JSON object, and in words."""
    stock = {item(rng, KIND, n): n for n in (rng.randint(1, 20) for _ in range(rng.randint(1, 4)))}
    number = rng.randint(1, 99)
    lines = ", ".join(f"{name}: {written_count(rng, n)}" for name, n in stock.items())
    things = listed([f"{written_count(rng, n)} {name}" for name, n in stock.items()])
    in_words = f"On shelf {number} there are {things}."
    facts = as_json({"items": stock, "shelf": number})
    return rng.choice(
        (
            chat(f"Shelf {number}:\n{lines}", facts, "In words?", in_words),
            f"{facts} {in_words}",
            f"{as_json(stock)} means {things}.",
        )
    )


PEOPLE = (
    "{name} is a {job} from {town}, born on {born}.",
    "Born in {town} on {born}, {name} became a {job}.",
    "The {job} {name} was born on {born} and lives in {town}.",
    "On {born} {name} was born in {town}. Today: {job}.",
    "They say that {name}, the {job} at the {town} mill, has a birthday on {born}.",
    "Good evening. A {job} is what I am, {name} is my name, {town} my home, and I was born on {born}.",
    "In {town} we had a {job} called {name}. The church book says {born}.",
    "My neighbour {name} left {town} to work as a {job}. The passport gives {born}.",
    "Ask the {job}! That is {name}. Birthday {born}, place {town}.",
    "{town}, {born}: {name} is born, later a {job}.",
    "Town: {town}. Name: {name}. Job: {job}. Born: {born}.",
    "We met {name} near {town}. A {job}, and as old as anybody who was born on {born}.",
)
SKIES = (
    "There was {sky} in {city} on {day}, at {degrees} degrees.",
    "{city} on {day}: {sky}, {degrees} degrees.",
    "On {day} the people of {city} saw {sky} and {degrees} degrees.",
    "{degrees} degrees and {sky} is what {city} had on {day}.",
    "The radio promised {sky} for {day} in {city}. It was {degrees} degrees.",
    "For {day} the {city} station reports {sky} and {degrees} degrees.",
    "It was {day}. {city} had {sky}. The glass showed {degrees} degrees.",
    "Nobody in {city} liked {day}: {sky} all day, {degrees} degrees.",
)
TRAINS = (
    "Train {train} runs from {from} to {to} on {day}. The driver is {driver}.",
    "On {day} {driver} drives train {train} from {from} to {to}.",
    "{driver} will take train {train} to {to}. It leaves {from} on {day}.",
    "Passengers for {to}! Number {train}, out of {from}, driver {driver}, on {day}.",
    "Number {train} was late in {to} on {day}. {driver} had left {from} too late.",
    "From {from} comes {driver} with train {train}, and {to} is where it ends on {day}.",
    "The {to} train on {day} is {train}. It starts in {from}, and {driver} drives.",
)
VISITS = (
    "{guest} comes to {town} on {date}.",
    "On {date} {guest} will be at the {town} house.",
    "We expect {guest} in {town}, not before {date}.",
    "A room for {guest}, please. The town is {town}, the night is {date}.",
    "{date}: dinner with {guest} in {town}.",
    "Here is {guest}. I travel to {town} and arrive on {date}.",
    "The {town} club has asked {guest} to speak on {date}.",
    "Meet {guest} at the station of {town}. It is on {date}.",
    "{town} waits for {guest} until {date}.",
    "Is {guest} in {town}? On {date}, yes.",
    "Somebody called from {town}: {guest} can stay there from {date}.",
    "By {date} {guest} has to leave {town}.",
)
SHELVES = (
    "On shelf {shelf} there are {items}.",
    "{items} lie on shelf {shelf}.",
    "We counted {items}. That was shelf {shelf}.",
    "Shelf {shelf} holds {items}.",
    "Put {items} on shelf {shelf}.",
    "Number {shelf} has {items}, and nothing else.",
    "From shelf {shelf} they took {items} away.",
    "Two boxes with {items} stood on shelf {shelf}.",
)


def card(rng: random.Random) -> str:
    """A person, a day's weather, a train, a visit or a shelf: prose, JSON and questions about the same facts."""
    city, other = (pick(rng, KIND.cities, KIND.invented) for _ in "ab")
    stock = {item(rng, KIND, n): n for n in (rng.randint(1, 20) for _ in range(rng.randint(1, 3)))}
    kind, phrasings, fields = rng.choice(
        (
            ("Person", PEOPLE, {"name": person(rng, KIND), "job": rng.choice(JOBS), "town": city, "born": day(rng)}),
            ("Weather", SKIES, {"city": city, "day": day(rng), "sky": rng.choice(WEATHER), "degrees": rng.randint(1, 20)}),
            (
                "Train",
                TRAINS,
                {"train": rng.randint(100, 999), "from": city, "to": other, "day": day(rng), "driver": person(rng, KIND)},
            ),
            ("Visit", VISITS, {"guest": person(rng, KIND), "town": city, "date": day(rng)}),
            ("Shelf", SHELVES, {"items": stock, "shelf": rng.randint(1, 99)}),
        )
    )
    sentence = upper_first(rng.choice(phrasings).format(**{name: _written(rng, name, value) for name, value in fields.items()}))
    remark = rng.choice(("", "", *KIND.remarks))
    described = f"{sentence} {remark}".strip() if rng.random() < 0.5 else f"{remark} {sentence}".strip()
    plain = {name: value for name, value in fields.items() if name != "items"}
    (first, answer), *rest = rng.sample([(f"{name.capitalize()}?", str(value)) for name, value in plain.items()], len(plain))
    as_card = chat(f"{kind} as JSON:\n{described}", as_json(fields))
    return rng.choice(
        (
            *(4 * (as_card,)),
            f"{described} {as_json(fields)}",
            f"{as_json(fields)} {described}",
            chat("Tell me about it:\n" + as_json(fields), sentence),
            chat(f"{first}\n{described}", answer, *(part for turn in rest for part in turn)),
        )
    )


def _written(rng: random.Random, name: str, value: Any) -> str:
    if isinstance(value, dict):
        return listed([f"{written_count(rng, n)} {thing}" for thing, n in value.items()])
    if name == "degrees":
        return written_count(rng, value)
    return written_day(rng, value) if isinstance(value, date) else str(value)


KINDS: tuple[tuple[int, Callable[[random.Random], str]], ...] = (
    (14, story),
    (5, number_facts),
    (10, date_facts),
    (19, copies),
    (8, shelf),
    (44, card),
)


def pretraining_texts(seed: int, n_chars: int) -> Iterator[str]:
    """Texts, a pure function of (seed, how many came before), until they hold n_chars characters together."""
    rng = random.Random(seeds.derive(seed, "demo", "pretrain"))
    weights, kinds = zip(*KINDS, strict=True)
    while n_chars > 0:
        text = rng.choices(kinds, weights)[0](rng)
        n_chars -= len(text)
        yield text
