"""Questions with one-word answers. The answer is chosen first, so that each family is uniform over its answers."""

import numpy as np

from hf_vlmerge.data.shapes.captions import NUMBERS, OPPOSITE, PLACES, RELATIONS, article, holds
from hf_vlmerge.data.shapes.world import CELLS, COLOURS, LEVELS, SHAPES, Level, Scene, Thing

NEAR_MISS_PROBABILITY = 0.7  # a "no" to a question of presence takes one attribute of a present thing
ANSWERS = ("yes", "no", "nothing", *COLOURS, *SHAPES, *NUMBERS)  # 22, in the order of the labels
FAMILIES = ("presence", "relation", "colour", "shape", "position", "count", "count_colour", "count_shape", "compare")


def families_of(level: Level) -> list[str]:
    """Families that a level can balance: those with more than one answer."""
    return [family for family in FAMILIES if len(answers_of(family, level)) > 1]


def answers_of(family: str, level: Level) -> tuple[str, ...]:
    """The answers between which a family is balanced."""
    match family:
        case "presence" | "relation" | "compare":
            return ("yes", "no")
        case "colour":
            return COLOURS[: level.colours]
        case "shape":
            return SHAPES[: level.shapes]
        case "position":
            return (*SHAPES[: level.shapes], "nothing")
        case "count":
            return NUMBERS[level.fewest : level.most + 1]
    return NUMBERS[: min(level.most, 2) + 1]  # count_colour, count_shape: more of a kind is too rare to balance


def choose(random: np.random.Generator, options: list):
    return options[int(random.random() * len(options))]


def ask(scene: Scene, family: str, answer: str, level: str, random: np.random.Generator) -> str | None:
    """A question of the family whose answer over this scene is the given one; None if the scene admits none."""
    ask_one = {
        "presence": ask_presence,
        "relation": ask_relation,
        "colour": ask_colour,
        "shape": ask_shape,
        "position": ask_position,
        "count": ask_count,
        "count_colour": ask_count_colour,
        "count_shape": ask_count_shape,
        "compare": ask_compare,
    }[family]
    return ask_one(scene, answer, LEVELS[level], random)


def look(thing: Thing) -> str:
    return f"{COLOURS[thing.colour]} {SHAPES[thing.shape]}"


def ask_presence(scene: Scene, answer: str, level: Level, random: np.random.Generator) -> str:
    present = {(thing.colour, thing.shape) for thing in scene}
    if answer == "yes":
        colour, shape = choose(random, sorted(present))
    else:
        absent = [(c, s) for c in range(level.colours) for s in range(level.shapes) if (c, s) not in present]
        colours, shapes = {c for c, _ in present}, {s for _, s in present}
        near = [pair for pair in absent if pair[0] in colours or pair[1] in shapes]
        colour, shape = choose(random, near if random.random() < NEAR_MISS_PROBABILITY else absent)
    return f"is there {article(f'{COLOURS[colour]} {SHAPES[shape]}')}?"


def ask_relation(scene: Scene, answer: str, level: Level, random: np.random.Generator) -> str | None:
    if len(scene) < 2:
        return None
    first, second = (scene[i] for i in random.permutation(len(scene))[:2])
    true = [relation for relation in RELATIONS if holds(first, relation, second)]
    relation = choose(random, true)
    relation = relation if answer == "yes" else OPPOSITE[relation]
    return f"is the {look(first)} {relation} the {look(second)}?"


def ask_colour(scene: Scene, answer: str, level: Level, random: np.random.Generator) -> str | None:
    shapes = [thing.shape for thing in scene]
    fitting = [t for t in scene if COLOURS[t.colour] == answer and shapes.count(t.shape) == 1]
    return f"what colour is the {SHAPES[choose(random, fitting).shape]}?" if fitting else None


def ask_shape(scene: Scene, answer: str, level: Level, random: np.random.Generator) -> str | None:
    colours = [thing.colour for thing in scene]
    fitting = [t for t in scene if SHAPES[t.shape] == answer and colours.count(t.colour) == 1]
    return f"what shape is the {COLOURS[choose(random, fitting).colour]} object?" if fitting else None


def ask_position(scene: Scene, answer: str, level: Level, random: np.random.Generator) -> str | None:
    taken = {thing.cell: SHAPES[thing.shape] for thing in scene}
    cells = [cell for cell in range(CELLS) if taken.get(cell, "nothing") == answer]
    return f"what is {PLACES[choose(random, cells)]}?" if cells else None


def ask_count(scene: Scene, answer: str, level: Level, random: np.random.Generator) -> str | None:
    return "how many objects are there?" if NUMBERS[len(scene)] == answer else None


def ask_count_colour(scene: Scene, answer: str, level: Level, random: np.random.Generator) -> str | None:
    counts = np.bincount([thing.colour for thing in scene], minlength=level.colours)
    fitting = [c for c in range(level.colours) if NUMBERS[counts[c]] == answer]
    return f"how many {COLOURS[choose(random, fitting)]} objects are there?" if fitting else None


def ask_count_shape(scene: Scene, answer: str, level: Level, random: np.random.Generator) -> str | None:
    counts = np.bincount([thing.shape for thing in scene], minlength=level.shapes)
    fitting = [s for s in range(level.shapes) if NUMBERS[counts[s]] == answer]
    return f"how many {plural(SHAPES[choose(random, fitting)])} are there?" if fitting else None


def ask_compare(scene: Scene, answer: str, level: Level, random: np.random.Generator) -> str | None:
    """More of one shape than of another; a "no" asks about shapes of which at least one is there."""
    counts = np.bincount([thing.shape for thing in scene], minlength=level.shapes)
    pairs = [(a, b) for a in range(level.shapes) for b in range(level.shapes) if a != b and counts[a] + counts[b]]
    fitting = [(a, b) for a, b in pairs if (counts[a] > counts[b]) == (answer == "yes")]
    if not fitting:
        return None
    first, second = choose(random, fitting)
    return f"are there more {plural(SHAPES[first])} than {plural(SHAPES[second])}?"


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")
