"""Share of answers that are word for word one of the right ones."""

from collections.abc import Sequence


def exact_match(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, per_item: bool = False
) -> dict[str, float | list[float]]:
    """
    An answer is right if it is equal to any of its references; white space around them and case do not count.

    Args:
        predictions: answers.
        references: one or more right answers an item.
        per_item: also `items`, 1.0 or 0.0 for each.

    Returns:
        `exact_match`, a fraction.

    Raises:
        ValueError: numbers differ, or there is no item.
    """
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(
            f"expected references for every prediction; got {len(predictions)} predictions, {len(references)} lists."
        )
    items = [
        float(plain(said) in {plain(text) for text in texts})
        for said, texts in zip(predictions, references, strict=True)
    ]
    scores: dict[str, float | list[float]] = {"exact_match": sum(items) / len(items)}
    return scores | {"items": items} if per_item else scores


def plain(text: str) -> str:
    return text.strip().lower()
