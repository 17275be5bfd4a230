"""Sign conflicts: how often members pull an entry in opposite directions (what TIES, arXiv 2306.01708, resolves)."""

from torch import Tensor

from ..registry import Chunk, distance_metric


@distance_metric("sign_conflict", paper="2306.01708")
def sign_conflict():
    """Share of the entries, of those that at least two members move, whose signs are not all the same.

    Two unrelated members have 0.5, of task vectors (reference "base") as of weights.
    """

    def terms(c: Chunk) -> tuple[Tensor, Tensor]:
        signs = c.x.sign()
        agreement, moving = signs.sum(0).abs(), signs.abs_().sum(0)
        return (agreement < moving).sum(), (moving > 1).sum()

    def value(conflicts: Tensor, entries: Tensor) -> Tensor:
        return conflicts.double() / entries.clamp(min=1)

    return terms, value
