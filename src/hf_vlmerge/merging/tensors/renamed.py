"""A source under other names: a submodule of one model stands where another model has it."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..errors import MergeError, closest
from .sources import TensorSource
from .views import View

Renaming = Mapping[str, str | None]  # pattern -> pattern with as many stars; None: the tensor is left out


class RenamedSource(View):
    """Names are mapped by patterns, in order; the first that matches wins, and a name that none matches stays.

    ``{"model.*": "language_model.model.*", "score.*": None}``: each star of a pattern takes any text, and the stars of
    the new name receive the same texts in order. A pattern whose new name is None leaves the tensor out.

    Raises MergeError for a pattern that matches nothing, and where two tensors would get the same name.
    """

    def __init__(self, source: TensorSource, rename: Renaming) -> None:
        super().__init__(source)
        patterns = {old: (as_regex(old), new) for old, new in rename.items()}
        used: dict[str, tuple[str, str | None]] = {}  # pattern -> an example
        counts = dict.fromkeys(rename, 0)
        kept: list[str] = []
        self.names: dict[str, str] = {}  # new -> old
        for key in source:
            old, new = apply_first(key, patterns)
            if old is None:
                kept.append(key)
            else:
                counts[old] += 1
                used.setdefault(old, (key, new))
            if new is None:
                continue
            if new in self.names:
                raise MergeError(f"{source.label}: rename gives {self.names[new]} and {key} the same name {new}")
            self.names[new] = key
        unused = next((old for old in rename if not counts[old]), None)
        if unused is not None:
            raise MergeError(f"{source.label}: rename: {unused!r} matches no tensor{closest(unused, source)}")
        back = {old: new for new, old in self.names.items()}
        groups = (tuple(back[k] for k in keys if k in back) for keys in source.tied)
        self.tied = tuple(keys for keys in groups if len(keys) > 1)
        self.notes = (*source.notes, *self.describe(counts, used, kept))

    def describe(self, counts: Mapping[str, int], used: Mapping, kept: list[str]) -> Iterator[str]:
        for pattern, (old, new) in used.items():
            what = f"are left out, such as {old}" if new is None else f"are renamed, such as {old} to {new}"
            yield f"{self.label}: {pattern}: {counts[pattern]} tensors {what}"
        if kept:
            yield f"{self.label}: {len(kept)} tensors match no pattern and keep their names, such as {kept[0]}"

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, key: object) -> bool:
        return key in self.names

    def __len__(self) -> int:
        return len(self.names)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.source.shape(self.names[self.require(key)])

    def dtype(self, key: str) -> torch.dtype:
        return self.source.dtype(self.names[self.require(key)])

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.source.read(self.names[self.require(key)], start, stop)

    def extent(self, key: str) -> tuple[int, int] | None:
        return self.source.extent(self.names[self.require(key)])


def as_regex(pattern: str) -> re.Pattern[str]:
    return re.compile("(.*)".join(re.escape(part) for part in pattern.split("*")))


def apply_first(key: str, patterns: Mapping[str, tuple[re.Pattern[str], str | None]]) -> tuple[str | None, str | None]:
    """The first pattern that matches a name, and the new name; (None, name) where none does."""
    for old, (regex, new) in patterns.items():
        found = regex.fullmatch(key)
        if found:
            return old, None if new is None else fill(new, found.groups())
    return None, key


def fill(pattern: str, texts: tuple[str, ...]) -> str:
    parts = pattern.split("*")
    return "".join(part + text for part, text in zip(parts, (*texts, ""), strict=True))


def check_renaming(rename: Renaming, where: str) -> None:
    """A new name has as many stars as its pattern, or no star at all is lost or invented."""
    for old, new in rename.items():
        if new is not None and old.count("*") != new.count("*"):
            raise MergeError(
                f"{where}: rename: {old!r} and {new!r} must have the same number of stars, found "
                f"{old.count('*')} and {new.count('*')}"
            )
