"""Best permutations from similarities: linear sum assignment, and its nested form for attention heads."""

from typing import NamedTuple

import numpy as np

Matrix = np.ndarray  # similarity of unit i of the reference and unit j of the other, float64
Order = np.ndarray  # entry i is the unit of the other that takes place i
ROUNDS = 20  # of alternation between heads of a group and dimensions within them


def best(similarity: Matrix) -> Order:
    """The order with the largest total similarity (scipy's linear sum assignment, deterministic)."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(similarity, maximize=True)[1].astype(np.int64)


class HeadSimilarity(NamedTuple):
    """Similarities of one attention module's rows: query (H d, H d), key (G d, G d), value and output likewise."""

    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix


class HeadOrder(NamedTuple):
    """The order of one module's query, key, value and output rows."""

    q: Order
    k: Order
    v: Order
    o: Order


class Pair(NamedTuple):
    """The best way to put one group in another's place: its score, the order of the heads within the group, and of the
    query-key and value-output dimensions of each module."""

    score: float
    within: Order
    qk: list[Order]
    vo: list[Order]


class HeadMatcher:
    """Finds the order of groups, of heads within groups, and of dimensions within heads.

    With one query head a group the result is the best there is: every pair of heads is scored by its best inner order,
    then heads are assigned. With several, heads and dimensions of a pair of groups are improved in turn until neither
    changes.
    """

    def __init__(
        self,
        heads: int,
        groups: int,
        modules: list[HeadSimilarity],
        per_head: Matrix,
        *,
        heads_free: bool,
        qk: bool,
        vo: bool,
    ) -> None:
        self.groups, self.repeat, self.heads_free = groups, heads // groups, heads_free
        self.free_qk, self.free_vo, self.per_head = qk, vo, per_head
        split = lambda m, n: m.reshape(n, m.shape[0] // n, n, m.shape[1] // n).transpose(0, 2, 1, 3)  # noqa: E731
        counts = (heads, groups, groups, heads)  # each similarity as (row block, column block, d, d)
        self.modules = [HeadSimilarity(*(split(m, n) for m, n in zip(own, counts, strict=True))) for own in modules]

    def solve(self) -> tuple[list[HeadOrder], Order]:
        """The order of each module's rows, and of the heads."""
        n = self.groups
        allowed = [(g, h) for g in range(n) for h in range(n) if self.heads_free or g == h]
        pairs = {place: self.pair(*place) for place in allowed}
        order = np.arange(n)
        if self.heads_free:
            order = best(np.array([[pairs[g, h].score for h in range(n)] for g in range(n)]))
        chosen = [pairs[g, h] for g, h in enumerate(order.tolist())]
        heads = np.concatenate([h * self.repeat + pair.within for h, pair in zip(order, chosen, strict=True)])
        rows = lambda blocks, inner: np.concatenate(  # noqa: E731
            [b * len(i) + i for b, i in zip(blocks, inner, strict=True)]
        )
        result = []
        for m in range(len(self.modules)):
            qk, vo = [pair.qk[m] for pair in chosen], [pair.vo[m] for pair in chosen]
            per_head = [i for i in range(n) for _ in range(self.repeat)]
            result.append(
                HeadOrder(
                    q=rows(heads, [qk[i] for i in per_head]),
                    k=rows(order, qk),
                    v=rows(order, vo),
                    o=rows(heads, [vo[i] for i in per_head]),
                )
            )
        return result, heads

    def pair(self, g: int, h: int) -> Pair:
        """The best inner order for group ``h`` in the place of group ``g``."""
        within, settled = np.arange(self.repeat), self.repeat == 1
        for _ in range(ROUNDS):
            qk = [self.inner(m.k[g, h], m.q, g, h, within if settled else None, self.free_qk) for m in self.modules]
            vo = [self.inner(m.v[g, h], m.o, g, h, within if settled else None, self.free_vo) for m in self.modules]
            if self.repeat == 1 or not self.heads_free:
                break
            found = best(self.head_scores(g, h, qk, vo))
            if settled and np.array_equal(found, within):
                break
            within, settled = found, True
        scores = self.head_scores(g, h, qk, vo)
        own = sum(trace(m.k[g, h], a) + trace(m.v[g, h], b) for m, a, b in zip(self.modules, qk, vo, strict=True))
        return Pair(float(own + scores[np.arange(self.repeat), within].sum()), within, qk, vo)

    def inner(self, shared: Matrix, each: Matrix, g: int, h: int, within: Order | None, free: bool) -> Order:
        """The order of dimensions within a head: of the group's own rows, and of those of its heads once they are
        matched (``within``)."""
        if not free:
            return np.arange(shared.shape[0])
        total = shared.copy()
        for i, j in enumerate(() if within is None else within.tolist()):
            total += each[g * self.repeat + i, h * self.repeat + j]
        return best(total)

    def head_scores(self, g: int, h: int, qk: list[Order], vo: list[Order]) -> Matrix:
        """Similarity of each head of group ``g`` and each of group ``h``, (repeat, repeat)."""
        scores = np.empty((self.repeat, self.repeat))
        for i in range(self.repeat):
            for j in range(self.repeat):
                a, b = g * self.repeat + i, h * self.repeat + j
                own = zip(self.modules, qk, vo, strict=True)
                scores[i, j] = self.per_head[a, b] + sum(trace(m.q[a, b], p) + trace(m.o[a, b], r) for m, p, r in own)
        return scores


def trace(similarity: Matrix, order: Order) -> float:
    return float(similarity[np.arange(len(order)), order].sum())
