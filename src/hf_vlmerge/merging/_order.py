"""Order statistics of magnitudes, exactly: of a tensor or of the whole model, whatever the size of its chunks.

A sample of the entries gives a bracket for each rank that is wanted. A pass over all of them counts what lies above a
bracket and gathers what lies in it, to be sorted in part; the one value that is likely is only counted, since numbers
of few bits tie at it by the million. Where a bracket holds too much, of whole models above all, passes count what falls
into each of its bins, and narrow it until it holds one bit pattern. A bracket that misses is found out by its own
counts, so the sample can cost a pass, never the result.

On the CPU counting is done in NumPy: its comparisons into bool and selections by bool are much faster.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import ceil, sqrt
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._compiled import split_stored
from .registry import Chunk, Counts, Gather, Sample, Stored, WholeModel

Scope = Literal["tensor", "global"]
Values = Callable[[Chunk], Tensor]  # what a program asks about: (rows, n), for example one row a member
Ranks = Callable[[int, int], list[int]]  # of a row and its number of entries: 1 is the largest, 0 is infinity

INFINITY = 0x7F800000  # as the bits of a float32; the bits of non-negative values are ordered like the values
NONE = -1  # as the bits of a float32: a NaN, which no value equals
BINS = 1 << 16
OCTAVE, FIRST, SAMPLED = 8, 99 << 8, 1 << 13  # bins an octave as a power of two; 32 octaves from 2^-28 on
COARSE = 5  # the same of a sample that is at hand
GATHERED = 1 << 22  # values that are held at once to be sorted in part
THINNED = 1 << 12  # of a chunk that is no sample itself, about so many values are one


class Bracket(NamedTuple):
    """Bit patterns ``low`` to ``high``, both included, among which the value of ``rank`` (1: the largest) is sought.

    ``likely`` is the pattern it has by the sample. About ``expected`` other values lie in the bracket.
    """

    rank: int
    low: int
    high: int
    likely: int = NONE
    expected: int = 0

    @property
    def is_open(self) -> bool:
        return self.low < self.high or self.likely != NONE

    @property
    def shift(self) -> int:
        """Patterns share a bin where they agree but for this many bits."""
        return max(0, (self.high - self.low).bit_length() - BINS.bit_length() + 1)

    def between(self, low: int, high: int) -> "Bracket":
        return Bracket(self.rank, low, high)

    def above(self) -> "Bracket":
        return self.between(self.high + 1, INFINITY)

    def below(self) -> "Bracket":
        """What lies below; where only zeros do, their pattern."""
        return self.between(0, max(self.low - 1, 0))

    def without_guess(self) -> "Bracket":
        return self.between(max(self.low - 1, 0), self.high) if self.likely != NONE else self


Brackets = list[list[Bracket]]  # one list a row of values


def magnitudes(c: Chunk) -> Tensor:
    """|members|, one row a member."""
    return c.x.abs()


def delta_magnitudes(c: Chunk) -> Tensor:
    """|members - base|, one row a member; uses the chunk up."""
    return c.deltas_().abs_()


def kth_magnitude(
    keep: Sequence[float], scope: Scope, values: Values = magnitudes
) -> Generator[Any, tuple[Tensor, ...], Tensor]:
    """Program: the smallest magnitude among the ``keep`` share of largest ones, exactly, (members,) float32.

    Its rank is k = max(1, int(keep * entries)); of a share of 0 it is infinity.
    """
    ranks = lambda row, entries: [max(1, int(keep[row] * entries)) if keep[row] > 0 else 0]  # noqa: E731
    return (yield from kth_largest(values, ranks, scope))[:, 0]


def kth_largest(
    values: Values, ranks: Ranks, scope: Scope = "tensor", *, rows: bool = False
) -> Generator[Any, tuple[Tensor, ...], Tensor]:
    """Program: the values of given ranks, exactly, (rows, ranks) float32; values are not negative.

    ``rows``: a value depends on its whole row, not on its own entry alone.
    """
    flat = (lambda c: values(c).flatten(1)) if rows else (lambda c: values(flattened(c)))
    stored = not rows and values in (magnitudes, delta_magnitudes)  # known to the compiled form
    split = partial(split_run, flat, values is delta_magnitudes)
    if scope == "tensor":
        brackets = yield from selected(flat, split, ranks, rows, stored)
    else:
        counts, entries, count = yield WholeModel(Sample(Counts(lambda chunks: binned(flat, chunks)), rows))
        known = zip(counts.numpy(), entries.tolist(), count.tolist(), strict=True)
        brackets = [[from_bins(own, n, of, rank) for rank in ranks(i, n)] for i, (own, n, of) in enumerate(known)]
    while any(b.is_open for row in brackets for b in row):
        parts = partial(split, limits_of(brackets))
        request = Counts(lambda chunks: (counted((parts(c) for c in chunks), brackets),), stored)  # noqa: B023
        (counts,) = yield WholeModel(request) if scope == "global" else request
        brackets = [
            [narrowed(b, n) for b, n in zip(row, own, strict=True)]
            for row, own in zip(brackets, counts.numpy(), strict=True)
        ]
    return as_values([[b.low for b in row] for row in brackets])


def flattened(c: Chunk) -> Chunk:
    """The chunk as unit "element" shows it."""
    return c if c.x.ndim == 2 else replace(c, x=c.x.flatten(1), base=None if c.base is None else c.base.flatten())


def as_values(patterns: Any) -> Tensor:
    return torch.tensor(patterns, dtype=torch.int32).view(torch.float32)


# Brackets from a sample


def binned(flat: Values, chunks: Iterable[Chunk]) -> tuple[Tensor, ...]:
    """Counts of sampled values by their upper bits (rows, SAMPLED), each as many as it stands for; how many entries
    they stand for, and how many were sampled (rows,)."""
    sums: tuple[Tensor, ...] = ()
    for c in chunks:
        values, entries = thinned(flat(c), c)
        bins = (values.contiguous().cpu().view(torch.int32) >> (23 - OCTAVE)).sub_(FIRST).clamp_(0, SAMPLED - 1)
        counts = torch.stack([torch.bincount(row, minlength=SAMPLED) for row in bins])
        rows, count = values.shape
        own = (counts * round(entries / max(1, count)), torch.full((rows,), entries), torch.full((rows,), count))
        sums = tuple(a + b for a, b in zip(sums, own, strict=True)) if sums else own
    return sums


def thinned(values: Tensor, c: Chunk) -> tuple[Tensor, int]:
    """A sample of a chunk's values, which outlasts it, and the number of entries it stands for."""
    if c.stands_for:
        return values, c.stands_for
    return values[:, :: max(1, values.shape[1] // THINNED)].clone(), values.shape[1]


def margin(sampled: int, entries: int, share: float) -> float:
    """Three standard deviations of a rank in a sample; none where all is sampled."""
    return 0.0 if sampled == entries else 3 * sqrt(sampled * share * (1 - share)) + 2


def from_bins(counts: np.ndarray, entries: int, sampled: int, rank: int) -> Bracket:
    """Where the value of a rank should lie, by counts in bins."""
    if rank < 1 or not sampled:
        return Bracket(rank, INFINITY, INFINITY)
    total, share = int(counts.sum()), min(rank / entries, 1.0)
    side = margin(sampled, entries, share) / sampled
    above = np.cumsum(counts[::-1])  # from the largest bin down
    limits = np.clip([(share - side) * total, (share + side) * total], 1, total)
    upper, lower = (SAMPLED - 1 - np.searchsorted(above, limits)).tolist()
    low = 0 if lower == 0 else (FIRST + lower) << (23 - OCTAVE)
    high = INFINITY if upper == SAMPLED - 1 else ((FIRST + upper + 1) << (23 - OCTAVE)) - 1
    return Bracket(rank, low, high)


def from_sample(sampled: np.ndarray, entries: int, rank: int) -> Bracket:
    """Where the value of a rank should lie, by sampled values."""
    n = len(sampled)
    if rank < 1 or not n:
        return Bracket(rank, INFINITY, INFINITY)
    share = min(rank / entries, 1.0)
    place, side = share * n, margin(n, entries, share)
    first, last = ceil(place - side) - 1, ceil(place + side) - 1  # from the largest down
    start, stop = max(first, 0), min(last, n - 1) + 1
    patterns = np.minimum(sampled.view(np.int32), INFINITY)  # where NaN is allowed, it counts as infinity here
    inside = part_of_sorted(patterns, start, stop)
    likely = int(inside[min(max(ceil(place) - 1, 0), n - 1) - start])
    low = 0 if last >= n else int(inside[-1])
    high = INFINITY if first < 0 else int(inside[0])
    return Bracket(rank, low, high, likely, round(np.count_nonzero(inside != likely) * entries / n))


def part_of_sorted(patterns: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Some of the patterns in descending order. Only what shares a bin with these is sorted: it costs seven times as
    much as to count where a processor is slow at moving elements within vectors."""
    bins = patterns >> (23 - COARSE)
    counts = np.bincount(bins)
    upto = counts[::-1].cumsum()  # patterns in a bin or a higher one, from the highest down
    top, bottom = (len(counts) - 1 - np.searchsorted(upto, [start, stop - 1], side="right")).tolist()
    above = int(upto[len(counts) - 1 - top] - counts[top])
    return np.sort(patterns[(bins >= bottom) & (bins <= top)])[::-1][start - above : stop - above]


# By selection


def selected(
    flat: Values, split: "Split", ranks: Ranks, rows: bool, stored: bool
) -> Generator[Any, tuple[Tensor, ...], Brackets]:
    """Program: brackets at the values of their ranks over a tensor; open where they missed, or hold too much."""
    sampled, entries = yield Sample(Gather(lambda chunks: joined([thinned(flat(c), c) for c in chunks])), rows)
    n = int(entries.sum())
    brackets = [[from_sample(row, n, rank) for rank in ranks(i, n)] for i, row in enumerate(sampled.numpy())]
    if sum(b.expected for row in brackets for b in row) > GATHERED:
        return [[b.without_guess() for b in row] for row in brackets]
    if not any(b.is_open for row in brackets for b in row):
        return brackets
    parts = partial(split, limits_of(brackets))
    above, ties, *found = yield Gather(lambda chunks: gathered([parts(c) for c in chunks]), stored)
    each = (b for row in brackets for b in row)
    chosen = map(select, each, above.sum(1).tolist(), ties.sum(1).tolist(), found)
    return [[next(chosen) for _ in row] for row in brackets]


def joined(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Samples of several chunks as one, and the number of entries they stand for."""
    return torch.cat([values for values, _ in samples], 1), torch.tensor([sum(entries for _, entries in samples)])


Part = tuple[int, int, np.ndarray]
Split = Callable[[np.ndarray, Chunk | Stored], list[Part]]


def limits_of(brackets: Brackets) -> np.ndarray:
    """Each bracket's lowest value but zero, its highest and its likely one: (rows, ranks, 3) float32."""
    patterns = [[(max(b.low, 1), b.high, b.likely) for b in row] for row in brackets]
    return np.array(patterns, np.int32).view(np.float32)


def split_run(flat: Values, deltas: bool, limits: np.ndarray, c: Chunk | Stored) -> list[Part]:
    """For every bracket, row by row: how many of the row's values lie above it, how many are the likely one, and the
    others in it but for zeros."""
    if isinstance(c, Stored):
        return split_stored(c, deltas, limits)
    rows = flat(c)
    rows, divide = (rows.numpy(), divided) if rows.is_cpu else (rows, divided_on_gpu)
    columns = [divide(rows, *own) for own in limits.transpose(1, 2, 0)[..., None]]
    return [part for parts in zip(*columns, strict=True) for part in parts]


def divided(rows: np.ndarray, low: np.ndarray, high: np.ndarray, likely: np.ndarray) -> list[Part]:
    """One bracket a row, its limits (rows, 1)."""
    above, inside, ties = rows > high, rows >= low, rows == likely
    inside ^= above
    np.greater(inside, ties, out=inside)  # in it, and not the likely value
    return list(zip(map(np.count_nonzero, above), map(np.count_nonzero, ties), picked(rows, inside), strict=True))


def divided_on_gpu(rows: Tensor, low: np.ndarray, high: np.ndarray, likely: np.ndarray) -> list[Part]:
    """The same where the rows are."""
    low, high, likely = (torch.from_numpy(limit).to(rows.device) for limit in (low, high, likely))
    above, ties = rows > high, rows == likely
    inside = (rows >= low) & ~above & ~ties
    counts = torch.stack([above.sum(1), ties.sum(1)], 1).tolist()
    return [(*own, row[own_inside].cpu().numpy()) for own, row, own_inside in zip(counts, rows, inside, strict=True)]


def picked(rows: np.ndarray, inside: np.ndarray) -> list[np.ndarray]:
    """The values of each row that are inside. They are few, so most places are looked at eight at a time."""
    starts = np.arange(len(rows) + 1) * rows.shape[1]
    if rows.shape[1] % 8 == 0:
        words = np.flatnonzero(inside.view(np.uint64) != 0)
        rows, inside = rows.reshape(-1, 8).take(words, 0), inside.reshape(-1, 8).take(words, 0)
        starts = 8 * np.searchsorted(words, starts // 8)
    places = np.flatnonzero(inside)
    found = rows.reshape(-1).take(places)
    return [found[a:b] for a, b in pairwise(np.searchsorted(places, starts).tolist())]


def gathered(parts: list[list[Part]]) -> tuple[Tensor, ...]:
    """Of several chunks: how many values lie above each bracket and how many are the likely one (brackets, 1), then
    the others in it."""
    above, ties, found = zip(*(zip(*own, strict=True) for own in zip(*parts, strict=True)), strict=True)
    counts = (torch.tensor([[sum(own)] for own in counts]) for counts in (above, ties))
    return *counts, *(torch.from_numpy(np.concatenate(own)) for own in found)


def select(b: Bracket, above: int, ties: int, found: Tensor) -> Bracket:
    """The bracket at the value of its rank, or where that must be if it was missed."""
    inside = found.numpy()
    if not b.is_open:
        return b
    if b.rank <= above:
        return b.above()
    if b.rank > above + ties + len(inside):
        return b.below()
    larger = np.count_nonzero(inside.view(np.int32) > b.likely)
    if above + larger < b.rank <= above + larger + ties:
        return b.between(b.likely, b.likely)
    place = len(inside) - (b.rank - above if b.rank <= above + larger else b.rank - above - ties)
    inside.partition(place)
    value = int(inside[place : place + 1].view(np.int32)[0])
    return b.between(value, value)


# By counting


def counted(found: Iterable[list[Part]], brackets: Brackets) -> Tensor:
    """For each row and bracket how many values lie above it, then how many in each of its bins.

    (rows, ranks, 1 + BINS).
    """
    each = [b for row in brackets for b in row]
    result = np.zeros((len(each), 1 + BINS), np.int64)
    for own, b, parts in zip(result, each, zip(*found, strict=True), strict=True):
        own[0] = sum(above for above, _, _ in parts)
        if b.is_open:
            patterns = np.concatenate([inside for _, _, inside in parts]).view(np.int32) - np.int32(b.low)
            own[1:] = np.bincount(patterns >> b.shift, minlength=BINS)
    return torch.from_numpy(result.reshape(len(brackets), -1, 1 + BINS))


def narrowed(b: Bracket, counts: np.ndarray) -> Bracket:
    """The bin of the bracket that holds the rank, or what lies above or below a bracket that missed."""
    if not b.is_open:
        return b
    above = counts[0] + np.cumsum(counts[:0:-1])  # values in this bin or a higher one, from the highest down
    if b.rank <= counts[0]:
        return b.above()
    if b.rank > above[-1]:
        return b.below()
    low = b.low + ((BINS - 1 - int(np.searchsorted(above, b.rank))) << b.shift)
    return b.between(low, min(b.high, low + (1 << b.shift) - 1))
