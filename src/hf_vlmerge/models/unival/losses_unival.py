# Copyright 2026 The hf_vlmerge authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
What UnIVAL (Shukor et al. 2023, 2307.16184) is trained with: from logits to a sum over target tokens.

B = batch, Q = target tokens, V = vocabulary. A mask of allowed tokens may have any shape that broadcasts to (B, Q, V).
Forbidden tokens have the log-probability -inf; no product is ever made with it, so that gradients are finite.
"""

import math
from collections.abc import Sequence

import torch

IGNORED = -100  # label of a place that the loss leaves out


def target_loss(
    passes: Sequence[torch.Tensor],
    labels: torch.Tensor,
    *,
    smoothing: float = 0.0,
    allowed_tokens: torch.Tensor | None = None,
    confidence: torch.Tensor | None = None,
    encouraging_log_end: float | None = None,
    drop_worst_ratio: float = 0.0,
    rdrop_alpha: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The sum of the losses of all target tokens, in float32 at least, and how many tokens it is of.

    Args:
        passes: logits of one pass, or of two with different dropout (R-drop), whose tokens all count.
        labels: target ids, -100 where no loss is wanted.
        smoothing: ε of the label smoothing, the share of the other tokens in the target.
        allowed_tokens: True for tokens that may be said; probabilities are among them.
        confidence: of each row, a factor of its log-probabilities.
        encouraging_log_end: e of the encouraging loss, see `encouragement`; None leaves it out.
        drop_worst_ratio: this share of the tokens, those with the highest cross-entropy (in the first pass), is left
            out and not counted.
        rdrop_alpha: factor of `divergence` between two passes.

    Shapes:
        passes (B, Q, V) each; labels (B, Q); confidence (B,) -> sum (), count ()

    Raises:
        ValueError: shapes differ, or a number is out of its range.
    """
    check_options(smoothing, encouraging_log_end, drop_worst_ratio)
    check_shapes(passes[0].shape, labels, allowed_tokens, confidence)
    allowed_tokens = None if allowed_tokens is None else allowed_tokens.bool()
    counted = labels != IGNORED
    targets = labels.masked_fill(~counted, 0)
    scores = [log_probabilities(logits, allowed_tokens, confidence) for logits in passes]
    losses = [smoothed_cross_entropy(each, targets, smoothing, allowed_tokens) for each in scores]
    kept = easiest(losses[0], counted, drop_worst_ratio) if drop_worst_ratio else counted
    if encouraging_log_end is not None:
        bonuses = [encouragement(each, targets, smoothing, encouraging_log_end) for each in scores]
        losses = [loss + bonus for loss, bonus in zip(losses, bonuses, strict=True)]
    if rdrop_alpha and len(scores) == 2:
        losses.append(rdrop_alpha * divergence(*scores))
    total = torch.stack([loss.masked_fill(~kept, 0.0).sum() for loss in losses]).sum()
    return total, len(passes) * kept.sum()


def mean_loss(
    passes: Sequence[torch.Tensor],
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    **options,
) -> torch.Tensor:
    """
    The mean of `target_loss`, which takes the options, over its tokens. Where this batch is one of several, its share
    of the mean over all of them, which have `num_items_in_batch` labels that are not -100; what is not dropped stands
    for all tokens of its batch.

    Shapes:
        passes (B, Q, V) each; labels (B, Q) -> ()
    """
    total, count = target_loss(passes, labels, **options)
    mean = total / count.clamp(min=1)
    return mean if num_items_in_batch is None else mean * (labels != IGNORED).sum() / num_items_in_batch


def check_options(smoothing: float, log_end: float | None, drop_worst_ratio: float) -> None:
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing}; expected a number from 0 to below 1.")
    if log_end is not None and not 0 < log_end <= 1:
        raise ValueError(f"encouraging_log_end is {log_end}; expected a number above 0, up to 1.")
    if not 0 <= drop_worst_ratio < 1:
        raise ValueError(f"drop_worst_ratio is {drop_worst_ratio}; expected a number from 0 to below 1.")


def check_shapes(logits: torch.Size, labels: torch.Tensor, mask: torch.Tensor | None, confidence: torch.Tensor | None):
    if labels.shape != logits[:2]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; expected that of the target, {tuple(logits[:2])}.")
    if mask is not None and mask.shape[-1] != logits[2]:
        raise ValueError(f"allowed_tokens is about {mask.shape[-1]} tokens; the vocabulary has {logits[2]}.")
    if confidence is not None and confidence.shape != logits[:1]:
        raise ValueError(f"confidence has shape {tuple(confidence.shape)}; expected {tuple(logits[:1])}.")


def log_probabilities(
    logits: torch.Tensor, allowed: torch.Tensor | None = None, confidence: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Log-probabilities among the allowed tokens, times the row's confidence: in float32 at least.

    Shapes:
        logits (B, Q, V); allowed, to (B, Q, V); confidence (B,) -> (B, Q, V)
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    scores = logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    if confidence is not None:
        scores = scores * confidence.to(scores.dtype)[:, None, None]
    # again: where nothing is allowed, or the confidence is 0, forbidden tokens have become not-a-number
    return scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)


def smoothed_cross_entropy(
    scores: torch.Tensor, targets: torch.Tensor, epsilon: float = 0.0, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Cross-entropy with a target in which the right token has 1 - ε, and ε is shared by the other allowed ones.

    This is what `label_smoothing=ε V / (V - 1)` means in PyTorch, which shares ε among all tokens, the right one too.

    Shapes:
        scores (B, Q, V), log-probabilities; targets (B, Q); allowed, to (B, Q, V) -> (B, Q)
    """
    of_target = -scores.gather(-1, targets[..., None])[..., 0]
    if not epsilon:
        return of_target
    if allowed is None:
        share = epsilon / (scores.shape[-1] - 1)
        of_all = -scores.sum(-1)
    else:
        others = allowed.sum(-1).to(scores.dtype) - 1 + 1e-6  # there may be none
        share = epsilon / others
        of_all = -scores.masked_fill(~allowed, 0.0).sum(-1)
    return (1 - epsilon - share) * of_target + share * of_all


def encouragement(scores: torch.Tensor, targets: torch.Tensor, epsilon: float, log_end: float) -> torch.Tensor:
    """
    The encouraging loss (Zhao et al. 2022, "Well-classified Examples are Underestimated in Classification with Deep
    Neural Networks", 2110.06537) without its cross-entropy: a bonus ln(1 - p), negative, that grows with the
    probability p of the target, so that confident tokens still learn.

    Beyond `log_end` the logarithm goes on as its tangent, which bounds the bonus; 1 means no tangent. The part of the
    label smoothing has the same sign, as in the models that were trained with it.

    Shapes:
        scores (B, Q, V), log-probabilities; targets (B, Q) -> (B, Q)
    """
    p = scores.exp()
    bonus = (1 - p).clamp(min=1e-5).log()
    if log_end < 1:
        tangent = math.log(1 - log_end) - (p - log_end) / (1 - log_end)
        bonus = torch.where(p > log_end, tangent, bonus)
    of_target = (1 - epsilon) * bonus.gather(-1, targets[..., None])[..., 0]
    return of_target + epsilon / scores.shape[-1] * bonus.sum(-1) if epsilon else of_target


def divergence(scores: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """
    R-drop (Liang et al. 2021, 2106.14448): half of KL(p‖q) + KL(q‖p) of two passes, which is half of
    Σ (p - q) (ln p - ln q).

    Shapes:
        scores, others (B, Q, V), log-probabilities -> (B, Q)
    """
    finite, other = (each.masked_fill(each == -torch.inf, 0.0) for each in (scores, others))
    return 0.5 * ((scores.exp() - others.exp()) * (finite - other)).sum(-1)


def easiest(losses: torch.Tensor, counted: torch.Tensor, drop_ratio: float) -> torch.Tensor:
    """
    Which of the counted tokens stay when the worst are dropped: the floor(n · (1 - `drop_ratio`)) of the lowest loss.

    Shapes:
        losses, counted (B, Q) -> (B, Q) bool
    """
    count = (counted.sum().double() * (1 - drop_ratio)).long()
    order = losses.detach().masked_fill(~counted, torch.inf).flatten().argsort()
    kept = torch.empty_like(order, dtype=torch.bool)
    kept[order] = torch.arange(len(order), device=order.device) < count
    return kept.view_as(counted) & counted


__all__ = ["mean_loss", "target_loss"]
