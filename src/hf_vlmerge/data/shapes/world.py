"""The world: what a scene is, how one is drawn from a seed, and to which split it belongs.

A scene is a set of things on a 3 x 3 board. Everything else (pixels, captions, questions) is made from the scene, and
nothing reads pixels.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple
from zlib import crc32

import numpy as np

VERSION = 1  # part of every seed: raise it when any example changes

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "gray")
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
SIZES = ("small", "large")
SPLITS = ("train", "validation", "test", "test_compositional")
CELLS = 9  # of the board, row by row
JITTER = 2  # pixels at 48 x 48, either way
MOST_THINGS = 5

# Colour i never meets shape i mod 5 outside the compositional test: 8 of the 40 pairs, no shape in more than two.
HELD_OUT = frozenset((colour, colour % len(SHAPES)) for colour in range(len(COLOURS)))


class Thing(NamedTuple):
    """One object; all fields but the two jitters are indices into the tables above."""

    colour: int
    shape: int
    size: int
    cell: int
    dx: int
    dy: int

    @property
    def row(self) -> int:
        return self.cell // 3

    @property
    def column(self) -> int:
        return self.cell % 3


Scene = tuple[Thing, ...]  # in the order of the cells; no two things share colour and shape


@dataclass(frozen=True)
class Level:
    """How much there is in a scene, and whether each caption says everything (both things whole, and a relation)."""

    fewest: int
    most: int
    colours: int
    shapes: int
    relations_only: bool = False


LEVELS = {
    "easy": Level(1, 2, colours=6, shapes=4),
    "pair": Level(2, 2, colours=6, shapes=4, relations_only=True),
    "medium": Level(2, 3, colours=8, shapes=5),
    "hard": Level(3, 5, colours=8, shapes=5, relations_only=True),
}


def checked(value: str, allowed, what: str) -> str:
    """The value if it is allowed, else one sentence that names the nearest one that is."""
    if value in allowed:
        return value
    near = get_close_matches(value, allowed, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{what} is {value!r}; expected one of {', '.join(allowed)}.{hint}")


def generator_for(seed: int, stream: str, index: int) -> np.random.Generator:
    """The random numbers of one example: a function of its arguments alone, so any example can be made on its own."""
    return np.random.default_rng(np.random.SeedSequence([VERSION, seed, crc32(stream.encode()), index]))


def draw_scene(random: np.random.Generator, level: str = "easy") -> Scene:
    """A scene of any split."""
    settings = LEVELS[checked(level, LEVELS, "level")]
    numbers = random.random(1 + 6 * MOST_THINGS).tolist()
    count = settings.fewest + int(numbers[0] * (settings.most - settings.fewest + 1))
    looks = list(range(settings.colours * settings.shapes))
    cells = list(range(CELLS))
    things = []
    for i in range(count):
        look, size, cell, dx, dy, _ = numbers[1 + 6 * i : 7 + 6 * i]
        colour, shape = divmod(looks.pop(int(look * len(looks))), settings.shapes)
        place = cells.pop(int(cell * len(cells)))
        span = 2 * JITTER + 1
        things.append(Thing(colour, shape, int(size * 2), place, int(dx * span) - JITTER, int(dy * span) - JITTER))
    return tuple(sorted(things, key=lambda thing: thing.cell))


def canonical(scene: Scene) -> str:
    """What a scene is but for jitter, as text: equal for two scenes that every caption and question treats alike."""
    return ";".join(f"{SIZES[t.size]} {COLOURS[t.colour]} {SHAPES[t.shape]} {t.cell}" for t in scene)


def split_of(scene: Scene) -> str:
    """
    The one split that a scene belongs to, whatever the seed or the number of examples.

    Scenes with a held-out pair of colour and shape make the compositional test; of the others a hash of the content
    gives 80 % to train and 10 % each to validation and test.
    """
    if any((thing.colour, thing.shape) in HELD_OUT for thing in scene):
        return "test_compositional"
    tenth = int.from_bytes(hashlib.sha256(canonical(scene).encode()).digest()[:8], "big") % 10
    return "train" if tenth < 8 else ("validation" if tenth == 8 else "test")


def scenes_of(random: np.random.Generator, level: str, split: str) -> Iterator[Scene]:
    """Scenes of one split, without end."""
    checked(split, SPLITS, "split")
    while True:
        scene = draw_scene(random, level)
        if split_of(scene) == split:
            yield scene
