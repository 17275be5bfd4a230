"""Rows by token: the embeddings of two models whose tokenizers number the tokens differently.

The vocabulary of a tokenizer is read as data from tokenizer.json, vocab.json or vocab.txt beside the weights.
"""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import MergeError
from .sources import TensorSource
from .views import View, read_rows

FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
RENAMED = 0.01  # share of rows that may have another token without being taken for another vocabulary
Vocabulary = Mapping[str, int]  # token -> row


def vocabulary_of(source: TensorSource) -> dict[str, int]:
    """Token -> row, from the first of tokenizer.json, vocab.json and vocab.txt that the source carries.

    Raises MergeError where there is none, or where it is damaged.
    """
    for name in FILES:
        if name in source.side_files:
            try:
                return READERS[name](source.side_files[name], source.side_files)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise MergeError(f"{source.label}: {name} is no vocabulary ({type(error).__name__}: {error})") from None
    raise MergeError(f"{source.label} carries no vocabulary ({', '.join(FILES)}); rows cannot be matched by token")


def has_vocabulary(source: TensorSource) -> bool:
    return any(name in source.side_files for name in FILES)


def read_tokenizer_json(path: Path, _: Mapping[str, Path]) -> dict[str, int]:
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [token, score] in order of rows
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{t["content"]: int(t["id"]) for t in content.get("added_tokens") or ()}}


def read_vocab_json(path: Path, beside: Mapping[str, Path]) -> dict[str, int]:
    vocabulary = json.loads(path.read_text(encoding="utf-8"))
    added = beside.get("added_tokens.json")
    extra = json.loads(added.read_text(encoding="utf-8")) if added else {}
    return {str(token): int(row) for token, row in {**vocabulary, **extra}.items()}


def read_vocab_txt(path: Path, _: Mapping[str, Path]) -> dict[str, int]:
    return {token: i for i, token in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"))}


READERS = {"tokenizer.json": read_tokenizer_json, "vocab.json": read_vocab_json, "vocab.txt": read_vocab_txt}


def conflicts(first: Vocabulary, second: Vocabulary) -> list[str]:
    """Tokens of the first that must not be merged row by row: those of another row in the second, and those whose row
    is another token there, if these are more than a few (``RENAMED``: reserved tokens are often given other names)."""
    moved = [token for token, row in first.items() if second.get(token, row) != row]
    at = {row: token for token, row in second.items()}
    replaced = [token for token, row in first.items() if token not in second and row in at]
    return moved + (replaced if len(replaced) > RENAMED * min(len(first), len(second)) else [])


class RowMappedSource(View):
    """A source whose tensors of tokens (names that match ``match``, tokens on the first axis) follow the rows of
    another source's vocabulary.

    Row i of the result is this source's row for the token of row i in ``reference``. Where this source has no such
    token, ``missing`` says what stands there: "keep" the reference's own row, "mean" the mean of this source's matched
    rows. Rows of the reference beyond its vocabulary (padding) are always the reference's own.
    """

    def __init__(self, source: TensorSource, reference: TensorSource, match: tuple[str, ...], missing: str) -> None:
        super().__init__(source)
        self.reference, self.missing = reference, missing
        self.own, self.theirs = vocabulary_of(source), vocabulary_of(reference)
        self.mapped = [k for k in source if k in reference and any(fnmatchcase(k, glob) for glob in match)]
        if not self.mapped:
            both = f"{source.label} and {reference.label}"
            raise MergeError(f"vocabulary: no tensor that {both} have matches {', '.join(match)}")
        self.rows = {key: self.row_map(key) for key in self.mapped}
        self.means: dict[str, Tensor] = {}
        self.notes = (*source.notes, self.describe())

    def row_map(self, key: str) -> np.ndarray:
        """For each row of the result: the row of this source, -1 (a token it lacks) or -2 (no token)."""
        ours, theirs = self.source.shape(key), self.reference.shape(key)
        if ours[1:] != theirs[1:] or not ours:
            raise MergeError(f"{key}: only the number of rows may differ between vocabularies, not {ours} and {theirs}")
        rows = np.full(theirs[0], -2, dtype=np.int64)
        for token, row in self.theirs.items():
            if row < theirs[0]:
                found = self.own.get(token, -1)
                rows[row] = found if found < ours[0] else -1
        return rows

    def describe(self) -> str:
        absent = sum(token not in self.own for token in self.theirs)
        dropped = sum(token not in self.theirs for token in self.own)
        filled = {"keep": f"as {self.reference.label} has them", "mean": "as the mean of the others"}[self.missing]
        return (
            f"{self.label}: rows of {', '.join(self.mapped)} follow the vocabulary of {self.reference.label}: "
            f"{len(self.theirs) - absent} tokens matched, {absent} missing (taken {filled}), {dropped} left out"
        )

    def shape(self, key: str) -> tuple[int, ...]:
        return self.reference.shape(key) if key in self.rows else super().shape(key)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        if key not in self.rows:
            return super().read(key, start, stop)
        stop = self.numel(key) if stop is None else stop
        columns = self.numel(key) // self.shape(key)[0]
        first, last = start // columns, -(-stop // columns)
        rows = self.rows[key][first:last]
        values = torch.empty(len(rows), columns)
        for kind, read in ((rows >= 0, self.own_rows), (rows == -1, self.missing_rows), (rows == -2, self.their_rows)):
            if kind.any():
                values[torch.from_numpy(kind)] = read(key, first + np.flatnonzero(kind)).float()
        return values.reshape(-1)[start - first * columns : stop - first * columns]

    def extent(self, key: str) -> tuple[int, int] | None:
        return None if key in self.rows else super().extent(key)

    def own_rows(self, key: str, at: np.ndarray) -> Tensor:
        return read_rows(self.source, key, self.rows[key][at])

    def their_rows(self, key: str, at: np.ndarray) -> Tensor:
        return read_rows(self.reference, key, at)

    def missing_rows(self, key: str, at: np.ndarray) -> Tensor:
        return self.their_rows(key, at) if self.missing == "keep" else self.mean(key).expand(len(at), -1)

    def mean(self, key: str) -> Tensor:
        """The mean of the rows that were matched, added up in float64 in the order of rows."""
        if key not in self.means:
            matched = self.rows[key][self.rows[key] >= 0]
            if not matched.size:
                raise MergeError(f"{self.label}: no token of {self.reference.label} is known, so there is no mean row")
            parts = np.array_split(matched, -(-matched.size // 1024))
            total = sum(read_rows(self.source, key, part).double().sum(0) for part in parts)
            self.means[key] = (total / matched.size).float()
        return self.means[key]
