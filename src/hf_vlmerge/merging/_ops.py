"""Arithmetic shared by methods and distances. Every function gives the same bits for every chunk size.

Sums over members are written as loops of ``*`` and ``+``: matrix products and fused multiply-adds may differ in the
last bit with the length of a chunk. Masks are float tensors of zeros and ones (``ge_``, ``gt_``): torch compares into
floats several times faster than into bool, and multiplies by them faster still. A name that ends in ``_`` works in
place.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations_with_replacement
from math import inf
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _compiled
from ._order import Scope, Values, delta_magnitudes, kth_largest
from .registry import Chunk, Counts, MergeError, Program, WholeModel

# Sums over members


def weighted_sum(x: Tensor, weights: Sequence[float | Tensor] | None = None) -> Tensor:
    """Sum of ``weights[i] * x[i]`` in member order, without weights of ``x[i]``; x (members, ...). Tensor weights must
    broadcast to ``x[0]``."""
    terms = iter(x.unbind() if weights is None else weigh(x, weights))
    first, second = next(terms), next(terms, None)
    result = first.clone() if second is None else first + second
    for term in terms:
        result += term
    return result


def weigh(x: Tensor, weights: Sequence[float | Tensor]) -> Iterator[Tensor]:
    """``weights[i] * x[i]``, one member after the other; where a weight is 1, the member itself."""
    for member, weight in zip(x.unbind(), weights, strict=True):
        yield member if isinstance(weight, float) and weight == 1 else member * weight


def weighted_sum_(x: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """The same in the place of ``x``, which is used up."""
    total, *others = x.unbind() if weights is None else weigh_(x.unbind(), weights)
    for member in others:
        total += member
    return total


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
    """The same in the place of ``x``, for all members at once."""
    for member, weight in zip(x, weights, strict=True):
        if weight != 1:
            member.mul_(weight)
    return x


def on_base_(c: Chunk, tau: Tensor, scale: float) -> Tensor:
    """base + scale * tau, in the place of tau."""
    return (tau if scale == 1 else tau.mul_(scale)).add_(c.base)


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


# Sparse task vectors


def check_shares(name: str, shares: Sequence[float]) -> None:
    for share in shares:
        if not 0 <= share <= 1:
            raise MergeError(f"{name} is a share from 0 to 1, not {share:g}")


def as_factor(mask: Tensor) -> Tensor:
    """A bool mask as zeros and ones in float32."""
    return mask.view(torch.uint8).to(torch.float32)


class Trim(NamedTuple):
    """A function that sets, in place, what is not above each member's ``below``, or is above its ``upto``, to zero;
    magnitudes all. Hard shrinkage does it in one step: it keeps what is larger than its parameter."""

    below: list[float]
    upto: list[float]

    @classmethod
    def to(cls, least: Tensor, most: Tensor | None = None) -> "Trim":
        """What keeps magnitudes from ``least`` to ``most``: above the float32 below the first."""
        below = torch.where(least.isinf(), torch.inf, torch.nextafter(least, torch.tensor(-1.0))).tolist()
        return cls(below, [inf] * len(below) if most is None else most.tolist())

    def __call__(self, tau: Tensor) -> Tensor:
        for vector, lower, upper in zip(tau.unbind(), self.below, self.upto, strict=True):
            if lower >= upper:
                vector.zero_()
                continue
            largest = None if upper == inf else torch.hardshrink(vector, upper)
            torch.hardshrink(vector, lower, out=vector)
            if largest is not None:
                vector.sub_(largest)
        return tau


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
        return Trim.to(limits[:, 1], limits[:, 0])

    def within_rows_(tau: Tensor) -> Tensor:
        for i, rows in enumerate(tau):
            magnitude, n = rows.abs(), rows.shape[1]
            ordered = sort_rows_(magnitude.clone())
            most, least = (ordered[:, n - r : n - r + 1] if r else torch.inf for r in window(i, n))
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
    steps = torch.linspace(first, last, width, dtype=torch.float64) if width > 1 else torch.tensor([(first + last) / 2])
    steps = steps.float()
    if rows.is_cpu and width >= _compiled.WIDE and _compiled.is_loaded():
        return _compiled.by_rank(rows, steps)
    places = max(1, (width - 1).bit_length())
    keys = rows.abs().view(torch.int32).to(torch.int64).bitwise_left_shift_(places)
    keys = sort_rows_(keys.bitwise_or_(torch.arange(width, device=rows.device)))
    columns = keys.bitwise_and_((1 << places) - 1)
    return torch.empty_like(rows).scatter_(1, columns, steps.to(rows.device).expand(rows.shape))


def sort_rows_(values: Tensor) -> Tensor:
    """Each row in ascending order; ``values`` are used up. On the CPU NumPy's sort is much faster than torch's."""
    if values.is_cpu:
        values.numpy().sort(axis=1)
        return values
    return values.sort(dim=1).values


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
    signs = weighted_sum(tau).sign_()
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
    agreeing = tau.mul_(signs).relu_()  # magnitudes; zero where the sign is another one
    total = weighted_sum(agreeing, weights).mul_(signs)
    if divide_by is not None:  # where nobody agrees the sum is zero, whatever the divisor
        share = weighted_sum_(agreeing.sign_(), divide_by)
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
    total, magnitude = weighted_sum(x), weighted_sum(x.abs())
    zero = torch.eq(magnitude, 0, out=torch.empty_like(magnitude))
    agreement = total.abs_().add_(zero).div_(magnitude.add_(zero))
    return (1 - agreement).sum(), torch.tensor(magnitude.numel())


def soft_sign_value(sums: Tensor, entries: Tensor) -> Tensor:
    """The mean of the soft sign terms."""
    return sums / entries
