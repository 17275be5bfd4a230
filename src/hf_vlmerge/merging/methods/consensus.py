"""Consensus merging with TALL masks: Wang et al., 2024 (arXiv 2405.07813), sections 3 and 4."""

from collections.abc import Callable

import torch
from torch import Tensor

from .._ops import on_base_, weighted_sum
from ..registry import Chunk, MergeError, PerMember, merge_method


@merge_method(
    "consensus",
    paper="2405.07813",
    needs_base=True,
    weighted=False,
    members=(2, 1 << 30),
    cost="O(n P)",
    disagreements="fusion_bench builds the masks from |base - task vector| where the formula has |merged - member|.",
)
def consensus(*, threshold: PerMember = 0.4, at_least: int = 2, scale: float = 1.0) -> Callable[[Chunk], Tensor]:
    """Keep the entries of the summed task vector that matter to several members: base + scale * m * sum (x_i - base).

    threshold: lambda_i of each member's mask |tau_i| > lambda_i |sum tau - tau_i|; the paper tunes it in 0.2 to 0.6.
    at_least: k, the number of members' masks that an entry needs; 1 removes only what matters to nobody. scale: alpha.
    """
    if at_least < 0:
        raise MergeError(f"consensus: at_least is a number of members and not negative, not {at_least}")

    def merge(c: Chunk) -> Tensor:
        tau = c.deltas()
        total = weighted_sum(tau)
        votes = torch.zeros_like(total)
        for own, share in zip(tau, threshold, strict=True):
            rest = (total - own).abs_().mul_(share)
            votes.add_(own.abs_().gt_(rest))  # the member's TALL mask
        return on_base_(c, total.mul_(votes.ge_(at_least)), scale)

    return merge
