"""Variants of a recipe: a path names a value in it, and the value is replaced.

A path is ``parameters.scale``, ``models.<alias>.<parameter>``, ``rules.<number>.<key>`` (``rules.1.parameters.ratio``)
or a key of the recipe (``merge_method``). ``lambda``, ``weight`` and ``t`` are understood as in recipes.
"""

from collections.abc import Mapping
from typing import Any

from .errors import MergeError, nearest
from .recipe import Recipe
from .registry import ALIASES


def starting_point(recipe: Recipe, path: str, low: float, high: float) -> float:
    """Where the recipe itself stands between the bounds, else their middle."""
    value: Any = recipe.to_dict()
    for part in steps(value, path):
        value = value.get(part) if isinstance(value, dict) else value[part] if isinstance(value, list) else None
    inside = isinstance(value, int | float) and low <= value <= high
    return (value - low) / (high - low) if inside else 0.5


def changed(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """A copy of the recipe with some of its values replaced; paths as in :func:`sweep`."""
    content = recipe.to_dict()
    for path, value in settings.items():
        *above, last = steps(content, path)
        place = content
        for part in above:
            place = place[part] if isinstance(place, list) else place.setdefault(part, {})
            if not isinstance(place, dict | list):
                raise MergeError(f"{path}: {part} is {place!r}, in which nothing can be set")
        if isinstance(place, list) and not isinstance(last, int):
            raise MergeError(f"{path}: a list has no {last!r}")
        place[last] = value
    return Recipe.from_dict(content)


def steps(content: Mapping[str, Any], path: str) -> list[str | int]:
    """A path's steps into a recipe's content: aliases and numbers become indices, parameters get their own names."""
    head, *rest = path.split(".")
    if head == "models":
        aliases = [m["alias"] for m in content.get("models", ())]
        if len(rest) < 2 or rest[0] not in aliases:
            wrong = nearest(rest[0], aliases) if rest else ""
            raise MergeError(f"{path}: a path to a model is models.<alias>.<parameter>{wrong}")
        rest = rest if rest[1] == "parameters" else [rest[0], "parameters", *rest[1:]]
        return ["models", aliases.index(rest[0]), "parameters", *named(rest[2:])]
    if head == "rules":
        count = len(content.get("rules", ()))
        if len(rest) < 2 or not rest[0].isdigit() or not 1 <= int(rest[0]) <= count:
            raise MergeError(f"{path}: a path to a rule is rules.<number>.<key>, numbers from 1 to {count}")
        return ["rules", int(rest[0]) - 1, *([rest[1], *named(rest[2:])] if rest[1] == "parameters" else rest[1:])]
    return [head, *named(rest)]


def named(parts: list[str]) -> list[str | int]:
    """Parameters by their own names (lambda, weight, t are aliases); places in a list as numbers."""
    return [
        ALIASES.get(part, part) if i == 0 else int(part) if part.isdigit() else part for i, part in enumerate(parts)
    ]
