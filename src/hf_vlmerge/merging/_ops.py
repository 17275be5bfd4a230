"""Arithmetic shared by methods and distances. Every function gives the same bits for every chunk size.

Sums over members are written as loops of ``*`` and ``+``: matrix products and fused multiply-adds may differ in the
last bit with the length of a chunk. Masks are float tensors of zeros and ones (``ge_``, ``gt_``): torch compares into
floats several times faster than into bool, and multiplies by them faster still. A name that ends in ``_`` works in
place.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from itertools import combinations_with_replacement
from math import inf, sqrt
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .registry import Chunk, Counts, Gather, MergeError, Program, Sample, WholeModel

Scope = Literal["tensor", "global"]
Values = Callable[[Chunk], Tensor]  # what a program asks about: (rows, n), for example one row a member


# Sums over members


def weighted_sum(x: Tensor, weights: Sequence[float | Tensor]) -> Tensor:
    """Sum of ``weights[i] * x[i]`` in member order; x (members, ...). Tensor weights must broadcast to ``x[0]``."""
    first, *others = x.unbind()
    result = first * weights[0]
    for member, weight in zip(others, weights[1:], strict=True):
        result += member if isinstance(weight, float) and weight == 1 else member * weight
    return result


def weighted_sum_(x: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """The same in the place of ``x``, which is used up; without weights all are one."""
    total, *others = x.unbind() if weights is None else weigh_(x.unbind(), weights)
    for member in others:
        total += member
    return total


def plain_sum(x: Tensor) -> Tensor:
    """Sum over members, in their order."""
    first, *others = x.unbind()
    result = first + others[0] if others else first.clone()
    for member in others[1:]:
        result += member
    return result


def mean(x: Tensor) -> Tensor:
    """Plain mean over members."""
    return weighted_sum(x, [1 / len(x)] * len(x))


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum, which must not vanish."""
    total = sum(weights)
    if abs(total) < 1e-8:
        raise MergeError(f"weights {list(weights)} sum to zero and cannot be normalised")
    return [w / total for w in weights]


def weigh_(x: Iterable[Tensor], weights: Sequence[float]) -> Iterable[Tensor]:
    """``weights[i] * x[i]`` for every member."""
    for member, weight in zip(x, weights, strict=True):
        if weight != 1:
            member.mul_(weight)
    return x


# Inner products


def from_base(c: Chunk) -> Tensor:
    """Members minus the base where there is one, else the members."""
    return c.x if c.base is None else c.deltas()


def dots(c: Chunk) -> tuple[Tensor]:
    """Reduction: inner products of all members, (members, members) float64."""
    return (products(c.x),)


def dots_from_base(c: Chunk) -> tuple[Tensor]:
    """Reduction: inner products of all members minus the base (where there is one), (members, members) float64."""
    return (products(from_base(c)),)


def products(x: Tensor, dim: int | None = None) -> Tensor:
    """Inner products of x[i] and x[j] over everything or over one dimension of a member: (members, members, ...)."""
    x, count = x.double(), len(x)
    rows = [
        [(x[i] * x[j]).sum() if dim is None else (x[i] * x[j]).sum(dim) for j in range(i + 1)] for i in range(count)
    ]
    gram = torch.empty(count, count, *rows[0][0].shape, dtype=torch.float64, device=x.device)
    for i, j in combinations_with_replacement(range(count), 2):
        gram[i, j] = gram[j, i] = rows[j][i]
    return gram


# Order statistics of magnitudes, exactly

INFINITY = 0x7F800000  # as the bits of a float32; the bits of non-negative values are ordered like the values
BINS = 1 << 16
OCTAVE, FIRST, SAMPLED = 8, 99 << 8, 1 << 13  # bins an octave as a power of two; 32 octaves from 2^-28 on
GATHERED = 1 << 22  # values that are held at once to be sorted in part


class Bracket(NamedTuple):
    """Bit patterns ``low`` to ``high``, both included, among which the value of ``rank`` (1: the largest) is sought.

    About ``expected`` values lie in it, as far as is known.
    """

    rank: int
    low: int
    high: int
    expected: int = 0

    @property
    def shift(self) -> int:
        """Patterns share a bin where they agree but for this many bits."""
        return max(0, (self.high - self.low).bit_length() - BINS.bit_length() + 1)

    @property
    def is_open(self) -> bool:
        return self.low < self.high

    def at(self, pattern: int) -> "Bracket":
        return self._replace(low=pattern, high=pattern, expected=0)

    def above(self) -> "Bracket":
        return self._replace(low=self.high + 1, high=INFINITY, expected=GATHERED)

    def below(self) -> "Bracket":
        """What lies below; where only zeros do, their pattern."""
        return self._replace(low=0, high=max(self.low - 1, 0), expected=GATHERED)


Brackets = list[list[Bracket]]  # one list a row of values


def magnitudes(c: Chunk) -> Tensor:
    """|members|, one row a member."""
    return c.x.abs()


def delta_magnitudes(c: Chunk) -> Tensor:
    """|members - base|, one row a member."""
    return c.deltas().abs_()


def kth_magnitude(
    keep: Sequence[float], scope: Scope, values: Values = magnitudes
) -> Generator[Any, tuple[Tensor, ...], Tensor]:
    """Program: the smallest magnitude among the ``keep`` share of largest ones, exactly, (members,) float32.

    Its rank is k = max(1, int(keep * entries)); of a share of 0 it is infinity.
    """
    ranks = lambda row, entries: [max(1, int(keep[row] * entries)) if keep[row] > 0 else 0]  # noqa: E731
    return (yield from kth_largest(values, ranks, scope))[:, 0]


def kth_largest(
    values: Values, ranks: Callable[[int, int], list[int]], scope: Scope = "tensor", *, rows: bool = False
) -> Generator[Any, tuple[Tensor, ...], Tensor]:
    """Program: the values of given ranks, exactly, (rows, ranks) float32; values are not negative.

    ``ranks(row, entries)`` names the ranks that are wanted of a row, 1 for the largest; for rank 0 the answer is
    infinity. ``rows``: a value depends on its whole row, not on its own entry alone.

    A sample of the entries gives a bracket for each rank. A pass over all of them counts what lies above a bracket and
    gathers what lies in it, to be sorted in part. Where that may be too much, of whole models above all, passes count
    what falls into each of a bracket's bins, and narrow it until it holds one bit pattern. A bracket that misses is
    found out by its own counts, so the sample can cost a pass, never the result.
    """
    ask = WholeModel if scope == "global" else (lambda request: request)
    flat = (lambda c: values(c)) if rows else (lambda c: values(flattened(c)))
    sampled, sizes, of = yield ask(Sample(lambda c, entries: sample(flat(c), entries), rows))
    brackets = [
        [first_bracket(row, size, count, rank) for rank in ranks(i, size)]
        for i, (row, size, count) in enumerate(zip(sampled.numpy(), sizes.tolist(), of.tolist(), strict=True))
    ]
    if scope == "tensor" and 0 < sum(b.expected for row in brackets for b in row) <= GATHERED:
        split = splitter(brackets)
        above, *found = yield Gather(lambda c: gathered(split(flat(c))))
        chosen = map(select, (b for row in brackets for b in row), above.sum(0).tolist(), found)
        brackets = [[next(chosen) for _ in row] for row in brackets]
    while any(b.is_open for row in brackets for b in row):
        split = splitter(brackets)
        (counts,) = yield ask(Counts(lambda chunks: (counted(map(split, map(flat, chunks)), brackets),)))  # noqa: B023
        brackets = [
            [narrowed(b, n) for b, n in zip(row, own, strict=True)]
            for row, own in zip(brackets, counts.numpy(), strict=True)
        ]
    return torch.tensor([[b.low for b in row] for row in brackets], dtype=torch.int32).view(torch.float32)


def flattened(c: Chunk) -> Chunk:
    """The chunk as unit "element" shows it."""
    return c if c.x.ndim == 2 else replace(c, x=c.x.flatten(1), base=None if c.base is None else c.base.flatten())


def sample(values: Tensor, entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts of values by their upper bits (rows, SAMPLED), each as many as it stands for; how many entries the values
    stand for, and how many values there are (rows,)."""
    patterns = values.flatten(1).contiguous().cpu().view(torch.int32)
    bins = (patterns >> (23 - OCTAVE)).sub_(FIRST).clamp_(0, SAMPLED - 1)
    counts = torch.stack([torch.bincount(row, minlength=SAMPLED) for row in bins])
    rows, count = patterns.shape
    counts *= round(entries / max(1, count))
    return counts, torch.full((rows,), entries), torch.full((rows,), count)


def first_bracket(counts: np.ndarray, size: int, sampled: int, rank: int) -> Bracket:
    """Where the value of a rank should lie, by the sample's counts: three standard deviations to either side."""
    if rank < 1 or not sampled:
        return Bracket(rank, INFINITY, INFINITY)
    total, share = int(counts.sum()), min(rank / size, 1.0)
    margin = 0.0 if sampled == size else total * (3 * sqrt(share * (1 - share) / sampled) + 2 / sampled)
    above = np.cumsum(counts[::-1])  # from the largest bin down
    limits = np.clip([share * total - margin, share * total + margin], 1, total)
    upper, lower = (SAMPLED - 1 - np.searchsorted(above, limits)).tolist()
    low = 0 if lower == 0 else (FIRST + lower) << (23 - OCTAVE)
    high = INFINITY if upper == SAMPLED - 1 else ((FIRST + upper + 1) << (23 - OCTAVE)) - 1
    return Bracket(rank, low, high, int(counts[lower : upper + 1].sum()))


Parts = list[tuple[int, np.ndarray]]  # for every bracket of the first row, the second row, …


def splitter(brackets: Brackets) -> Callable[[Tensor], Parts]:
    """A function of values (rows, n): how many of a row lie above a bracket, and those in it but for zeros.

    On the host, in NumPy: its comparisons into bool and selections by bool are much faster.
    """
    limits = np.array([[(max(b.low, 1), b.high) for b in row] for row in brackets], np.int32).view(np.float32)
    ranks = [(limits[:, [i], 0], limits[:, [i], 1]) for i in range(limits.shape[1])]  # lows, highs: (rows, 1)

    def split(values: Tensor) -> Parts:
        rows = values.flatten(1).cpu().numpy()
        columns = [divided(rows, low, high) for low, high in ranks]
        return [part for parts in zip(*columns, strict=True) for part in parts]

    return split


def divided(rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> Parts:
    """How many values of each row lie above ``high``, and those from ``low`` to ``high``."""
    above, inside = rows > high, rows >= low
    inside ^= above
    places = np.flatnonzero(inside)
    ends = np.searchsorted(places, np.arange(len(rows) + 1) * rows.shape[1]).tolist()
    found = rows.reshape(-1).take(places)
    return [(np.count_nonzero(row), found[a:b]) for row, a, b in zip(above, ends[:-1], ends[1:], strict=True)]


def gathered(parts: Parts) -> tuple[Tensor, ...]:
    """How many values lie above each bracket (1, brackets), then for each the values in it."""
    return torch.tensor([[above for above, _ in parts]]), *(torch.from_numpy(inside) for _, inside in parts)


def select(b: Bracket, above: int, found: Tensor) -> Bracket:
    """The bracket at the value of its rank, or where that must be if it was missed."""
    inside = found.numpy()
    if not b.is_open:
        return b
    if b.rank <= above:
        return b.above()
    if b.rank > above + len(inside):
        return b.below()
    place = len(inside) - (b.rank - above)
    inside.partition(place)
    return b.at(int(inside[place : place + 1].view(np.int32)[0]))


def counted(found: Iterable[Parts], brackets: Brackets) -> Tensor:
    """For each row and bracket how many values lie above it, then how many in each of its bins.

    (rows, ranks, 1 + BINS).
    """
    each = [b for row in brackets for b in row]
    result = np.zeros((len(each), 1 + BINS), np.int64)
    for own, b, parts in zip(result, each, zip(*found, strict=True), strict=True):
        own[0] = sum(above for above, _ in parts)
        if b.is_open:
            patterns = np.concatenate([inside for _, inside in parts]).view(np.int32) - np.int32(b.low)
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
    return b._replace(low=low, high=min(b.high, low + (1 << b.shift) - 1))


# Sparse task vectors


def check_shares(name: str, shares: Sequence[float]) -> None:
    for share in shares:
        if not 0 <= share <= 1:
            raise MergeError(f"{name} is a share from 0 to 1, not {share:g}")


def as_factor(mask: Tensor) -> Tensor:
    """A bool mask as zeros and ones in float32."""
    return mask.view(torch.uint8).to(torch.float32)


def trimmer(least: Tensor, most: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """A function that sets, in place, what is smaller than each member's ``least`` magnitude, or larger than its
    ``most``, to zero.

    Hard shrinkage does it in one step: it keeps what is larger than its parameter, here the float32 below ``least``.
    """
    shrink = torch.ops.aten.hardshrink
    below = torch.where(least.isinf(), torch.inf, torch.nextafter(least, torch.tensor(-1.0))).tolist()
    limits = [inf] * len(below) if most is None else most.tolist()

    def trim_(tau: Tensor) -> Tensor:
        for vector, lower, upper in zip(tau.unbind(), below, limits, strict=True):
            largest = None if upper == inf else shrink(vector, upper)
            shrink.out(vector, lower, out=vector)
            if largest is not None:
                vector.sub_(largest)
        return tau

    return trim_


RescaleBy = Literal["probability", "l1"]


def drop_(tau: Tensor, c: Chunk, density: Sequence[float], rescale: bool) -> Tensor:
    """Keep each entry with its member's probability; with ``rescale``, divide by it."""
    for vector, member, share in zip(tau, c.members, density, strict=True):
        if share < 1:
            vector.mul_(as_factor(c.keep(member, share)))
        if rescale and 0 < share < 1:
            vector.div_(share)
    return tau


RankedOver = Literal["tensor", "row"]


def breadcrumbs_window(density: Sequence[float], gamma: Sequence[float], over: RankedOver) -> Program:
    """Program: a function that sets the largest and smallest entries of a chunk's task vectors to zero, in place.

    Of n entries the min(int(gamma n), n - kept) largest are dropped, the next kept = int(density n) stay.
    """

    def window(member: int, n: int) -> list[int]:
        kept = int(density[member] * n)
        dropped = min(int(gamma[member] * n), n - kept)
        return [dropped + 1 if dropped else 0, dropped + kept if kept else 0]  # rank 0: no limit above, nothing below

    if over == "tensor":
        limits = yield from kth_largest(delta_magnitudes, window)
        return trimmer(limits[:, 1], limits[:, 0])

    def within_rows_(tau: Tensor) -> Tensor:
        for i, rows in enumerate(tau):
            ordered = -np.sort(-rows.abs().cpu().numpy(), axis=1)
            ranks = window(i, rows.shape[1])
            most, least = (torch.from_numpy(ordered[:, r - 1 : r]).to(rows.device) if r else torch.inf for r in ranks)
            magnitude = rows.abs()
            rows.mul_((magnitude >= least) & (magnitude <= most))
        return tau

    return within_rows_


def check_window(density: Sequence[float], epsilon: Sequence[float]) -> None:
    check_shares("density", density)
    for d, e in zip(density, epsilon, strict=True):
        if 0 < d < 1 and not (e >= 0 and d - e > 0 and d + e <= 1):
            raise MergeError(f"density - epsilon and density + epsilon are probabilities, not {d - e:g} and {d + e:g}")


def magprune_(tau: Tensor, c: Chunk, density: Sequence[float], epsilon: Sequence[float], rescale: bool) -> Tensor:
    """Keep each entry with a probability that grows with the rank of its magnitude in its row, from density - epsilon
    to density + epsilon; with ``rescale``, divide by it. tau (members, rows, columns)."""
    for vector, member, d, e in zip(tau, c.members, density, epsilon, strict=True):
        if 0 < d < 1:
            probability = by_rank(vector, d - e, d + e)
            vector.mul_(as_factor(c.keep(member, probability)))
            if rescale:
                vector.div_(probability)
        elif d == 0:
            vector.zero_()
    return tau


def by_rank(rows: Tensor, first: float, last: float) -> Tensor:
    """Numbers from ``first`` to ``last`` by the rank of each entry's magnitude in its row, exactly; of equal ones the
    earlier ranks lower. A key holds the bits of a magnitude and its column, so that sorting keys ranks the columns."""
    width = rows.shape[1]
    places = max(1, (width - 1).bit_length())
    keys = (
        rows.abs().cpu().view(torch.int32).to(torch.int64).bitwise_left_shift_(places).bitwise_or_(torch.arange(width))
    )
    keys.numpy().sort(axis=1)
    steps = torch.linspace(first, last, width, dtype=torch.float64) if width > 1 else torch.tensor([(first + last) / 2])
    columns = keys.bitwise_and_((1 << places) - 1)
    return torch.empty(rows.shape).scatter_(1, columns, steps.float().expand(rows.shape)).to(rows.device)


def l1_factors(sparse: Values, wanted: bool = True) -> Program:
    """Program: by what to multiply each member's sparse vector so that its L1 norm over the tensor is that of the
    whole task vector (mergekit's rescaling; norms below 1e-7 stay as they are). Ones unless ``wanted``."""

    def norms(c: Chunk) -> tuple[Tensor]:
        before, after = c.deltas().abs_().double(), sparse(c).abs().double()
        return (torch.stack([before.flatten(1).sum(1), after.flatten(1).sum(1)], 1),)

    if not wanted:
        return None
    (sums,) = yield norms
    return [before / after if min(before, after) >= 1e-7 else 1.0 for before, after in sums.tolist()]


def rescale_(tau: Tensor, factors: Sequence[float] | None) -> Tensor:
    """Multiply by :func:`l1_factors`, if any."""
    return tau if factors is None else weigh_(tau, factors)


# Election of signs

Elect = Literal["unweighted", "weighted"]
Mean = Literal["counts", "weights"]
ZeroSign = Literal["none", "positive", "majority"]


def elected_signs(tau: Tensor, zero: float = 0.0) -> Tensor:
    """The sign of the sum over members: 1, -1, and ``zero`` where the sum is zero."""
    signs = plain_sum(tau).sign_()
    if zero:
        signs.sub_(signs.abs().sub_(1), alpha=zero)
    return signs


def sign_of_zero(rule: ZeroSign, sparse: Values, scope: Scope) -> Program:
    """Program: the sign given to sums that are zero. ``none``: no sign, as in the formula; ``positive``; ``majority``:
    the sign that most other entries elected, over the tensor or the model."""
    if rule != "majority":
        return {"none": 0.0, "positive": 1.0}[rule]

    def votes(chunks: Iterable[Chunk]) -> tuple[Tensor]:
        ballots = [(elected_signs(sparse(c)).long().sum(), len(c.members)) for c in chunks]
        return (sum(ballot for ballot, _ in ballots).expand(ballots[0][1]).clone(),)  # one row a member

    (sums,) = yield WholeModel(Counts(votes)) if scope == "global" else Counts(votes)
    return float(sums[0].sign())


def elect_and_merge_(
    tau: Tensor, weights: Sequence[float], *, elect: str, normalize: bool, mean: str, zero: float = 0.0
) -> Tensor:
    """Steps 2 and 3 of TIES on sparse task vectors, which are used up: elect signs, then merge what has them.

    elect: whether the ``weighted`` or the ``unweighted`` vectors are summed for the election. normalize: the merged
    vector is a mean, divided by the ``counts`` of agreeing members or by the sum of their ``weights`` (``mean``), else
    a sum. zero: the sign of sums that are zero.
    """
    if elect == "weighted":
        weigh_(tau, weights)
    signs = elected_signs(tau, zero)
    divide_by = {"counts": [1.0] * len(weights), "weights": weights}[mean] if normalize else None
    return disjoint_sum_(tau, signs, weights if elect == "unweighted" else None, divide_by)


def disjoint_sum_(
    tau: Tensor,
    signs: Tensor,
    weights: Sequence[float] | None = None,
    divide_by: Sequence[float] | None = None,
    floor: float = 0.0,
) -> Tensor:
    """Sum of the members' entries that have the elected sign, times ``weights``; the members are used up.

    ``divide_by``: the sum is divided by the sum of these numbers over the same members (of ones: by their count), or by
    ``floor`` where that is more.
    """
    agrees = (tau * signs).gt_(0)
    total = weighted_sum_(tau.mul_(agrees), weights)
    if divide_by is not None:  # where nobody agrees the sum is zero, whatever the divisor
        share = weighted_sum_(agrees, divide_by)
        if floor or all(number == 1 for number in divide_by):
            share.clamp_(min=floor or 1)
        else:
            share.add_(torch.eq(share, 0, out=torch.empty_like(share)))
        total.div_(share)
    return total


# Distances


def soft_sign_terms(x: Tensor) -> tuple[Tensor, Tensor]:
    """Reduction: the sum of 1 - |sum_m x_m| / sum_m |x_m| over entries (0/0 counts as 0), and the number of entries."""
    x = x.double()
    total, magnitude = weighted_sum(x, [1.0] * len(x)), weighted_sum(x.abs(), [1.0] * len(x))
    zero = torch.eq(magnitude, 0, out=torch.empty_like(magnitude))
    agreement = total.abs_().add_(zero).div_(magnitude.add_(zero))
    return (1 - agreement).sum(), torch.tensor(magnitude.numel())


def soft_sign_value(sums: Tensor, entries: Tensor) -> Tensor:
    """The mean of the soft sign terms."""
    return sums / entries
