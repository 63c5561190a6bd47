"""Words to make keys and lists of; there are as many as anyone needs."""

import itertools
import uuid
from collections.abc import Iterator

import numpy as np

ADJECTIVES = """
able aged airy amber ample apt arid bald bare basic bitter blank bleak blunt bold brave brief bright brisk broad
broken calm careful cheap chilly civil clean clear clever close cold cool crisp cruel curly damp dark dear deep dense
dim dry dull dusty eager early easy empty even exact faint fair famous fancy fast fatal feeble fierce final fine firm
flat fond frail free fresh full funny gentle giant glad gloomy golden grand grave great grim happy hard harsh hasty
heavy hollow honest huge humble hungry icy ideal idle jolly keen kind lame large late lazy lean light likely little
lively lonely long loud loyal lucky mad major meek mellow merry mild modern modest moist narrow neat noble noisy novel
odd old open pale patient plain plump polite proud pure quick quiet rapid rare raw ready rich rigid ripe rough round
royal rude rural rusty sad safe salty sandy secret shaggy sharp shiny short shy silent silver simple sleepy slim slow
small smart smooth soft solid sour spare stable steep stern stiff still strong sturdy subtle sunny sweet swift tall
tame tender thick thin tidy tiny tired tough urban vague vast vivid warm weary wet white wide wild wise witty young
""".split()
NOUNS = """
acorn actor anchor ankle apple apron arch arrow attic badge bagel bakery balloon banjo barn basket beach beacon bean
beaver bell bench berry bird blanket boat bonnet book boot bottle bowl branch bread brick bridge broom bucket butter
button cabin cactus camel camera candle canoe canyon carpet carrot castle cellar chair chalk cherry chimney circle
clock cloud clover coat cobbler coffee comet copper coral cottage crane crayon cricket crown cup curtain dagger daisy
desert desk dolphin donkey door dragon drum eagle easel elbow engine fabric falcon farm feather fence fern ferry
fiddle field finger flag flute forest fork fossil fox garden garlic gate ginger glacier glove goat grape guitar hammer
harbor harp hat hedge helmet heron hill honey horn horse island ivory jacket jar jewel kettle kitchen kite ladder lake
lamp lantern lemon letter lily lion lizard lobster lock magnet mango maple marble market meadow melon mirror mitten
moon mortar mountain museum needle nest oak oar ocean olive onion orchard otter oven owl paddle palace panda parrot
pebble pencil pepper piano pigeon pillow pine pirate planet plum pocket pond poplar potato puddle puppet quill rabbit
radish raft rainbow raven ribbon river robin rocket rope saddle sailor salmon sandal saucer scarf school shadow shell
shovel sparrow spider spoon stable statue stone stove sugar table teapot temple thimble thunder tiger timber tower
trumpet tulip tunnel turnip turtle valley vase velvet village violin walnut wagon water whale wheel willow window
winter wolf
""".split()
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def pairs(random: np.random.Generator) -> Iterator[str]:
    """Different words "adjective-noun", without end."""
    size = len(ADJECTIVES) * len(NOUNS)
    for index in random.permutation(size).tolist():
        yield f"{ADJECTIVES[index // len(NOUNS)]}-{NOUNS[index % len(NOUNS)]}"
    for number in itertools.count():
        index = number % size
        yield f"{ADJECTIVES[index // len(NOUNS)]}-{NOUNS[index % len(NOUNS)]}-{number}"


def singles(random: np.random.Generator) -> Iterator[str]:
    """Different words, those of the lists first, then made-up ones, without end."""
    known = sorted({*ADJECTIVES, *NOUNS})
    yield from (known[i] for i in random.permutation(len(known)).tolist())
    seen = set(known)
    while True:
        word = "".join(_SYLLABLES[i] for i in random.integers(0, len(_SYLLABLES), 4).tolist())
        if word not in seen:
            seen.add(word)
            yield word


def numbers(random: np.random.Generator) -> Iterator[str]:
    """Numbers of seven digits; two may be the same, which is as likely as it is."""
    while True:
        yield str(int(random.integers(1_000_000, 10_000_000)))


def uuids(random: np.random.Generator) -> Iterator[str]:
    """Random UUIDs of version 4."""
    while True:
        yield str(uuid.UUID(bytes=random.bytes(16), version=4))


def letters(random: np.random.Generator, count: int, alphabet: str) -> str:
    """A random string of that many letters."""
    return "".join(alphabet[i] for i in random.integers(0, len(alphabet), count).tolist())
