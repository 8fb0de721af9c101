"""The words that the demo's notes are made of: one list for training and pretraining, another for the held-out notes.

No word stands in both lists of a kind; words that the generators invent are refused when they stand in a held-out list.
"""

import random

MONTHS = tuple(
    "January February March April May June July August September October November December".split()
)
NUMBERS = tuple(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty".split()
)

FIRST_NAMES = tuple(
    "Anna Marta Peter Oskar Lena Hugo Ines Karl Nadia Tom Vera Simon Julia Erik Paula Milan Greta Ivan Clara Felix Rosa "
    "Anton Helen Jonas Mina Albert Sofia Viktor Laura Henrik Tara Martin Elsa Dario Nora Samuel Alma Robert Irene Pavel "
    "Linda Gustav Mona Rafael Judith Leon Carmen Stefan Olga Daniel Sara Marco Eva Tobias Lucia Adrian Petra Bruno Diana "
    "Emil Flora Gregor Hanna Igor Jana Kevin Lydia Max Nina Otto Pia Ralf Silvia Theo Ursula Walter Yara Zora Boris Celia "
    "Edgar Fiona Gavin Heidi Jasper Kira Lukas Mabel Nils Odette Percy Renata Selma Timo Vivian Wilma Agnes Basil Cora Dennis".split()
)
SURNAMES = tuple(
    "Lind Berger Novak Stone Marsh Keller Silva Hansen Moreau Bauer Fischer Rossi Costa Walsh Turner Larsen Petrov Horvat "
    "Dubois Weber Santos Parker Nilsen Kovac Ferrari Wagner Blake Mercer Jensen Schmidt Romero Fuller Dahl Hoffman Greco "
    "Palmer Strand Kruger Vidal Hunter Olsen Brandt Ricci Lopez Barker Vogel Simic Martin Cooper Sandberg Maier Conti Ramos "
    "Holt Winter Popov Lang Bishop Carter Duarte Egger Falk Gruber Haas Ivanov Jansen Kowal Lehner Moser Nagy Orban Pichler "
    "Quinn Reiter Sauer Tanner Unger Vance Wolff Young Zeller Abbott Baxter Clarke Dalton Ellis Foster Grant Harper".split()
)
CITIES = tuple(
    "Oslo Vienna Lisbon Prague Madrid Dublin Bergen Turin Porto Leeds Hamburg Geneva Malmo Krakow Seville Ghent Lyon Bristol "
    "Munich Zagreb Aarhus Bologna Nantes Valencia Cardiff Dresden Basel Uppsala Gdansk Granada Bruges Toulouse York Leipzig "
    "Ljubljana Odense Verona Lille Malaga Glasgow Bremen Lucerne Tampere Lublin Bilbao Antwerp Nice Oxford Cologne Split "
    "Stavanger Padua Rennes Cadiz Exeter Rostock Bern Vaasa Torun Toledo Namur Dijon Bath Kassel Zadar Tromso Siena Brest".split()
)
NOUNS = tuple(
    "kettle lamp chair table mug plate bowl spoon fork blanket pillow towel basket bucket broom hammer nail screw hook rope "
    "candle mirror clock frame drawer pencil pen notebook folder stamp envelope lantern bell whistle drum flute guitar "
    "button ribbon needle scarf glove hat coat apron belt sock boot sandal ladder hinge handle pipe valve pump filter cable "
    "socket bulb charger tent flask map rucksack kite ball puzzle doll robot block crayon easel sponge "
    "tile brick plank beam post gate curtain carpet cushion stool desk cupboard cabinet bottle jar barrel crate pallet sack "
    "cap ring bracelet necklace brooch wallet purse satchel trunk tray jug teapot saucer ladle whisk grater sieve pan wok".split()
)
ADJECTIVES = tuple(
    "copper blue red green small large wooden round old new white black brass iron silver yellow grey heavy light square "
    "long short thin thick striped plain soft hard painted folding steel glass paper leather linen woollen cotton oak pine "
    "brown pink narrow wide tall tiny modern simple bright".split()
)

HELDOUT_FIRST_NAMES = tuple(
    "Miriam Johan Beatrix Conrad Dorothea Fabian Gwen Harald Isolde Jakob Katrin Lorenzo Magnus Natalia Oliver Philippa "
    "Quentin Rebecca Sebastian Tamara Ulrich Veronica Wendel Xenia Yannick Zelda Arthur Bettina Cedric Delia Elliot Frida "
    "Gerald Hilde Ismael Joanna".split()
)
HELDOUT_SURNAMES = tuple(
    "Albrecht Bergman Castillo Drummond Engel Fontaine Gallagher Hedlund Isaksen Jurgens Kaufman Lindqvist Montero Neumann "
    "Osborne Pellegrini Rasmussen Schreiber Thorvald Urbanski Vasquez Whitaker Yates Zimmer Ashford Brennan Coleman Delgado "
    "Eastwood Farrell Goodwin Hartley Jarvis Kendrick".split()
)
HELDOUT_CITIES = tuple(
    "Athens Berlin Helsinki Naples Rotterdam Salzburg Tallinn Utrecht Warsaw Zurich Belfast Coimbra Debrecen Edinburgh "
    "Florence Graz Haarlem Innsbruck Jena Kaunas Limerick Marseille Norwich Orebro Pilsen Riga Stuttgart Trieste".split()
)
HELDOUT_NOUNS = tuple(
    "anvil birdcage chessboard doormat eggcup fishnet globe hammock inkwell jigsaw keyring lampshade mousetrap napkin "
    "oar padlock quilt rake saddle thimble umbrella vase wheelbarrow xylophone yardstick zipper armchair blender corkscrew "
    "dustpan footrest goblet harmonica kennel magnet".split()
)
HELDOUT_ADJECTIVES = tuple(
    "amber bronze crimson dented elegant foldable glossy hollow ivory knitted lacquered marble "
    "oval polished quilted rustic sturdy turquoise velvet waxed".split()
)
HELDOUT = frozenset(
    word.lower()
    for words in (HELDOUT_FIRST_NAMES, HELDOUT_SURNAMES, HELDOUT_CITIES, HELDOUT_NOUNS, HELDOUT_ADJECTIVES)
    for word in words
)

ONSETS = tuple("b c d f g h j k l m n p r s t v w y z b d g k l m n p r s t br bl ch cl cr dr fl fr gl gr kn pl qu sh sk sl sp st th tr wh".split())
VOWELS = tuple("a e i o u a e i o u a e i o y ai ea ee ie oo ou".split())
CODAS = tuple("n r l s t m d k p ck ff g ll mp nd ng nk nt rd rk rm rn rt sh ss st x z".split())


def invented(rng: random.Random) -> str:
    """A word of two or three random syllables, never a held-out one."""
    n_syllables = rng.choice((2, 2, 2, 3))
    open_syllables = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(n_syllables))
    word = open_syllables + (rng.choice(CODAS) if rng.random() < 0.6 else "")
    return invented(rng) if word in HELDOUT or word.removesuffix("s") in HELDOUT else word
