"""Share of boxes that overlap enough with the right one."""

import numpy as np


def grounding_accuracy(
    predictions, references, *, threshold: float = 0.5, per_item: bool = False
) -> dict[str, float | list[float]]:
    """
    Acc@0.5 of referring expressions: intersection over union at or above a threshold. A box that is not a number, or is
    turned around, counts as wrong.

    Args:
        predictions, references: x0, y0, x1, y1, in the same unit.
        per_item: also `items`, 1.0 or 0.0 for each.

    Shapes:
        predictions, references (items, 4) -> `grounding_accuracy`, a fraction

    Raises:
        ValueError: shapes differ or are not (items, 4), or there is no item.
    """
    predictions, references = np.asarray(predictions, dtype=float), np.asarray(references, dtype=float)
    if (
        predictions.shape != references.shape
        or predictions.ndim != 2
        or predictions.shape[1] != 4
        or not len(predictions)
    ):
        raise ValueError(f"expected two arrays (items, 4); got {predictions.shape} and {references.shape}.")
    right = (overlap(predictions, references) >= threshold).astype(float)
    scores: dict[str, float | list[float]] = {"grounding_accuracy": float(right.mean())}
    return scores | {"items": right.tolist()} if per_item else scores


def overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union; 0 where a box has no area: (..., 4) and (..., 4) -> (...)"""
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2])
    shared = np.clip(sides, 0, None).prod(axis=-1)
    areas = [np.clip(box[..., 2:] - box[..., :2], 0, None).prod(axis=-1) for box in (first, second)]
    union = areas[0] + areas[1] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
