"""The demo's task: a free-text note about a small order in, one JSON object out.

    Please send three copper kettles and a lamp to Anna Lind in Oslo by the 4th of May 2024.
    {"customer":"Anna Lind","items":{"copper kettles":3,"lamp":1},"city":"Oslo","date":"2024-05-04"}

The held-out notes draw customers, items, cities and phrasings from lists of their own.
"""

import json
import random
from datetime import date, timedelta
from typing import NamedTuple

from minitune import seeds
from minitune.demo import words

INSTRUCTION = "Order as JSON:"

PHRASINGS = (
    "Please send {items} to {customer} in {city} by {date}.",
    "{customer} from {city} wants {items} by {date}.",
    "{customer} of {city} has ordered {items}, to be delivered on {date}.",
    "On {date} we have to bring {items} to {customer}, {city}.",
    "New order: {items} for {customer} in {city}, due {date}.",
    "By {date}, please: {items}. They are for {customer} and go to {city}.",
    "Hello, this is {customer}. I need {items} in {city} on {date}.",
    "For {date}: {customer}, {city}, {items}.",
    "{customer} asked for {items}. Ship everything to {city} on {date}.",
    "Our shop in {city} sold {items} on {date}. The buyer is {customer}.",
    "{items} for {customer}. The parcel leaves for {city} on {date}.",
    "A customer called {customer} would like {items} before {date}. The address is in {city}.",
    "To {city} we send {items} on {date}, and {customer} will pay.",
    "{customer} wrote on {date} and ordered {items}. Delivery is to {city}.",
    "Could you get {items} ready? {customer} will be in {city} on {date}.",
    "In {city}, {customer} is waiting for {items}. The day is {date}.",
    "On the phone: {customer}, who lives in {city}. Wants {items}. When: {date}.",
    "Pack {items} and hand them to {customer} when the van reaches {city} on {date}.",
    "{city}, {date}. {customer} bought {items} and paid in cash.",
    "It must be in {city} on {date}: {items}, name {customer}.",
    "We owe {customer} {items}. Deliver to {city} by {date}.",
    "{date}, {city}: {customer} takes {items}.",
    "My name is {customer} and I live in {city}. Can I have {items} by {date}?",
    "The order of {date} was {items}. It goes to {city}, to {customer}.",
)
REMARKS = (
    *("", "", "", ""),
    *("Thank you.", "Ring twice.", "Leave it at the door.", "It is a gift.", "The invoice comes later.", "Call first."),
)
HELDOUT_PHRASINGS = (
    "Kindly deliver {items} to {customer} at the {city} office on {date}.",
    "{customer} needs {items}; the courier should arrive in {city} on {date}.",
    "We promised {items} to {customer} for {date}, to be picked up in {city}.",
    "Note for {date}: put {items} on the truck to {city}, recipient {customer}.",
    "Yesterday {customer} rang from {city} about {items}, wanted no later than {date}.",
    "{items} should reach {customer} in {city} until {date}.",
    "Reserve {items} under the name {customer}. Pick-up is in {city} on {date}.",
    "Good morning, {customer} here. Would you mail {items} to {city} on {date}?",
    "Dispatch on {date}: {items}, destination {city}, attention {customer}.",
    "The {city} branch requests {items} for {customer} on {date}.",
)
HELDOUT_REMARKS = ("", "", "", "", "Many thanks!", "Handle with care.", "No need to sign.", "The neighbours can accept it.")


class Order(NamedTuple):
    """One order: items maps an item, as it is written in the note, to how many of it."""

    customer: str
    items: dict[str, int]
    city: str
    date: date

    def json(self) -> str:
        """The compact JSON object that the model learns to write."""
        return json.dumps(self._asdict(), default=str, separators=(",", ":"))


class Words(NamedTuple):
    """The lists that a kind of notes draws from; invented is the share of words made up on the spot."""

    first_names: tuple[str, ...]
    surnames: tuple[str, ...]
    cities: tuple[str, ...]
    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    phrasings: tuple[str, ...]
    remarks: tuple[str, ...]
    invented: float


TRAIN = Words(words.FIRST_NAMES, words.SURNAMES, words.CITIES, words.NOUNS, words.ADJECTIVES, PHRASINGS, REMARKS, invented=0.7)
HELDOUT = Words(
    words.HELDOUT_FIRST_NAMES,
    words.HELDOUT_SURNAMES,
    words.HELDOUT_CITIES,
    words.HELDOUT_NOUNS,
    words.HELDOUT_ADJECTIVES,
    HELDOUT_PHRASINGS,
    HELDOUT_REMARKS,
    invented=0.0,
)


def pick(rng: random.Random, known: tuple[str, ...], invented: float) -> str:
    """One of the known words or, with probability `invented`, a made-up one in the same case."""
    word = rng.choice(known)
    if rng.random() >= invented:
        return word
    made_up = words.invented(rng)
    return made_up.capitalize() if word[0].isupper() else made_up


def person(rng: random.Random, kind: Words) -> str:
    """First name and surname."""
    return f"{pick(rng, kind.first_names, kind.invented)} {pick(rng, kind.surnames, kind.invented)}"


def item(rng: random.Random, kind: Words, count: int) -> str:
    """A noun in the number that `count` asks for, half of the time after an adjective."""
    noun = pick(rng, kind.nouns, kind.invented)
    noun += "s" if count > 1 and not noun.endswith("s") else ""
    return f"{pick(rng, kind.adjectives, kind.invented)} {noun}" if rng.random() < 0.5 else noun


def day(rng: random.Random) -> date:
    """A day of the years 2020 to 2029."""
    return date(2020, 1, 1) + timedelta(days=rng.randrange(3653))


def written_count(rng: random.Random, count: int) -> str:
    """A count in digits or, at least half of the time, in letters."""
    return str(count) if rng.random() < 0.5 else words.NUMBERS[count - 1]


def written_day(rng: random.Random, day: date) -> str:
    """A date in one of four forms; the ISO form is the rarest, because nothing is to be done about it."""
    month = words.MONTHS[day.month - 1]
    forms = (f"{day.day} {month} {day.year}", f"{month} {day.day}, {day.year}")
    return rng.choice((*forms, *forms, *2 * (f"the {day.day}{ordinal_suffix(day.day)} of {month} {day.year}",), f"{day}"))


def ordinal_suffix(n: int) -> str:
    """st, nd, rd or th, as in 1st, 22nd, 13th."""
    return "th" if n in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")


def upper_first(text: str) -> str:
    """The text with a capital at its start."""
    return text[:1].upper() + text[1:]


def listed(parts: list[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def order(rng: random.Random, kind: Words) -> Order:
    """An order of one to three different items, up to twenty of each."""
    counts = [min(rng.randint(1, 20), rng.randint(1, 20)) for _ in range(rng.choice((1, 2, 2, 3)))]
    items = {item(rng, kind, count): count for count in counts}
    return Order(person(rng, kind), items, pick(rng, kind.cities, kind.invented), day(rng))


def note(rng: random.Random, kind: Words, order: Order) -> str:
    """The order in free text: a phrasing, filled in, and often a remark that says nothing about the order."""
    text = rng.choice(kind.phrasings).format(
        customer=order.customer,
        items=listed([f"{written_count(rng, n)} {name}" for name, n in order.items.items()]),
        city=order.city,
        date=written_day(rng, order.date),
    )
    return f"{upper_first(text)} {rng.choice(kind.remarks)}".rstrip()


def rows(seed: int, name: str, kind: Words, n_rows: int) -> list[dict[str, str]]:
    """n_rows samples in the `instruct` format, a pure function of its arguments; no two share a note."""
    rng = random.Random(seeds.derive(seed, "demo", name))
    found: dict[str, str] = {}
    while len(found) < n_rows:
        drawn = order(rng, kind)
        found.setdefault(note(rng, kind, drawn), drawn.json())
    return [{"instruction": INSTRUCTION, "input": text, "output": target} for text, target in found.items()]
