"""The words that the demo's notes are made of: one list for training and pretraining, another for the held-out notes.

No word stands in both lists of a kind; words that the generators invent are refused when they stand in a held-out list.
"""

import random


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MONTHS = _split("January February March April May June July August September October November December")
NUMBERS = _split(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)

FIRST_NAMES = _split(
    "Anna Marta Peter Oskar Lena Hugo Ines Karl Nadia Tom Vera Simon Julia Erik Paula Milan Greta Ivan Clara Felix Rosa "
    "Anton Helen Jonas Mina Albert Sofia Viktor Laura Henrik Tara Martin Elsa Dario Nora Samuel Alma Robert Irene Pavel "
    "Linda Gustav Mona Rafael Judith Leon Carmen Stefan Olga Daniel Sara Marco Eva Tobias Lucia Adrian Petra Bruno Diana "
    "Emil Flora Gregor Hanna Igor Jana Kevin Lydia Max Nina Otto Pia Ralf Silvia Theo Ursula Walter Yara Zora Boris Celia "
    "Edgar Fiona Gavin Heidi Jasper Kira Lukas Mabel Nils Odette Percy Renata Selma Timo Vivian Wilma Agnes Basil Cora Dennis"
)
SURNAMES = _split(
    "Lind Berger Novak Stone Marsh Keller Silva Hansen Moreau Bauer Fischer Rossi Costa Walsh Turner Larsen Petrov Horvat "
    "Dubois Weber Santos Parker Nilsen Kovac Ferrari Wagner Blake Mercer Jensen Schmidt Romero Fuller Dahl Hoffman Greco "
    "Palmer Strand Kruger Vidal Hunter Olsen Brandt Ricci Lopez Barker Vogel Simic Martin Cooper Sandberg Maier Conti Ramos "
    "Holt Winter Popov Lang Bishop Carter Duarte Egger Falk Gruber Haas Ivanov Jansen Kowal Lehner Moser Nagy Orban Pichler "
    "Quinn Reiter Sauer Tanner Unger Vance Wolff Young Zeller Abbott Baxter Clarke Dalton Ellis Foster Grant Harper"
)
CITIES = _split(
    "Oslo Vienna Lisbon Prague Madrid Dublin Bergen Turin Porto Leeds Hamburg Geneva Malmo Krakow Seville Ghent Lyon Bristol "
    "Munich Zagreb Aarhus Bologna Nantes Valencia Cardiff Dresden Basel Uppsala Gdansk Granada Bruges Toulouse York Leipzig "
    "Ljubljana Odense Verona Lille Malaga Glasgow Bremen Lucerne Tampere Lublin Bilbao Antwerp Nice Oxford Cologne Split "
    "Stavanger Padua Rennes Cadiz Exeter Rostock Bern Vaasa Torun Toledo Namur Dijon Bath Kassel Zadar Tromso Siena Brest"
)
NOUNS = _split(
    "kettle lamp chair table mug plate bowl spoon fork blanket pillow towel basket bucket broom hammer nail screw hook rope "
    "candle mirror clock frame drawer pencil pen notebook folder stamp envelope lantern bell whistle drum flute guitar "
    "button ribbon needle scarf glove hat coat apron belt sock boot sandal ladder hinge handle pipe valve pump filter cable "
    "socket bulb charger tent flask map rucksack kite ball puzzle doll robot block crayon easel sponge "
    "tile brick plank beam post gate curtain carpet cushion stool desk cupboard cabinet bottle jar barrel crate pallet sack "
    "cap ring bracelet necklace brooch wallet purse satchel trunk tray jug teapot saucer ladle whisk grater sieve pan wok"
)
ADJECTIVES = _split(
    "copper blue red green small large wooden round old new white black brass iron silver yellow grey heavy light square "
    "long short thin thick striped plain soft hard painted folding steel glass paper leather linen woollen cotton oak pine "
    "brown pink narrow wide tall tiny modern simple bright"
)

HELDOUT_FIRST_NAMES = _split(
    "Miriam Johan Beatrix Conrad Dorothea Fabian Gwen Harald Isolde Jakob Katrin Lorenzo Magnus Natalia Oliver Philippa "
    "Quentin Rebecca Sebastian Tamara Ulrich Veronica Wendel Xenia Yannick Zelda Arthur Bettina Cedric Delia Elliot Frida "
    "Gerald Hilde Ismael Joanna"
)
HELDOUT_SURNAMES = _split(
    "Albrecht Bergman Castillo Drummond Engel Fontaine Gallagher Hedlund Isaksen Jurgens Kaufman Lindqvist Montero Neumann "
    "Osborne Pellegrini Rasmussen Schreiber Thorvald Urbanski Vasquez Whitaker Yates Zimmer Ashford Brennan Coleman Delgado "
    "Eastwood Farrell Goodwin Hartley Jarvis Kendrick"
)
HELDOUT_CITIES = _split(
    "Athens Berlin Helsinki Naples Rotterdam Salzburg Tallinn Utrecht Warsaw Zurich Belfast Coimbra Debrecen Edinburgh "
    "Florence Graz Haarlem Innsbruck Jena Kaunas Limerick Marseille Norwich Orebro Pilsen Riga Stuttgart Trieste"
)
HELDOUT_NOUNS = _split(
    "anvil birdcage chessboard doormat eggcup fishnet globe hammock inkwell jigsaw keyring lampshade mousetrap napkin "
    "oar padlock quilt rake saddle thimble umbrella vase wheelbarrow xylophone yardstick zipper armchair blender corkscrew "
    "dustpan footrest goblet harmonica kennel magnet"
)
HELDOUT_ADJECTIVES = _split(
    "amber bronze crimson dented elegant foldable glossy hollow ivory knitted lacquered marble "
    "oval polished quilted rustic sturdy turquoise velvet waxed"
)
HELDOUT = frozenset(
    form.lower()
    for words in (HELDOUT_FIRST_NAMES, HELDOUT_SURNAMES, HELDOUT_CITIES, HELDOUT_NOUNS, HELDOUT_ADJECTIVES)
    for word in words
    for form in (word, f"{word}s")
)

COMMON = _split(
    "order invoice morning every body door twice thing shelf degree person train visit customer city date item list letter "
    "deliver "
    "nothing before because happened receipt someone inside thank leave gift call month send would boat family garden river "
    "music bread winter summer never always between picture school doctor engine weather market village number answer question"
)
KNOWN = tuple(
    word.lower() for words in (NOUNS, ADJECTIVES, FIRST_NAMES, SURNAMES, CITIES, MONTHS, NUMBERS, COMMON) for word in words
)

ONSETS = _split(
    "b c d f g h j k l m n p r s t v w y z b d g k l m n p r s t br bl ch cl cr dr fl fr gl gr kn pl qu sh sk sl sp st th tr wh"
)
OPENINGS = (*ONSETS, *(12 * ("",)))  # a word may begin with a vowel
VOWELS = _split("a e i o u a e i o u a e i o y ai ea ee ie oo ou")
CODAS = _split("n r l s t m d k p ck ff g ll mp nd ng nk nt rd rk rm rn rt sh ss st x z")


def invented(rng: random.Random) -> str:
    """A word that nobody has seen: spliced, or of two or three random syllables, or a known one that goes on in another way."""
    if rng.random() < 0.45:
        return spliced(rng)
    known = rng.choice((*NOUNS, *ADJECTIVES, *(name.lower() for name in FIRST_NAMES))) if rng.random() < 0.25 else ""
    n_syllables = rng.choice((1, 2)) if known else rng.choice((2, 2, 2, 3))
    onsets = [rng.choice(ONSETS if i or known else OPENINGS) for i in range(n_syllables)]
    word = known + "".join(onset + rng.choice(VOWELS) for onset in onsets)
    word += rng.choice(CODAS) if rng.random() < 0.6 else ""
    return invented(rng) if held_out(word) else word


def spliced(rng: random.Random) -> str:
    """The head of one known word and the tail of another: so that every piece of the tokenizer turns up in new company."""
    head, tail = rng.choice(KNOWN), rng.choice(KNOWN)
    word = head[: rng.randint(1, 4)] + tail[-rng.randint(2, 6) :]
    return spliced(rng) if held_out(word) else word


def scrambled(rng: random.Random) -> str:
    """Two to seven random letters, never a held-out word."""
    word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7)))
    return scrambled(rng) if held_out(word) else word


def held_out(word: str) -> bool:
    """Whether a word, or the plural that may be made of it, stands in a held-out list."""
    return word in HELDOUT or f"{word}s" in HELDOUT
