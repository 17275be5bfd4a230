"""Captions: five grammars, the facts that each states, and the test whether a scene satisfies them."""

from typing import NamedTuple

import numpy as np

from hf_vlmerge.data.shapes.world import COLOURS, LEVELS, SHAPES, SIZES, Scene, Thing, checked

GRAMMARS = ("list", "relation", "position", "count", "short")
SIZE_WORD_PROBABILITY = 0.6
NUMBERS = ("zero", "one", "two", "three", "four", "five")
PLACES = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the middle",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def holds(first: Thing, relation: str, second: Thing) -> bool:
    """Relations are those of the cells; of a diagonal pair two are true."""
    match relation:
        case "left of":
            return first.column < second.column
        case "right of":
            return first.column > second.column
        case "above":
            return first.row < second.row
        case "below":
            return first.row > second.row
    raise ValueError(f"relation is {relation!r}; expected one of {', '.join(RELATIONS)}.")


class Description(NamedTuple):
    """A thing as a caption names it; None where the caption does not say."""

    colour: int
    shape: int
    size: int | None = None
    cell: int | None = None

    def fits(self, thing: Thing) -> bool:
        return (
            (self.colour, self.shape) == (thing.colour, thing.shape)
            and self.size in (None, thing.size)
            and self.cell in (None, thing.cell)
        )

    def words(self) -> str:
        """`small red circle`"""
        size = "" if self.size is None else SIZES[self.size] + " "
        return f"{size}{COLOURS[self.colour]} {SHAPES[self.shape]}"


class Caption(NamedTuple):
    """A sentence and what it claims: things, a relation of the first to the second, a total."""

    text: str
    things: tuple[Description, ...]
    relation: str | None = None
    count: int | None = None


def satisfies(scene: Scene, caption: Caption) -> bool:
    """Whether the caption is true of the scene. Colour and shape name a thing, so there is nothing to search."""
    if caption.count is not None and caption.count != len(scene):
        return False
    by_look = {(thing.colour, thing.shape): thing for thing in scene}
    found = [by_look.get((description.colour, description.shape)) for description in caption.things]
    if any(t is None or not d.fits(t) for t, d in zip(found, caption.things, strict=True)):
        return False
    return caption.relation is None or holds(found[0], caption.relation, found[1])


def article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def listed(things: tuple[Description, ...]) -> str:
    """`a red circle`, `a red circle and a blue square`, `a red circle, a blue square and a gray cross`"""
    names = [article(thing.words()) for thing in things]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def say(grammar: str, things: tuple[Description, ...], relation: str | None = None) -> Caption:
    """The sentence of a grammar over described things."""
    match grammar:
        case "list":
            return Caption(listed(things), things)
        case "relation":
            first, second = things
            return Caption(f"{article(first.words())} {relation} {article(second.words())}", things, relation)
        case "position":
            (thing,) = things
            return Caption(f"{article(thing.words())} {PLACES[thing.cell]}", things)
        case "count":
            number = NUMBERS[len(things)]
            return Caption(f"{number} object{'s' * (len(things) > 1)}: {listed(things)}", things, count=len(things))
        case "short":
            (thing,) = things
            return Caption(article(thing.words()), things)
    raise ValueError(f"grammar is {grammar!r}; expected one of {', '.join(GRAMMARS)}.")


def describe(thing: Thing, size: bool, cell: bool = False) -> Description:
    return Description(thing.colour, thing.shape, thing.size if size else None, thing.cell if cell else None)


def random_caption(scene: Scene, level: str, random: np.random.Generator) -> Caption:
    """A caption for training: a random grammar, the size word with probability 0.6, things in random order."""
    full = LEVELS[checked(level, LEVELS, "level")].relations_only
    numbers = random.random(3 + len(scene)).tolist()
    grammars = [g for g in GRAMMARS if g != "relation" or len(scene) > 1]
    grammar = "relation" if full else grammars[int(numbers[0] * len(grammars))]
    order = [scene[i] for i in random.permutation(len(scene))]
    order = order[: {"relation": 2, "position": 1, "short": 1}.get(grammar)]
    things = tuple(
        describe(thing, full or number < SIZE_WORD_PROBABILITY, cell=grammar == "position")
        for thing, number in zip(order, numbers[3:], strict=False)
    )
    relation = None
    if grammar == "relation":
        true = [r for r in RELATIONS if holds(order[0], r, order[1])]
        relation = true[int(numbers[1] * len(true))]
    return say(grammar, things, relation)


def fixed_captions(scene: Scene) -> list[Caption]:
    """Five captions for evaluation, one a grammar (of a lone thing the list twice), with all sizes."""
    plain = tuple(describe(thing, size=True) for thing in scene)
    captions = []
    for grammar in GRAMMARS:
        if grammar == "relation" and len(scene) > 1:
            captions.append(canonical_caption(scene))
        elif grammar in ("position", "short"):
            captions.append(say(grammar, (describe(scene[0], size=True, cell=grammar == "position"),)))
        else:
            captions.append(say("list" if grammar == "relation" else grammar, plain))
    return captions


def canonical_caption(scene: Scene) -> Caption:
    """The one caption that names a scene in retrieval: two things whole and their relation, or the list of one."""
    if len(scene) == 1:
        return say("list", (describe(scene[0], size=True),))
    first, second = scene[:2]
    relation = next(r for r in RELATIONS if holds(first, r, second))
    return say("relation", (describe(first, size=True), describe(second, size=True)), relation)


def corrupt(caption: Caption, scene: Scene, level: str, random: np.random.Generator) -> Caption:
    """A caption that is false of the scene and differs in one attribute of one thing, or in the relation."""
    settings = LEVELS[level]
    grammar = grammar_of(caption)
    while True:
        which, what = random.integers(len(caption.things)), random.random()
        things, relation = list(caption.things), caption.relation
        thing = things[which]
        if relation is not None and what < 0.25:
            relation = OPPOSITE[relation]
        elif thing.size is not None and what < 0.5:
            things[which] = thing._replace(size=1 - thing.size)
        elif what < 0.75:
            things[which] = thing._replace(colour=int(random.integers(settings.colours)))
        else:
            things[which] = thing._replace(shape=int(random.integers(settings.shapes)))
        false = say(grammar, tuple(things), relation)
        if len({(t.colour, t.shape) for t in things}) == len(things) and not satisfies(scene, false):
            return false


def grammar_of(caption: Caption) -> str:
    """The grammar that `say` needs to write the caption again."""
    if caption.relation is not None:
        return "relation"
    if caption.count is not None:
        return "count"
    return "position" if caption.things[0].cell is not None else "list"
