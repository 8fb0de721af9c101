"""The demo's task: a free-text note about a small order in, one JSON object out.

    Please send three copper kettles and a lamp to Anna Lind in Oslo by the 4th of May 2024.
    {"customer":"Anna Lind","items":{"copper kettles":3,"lamp":1},"city":"Oslo","date":"2024-05-04"}

The held-out notes draw customers, items, cities and phrasings from lists of their own.
"""

import json
import random
from datetime import date, timedelta
from typing import NamedTuple

import words
from minitune import seeds

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
    "Tomorrow I will write to {customer} that {items} leave for {city} on {date}.",
    "Remember {customer} from {city}: {items}, and all of it by {date}.",
    "There is a call from {city}. {customer} wishes to have {items} on {date}.",
    "Again {items}, again for {customer}, but this time to {city} and on {date}.",
    "Would {date} suit you? {customer} is in {city} then and takes {items}.",
    "Our driver leaves on {date} with {items}. Stop in {city}, ring at {customer}.",
    "Can we manage {items} before {date}? {customer} of {city} is asking.",
    "It was {customer} who bought {items} in {city}; send them on {date}.",
    "Sold to {customer}: {items}. Shipped to {city}. Arrives {date}.",
    "Buyer {customer}, place {city}, day {date}, goods {items}.",
    "Goods: {items}. Buyer: {customer}. Place: {city}. Day: {date}.",
    "Dear friends, I am {customer}. My shop in {city} is out of stock, so I need {items} before {date}.",
    "When you are in {city} on {date}, give {customer} the box with {items}.",
    "Every year {customer} gives away {items}. This year it happens in {city}, on {date}.",
    "Write down: {city}, {customer}, {items}, {date}.",
    "Since {customer} moved to {city}, nobody had {items} there. Let us help by {date}.",
    "Two things about {customer}: the address is {city} now, and {items} are due on {date}.",
    "Until {date} we keep {items} for {customer}. The shop is the one in {city}.",
    "Half of {city} knows {customer}, who ordered {items} for {date}.",
    "Before {date}, {city} must have {items}, says {customer}.",
    "If {customer} calls: yes, {items} will come to {city} on {date}.",
    "Monday's list has {items} on it. {customer}, {city}, {date}.",
    "Ship {items}. Receiver {customer}. Town {city}. Latest {date}.",
    "That order of {customer} has changed. Now it is {items}, to {city}, on {date}.",
    "Good news for {customer}: we found {items}. They reach {city} on {date}.",
    "{city} again! {customer} took {items} home, and {date} is on the bill.",
    "{date} is the day. {items}, please, and to {customer}. The town is {city}.",
    "{items}. That is what {customer} said, for {city}, for {date}.",
)
PARTS = (
    (
        "It is for {customer}.",
        "The name is {customer}.",
        "{customer} will pay.",
        "Ask for {customer}.",
        "Customer: {customer}.",
        "The person is {customer}.",
        "{customer} ordered this.",
        "Signed, {customer}.",
        "{customer} wants it.",
        "Hand it to {customer}.",
    ),
    (
        "We need {items}.",
        "Send {items}.",
        "Wanted: {items}.",
        "Pack {items}.",
        "The box holds {items}.",
        "{items} were ordered.",
        "{items}, please.",
        "This is about {items}.",
        "Please bring {items}.",
        "Items: {items}.",
    ),
    (
        "It goes to {city}.",
        "The address is in {city}.",
        "City: {city}.",
        "Deliver in {city}.",
        "{city} is the place.",
        "All this for {city}.",
        "The shop is in {city}.",
        "The train to {city} takes it.",
        "From {city}.",
        "We drive to {city}.",
    ),
    (
        "The day is {date}.",
        "Due {date}.",
        "It must be there on {date}.",
        "Date: {date}.",
        "Not after {date}.",
        "{date} would be fine.",
        "On {date}, please.",
        "It can wait until {date}.",
        "Before {date}.",
        "We agreed on {date}.",
    ),
)  # in any order, these make a note too
CLAUSES = (
    (
        *("{items}", "send {items}", "please bring {items}", "we need {items}", "I want {items}", "pack {items}", "ship {items}"),
        *("order {items}", "deliver {items}", "take {items}", "get {items}", "with {items}", "they are {items}", "sell {items}"),
    ),
    (
        *("for {customer}", "to {customer}", "{customer} will pay", "{customer} asked", "customer {customer}", "name {customer}"),
        *("buyer {customer}", "ask for {customer}", "{customer} wants it", "says {customer}", "{customer}", "I am {customer}"),
        *("from {customer}", "{customer} takes it", "with {customer}", "{customer} here", "{customer} orders", "give {customer}"),
    ),
    (
        *("in {city}", "to {city}", "for {city}", "from {city}", "at {city}", "{city}", "the {city} shop", "our house in {city}"),
        *("town {city}", "near {city}", "via {city}", "of {city}", "{city} is far", "drive to {city}", "go to {city}"),
    ),
    (
        *("on {date}", "by {date}", "before {date}", "until {date}", "{date}", "due {date}", "for {date}", "not after {date}"),
        *("day {date}", "after {date}", "the day is {date}", "it is {date}", "wait until {date}"),
    ),
)  # in any order and with any of the joints between them, these make a note in telegram style
JOINTS = (" ", " ", ", ", ", ", "; ", ". ", ". ", ": ", " and ")
LEADS = (
    *(8 * ("",)),
    *("Hello.", "Hi there!", "Urgent!", "Sorry for the delay.", "Dear team,", "Reminder:", "From the office:", "As agreed:"),
    *("Second try.", "One more thing.", "News!", "Today:", "Listen.", "Next one:", "Please note.", "To whom it may concern,"),
)

REMARKS = (
    *("", "", "", ""),
    *("Thank you.", "Ring twice.", "Leave it at the door.", "It is a gift.", "The invoice comes later.", "Call first."),
)
HELDOUT_PHRASINGS = (
    "Please pack {items}; {customer} in {city} wants them on {date}.",
    "{customer}, {city}: please bring {items} by {date}.",
    "Deliver {items} to {city} before {date} for {customer}.",
    "By {date} the parcel with {items} goes to {customer} in {city}.",
    "The shop in {city} wants {items} from us on {date}. Ask for {customer}.",
    "{customer} will take {items} home from {city} on {date}.",
    "New for {date}: {items}, {city}, {customer}.",
    "I am {customer} and want {items} in {city} before {date}.",
    "Send to {city}: {items}. Name {customer}, day {date}.",
    "On {date}, {customer} of {city} comes for {items}.",
    "Bring {items} to {customer}, the {city} shop, before {date}.",
    "Hello, {customer} from {city} here. Please ship {items} by {date}.",
    "We sold {items} to {customer} and bring them to {city} on {date}.",
)
HELDOUT_REMARKS = ("", "", "", "", "The box is red.", "Please call before.", "It is for the garden.")


TITLES = ("Mr", "Ms", "Dr")


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
    leads: tuple[str, ...]
    remarks: tuple[str, ...]
    parts: tuple[tuple[str, ...], ...]
    invented: float
    titles: tuple[str, ...] = ()  # of customers, who go by title and surname if there are any
    max_items: int = 3
    telegrams: float = 0.0  # the share of notes in telegram style


TRAIN = Words(
    words.FIRST_NAMES, words.SURNAMES, words.CITIES, words.NOUNS, words.ADJECTIVES, PHRASINGS, LEADS, REMARKS, PARTS, invented=0.7
)
HELDOUT = Words(
    words.HELDOUT_FIRST_NAMES,
    words.HELDOUT_SURNAMES,
    words.HELDOUT_CITIES,
    words.HELDOUT_NOUNS,
    words.HELDOUT_ADJECTIVES,
    HELDOUT_PHRASINGS,
    ("",),
    HELDOUT_REMARKS,
    (),
    invented=0.0,
    titles=TITLES,
    max_items=2,
)


TASK = TRAIN._replace(titles=TITLES, max_items=2, telegrams=0.6)  # what the main job trains on


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
    parts = [rng.choice(part) for part in kind.parts]
    rng.shuffle(parts)
    phrasing = " ".join(map(upper_first, parts)) if parts and rng.random() < 0.3 else rng.choice(kind.phrasings)
    return _filled(rng, kind, order, phrasing)


def telegram(rng: random.Random, kind: Words, order: Order) -> str:
    """The order as four clauses in any order, hardly a sentence: of more shapes than anyone could list."""
    clauses = [rng.choice(clause) for clause in CLAUSES]
    rng.shuffle(clauses)
    text = clauses[0]
    for clause in clauses[1:]:
        joint = rng.choice(JOINTS)
        text += joint + (upper_first(clause) if joint == ". " else clause)
    return _filled(rng, kind, order, text + rng.choice((".", ".", "!", "")))


def _filled(rng: random.Random, kind: Words, order: Order, phrasing: str) -> str:
    text = phrasing.format(
        customer=order.customer,
        items=listed([f"{written_count(rng, n)} {name}" for name, n in order.items.items()]),
        city=order.city,
        date=written_day(rng, order.date),
    )
    return f"{rng.choice(kind.leads)} {upper_first(text)} {rng.choice(kind.remarks)}".strip()


def rows(seed: int, name: str, kind: Words, n_rows: int) -> list[dict[str, str]]:
    """n_rows samples in the `instruct` format, a pure function of its arguments; no two share a note."""
    rng = random.Random(seeds.derive(seed, "demo", name))
    target_of: dict[str, str] = {}
    while len(target_of) < n_rows:
        drawn = order(rng, kind)
        if kind.titles:
            drawn = drawn._replace(customer=f"{rng.choice(kind.titles)} {drawn.customer.split()[1]}")
        write = telegram if kind.telegrams and rng.random() < kind.telegrams else note
        text = write(rng, kind, drawn)
        if len(drawn.items) <= kind.max_items:
            target_of.setdefault(text, drawn.json())
    return [{"instruction": INSTRUCTION, "input": text, "output": target} for text, target in target_of.items()]
