"""Accuracy of a model that chooses one of a closed list of answers."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from tqdm.auto import tqdm


@torch.inference_mode()
def evaluate_answers(
    model: torch.nn.Module,
    examples: Sequence[dict],
    collator: Callable,
    *,
    batch_size: int = 256,
    group_by: str | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """
    Share of examples whose highest logit is at their `label`.

    Args:
        model: gives `logits` (B, num_labels). Left in the mode (training, evaluation) that it was in.
        collator: makes batches with `labels` (B,).
        group_by: column that names what examples have in common (an image, a sentence); answers within a group are not
            independent, so the standard error is then taken over groups.

    Returns:
        `accuracy` and its `standard_error`, as fractions.
    """
    was_training, correct = model.training, []
    model.eval()
    device = next(model.parameters()).device
    for start in tqdm(range(0, len(examples), batch_size), desc="answering", disable=not progress, leave=False):
        batch = collator(examples[start : start + batch_size])
        labels = batch.pop("labels")
        logits = model(**{name: value.to(device) for name, value in batch.items()}).logits
        correct.append((logits.argmax(-1).cpu() == labels).numpy())
    model.train(was_training)
    correct = np.concatenate(correct)
    groups = [example[group_by] for example in examples] if group_by else range(len(examples))
    return {"accuracy": float(correct.mean()), "standard_error": clustered_error(correct, groups)}


def clustered_error(values: np.ndarray, groups: Sequence) -> float:
    """Standard error of the mean of values that are independent between groups only (linearised ratio estimate)."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    deviations = np.bincount(index, weights=values - values.mean())
    return float(np.sqrt((deviations**2).sum()) / len(values))
