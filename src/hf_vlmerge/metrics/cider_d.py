"""CIDEr-D: consensus of a caption with several references (Vedantam et al. 2015, section 6)."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of the penalty on a difference in length


def cider_d(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, per_item: bool = False
) -> dict[str, float | list[float]]:
    """
    Mean over n = 1 ... 4 of the cosine between tf-idf vectors of n-grams, clipped to what the reference has, with a
    Gaussian penalty on the difference in length; times 10. The idf counts the items whose references have an n-gram.

    Args:
        predictions: captions; words are what white space separates, so punctuation and case are the caller's.
        references: one or more captions an item.
        per_item: also `items`, the score of each.

    Returns:
        `cider_d`, from 0 to 10.

    Raises:
        ValueError: numbers differ, there is no item, or an item has no reference.
    """
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(
            f"expected references for every prediction; got {len(predictions)} predictions, {len(references)} lists."
        )
    if not all(references):
        raise ValueError(f"item {[bool(each) for each in references].index(False)} has no reference.")
    counted = [[count_ngrams(text) for text in texts] for texts in references]
    documents = Counter(ngram for texts in counted for ngram in set().union(*texts))
    weights = {ngram: float(np.log(len(counted) / count)) for ngram, count in documents.items()}
    unseen = float(np.log(len(counted)))
    items = [
        float(np.mean([similarity(count_ngrams(text), own, weights, unseen) for own in texts]))
        for text, texts in zip(predictions, counted, strict=True)
    ]
    scores: dict[str, float | list[float]] = {"cider_d": float(np.mean(items))}
    return scores | {"items": items} if per_item else scores


def count_ngrams(text: str) -> Counter:
    """How often each run of 1 to 4 words occurs."""
    words = text.split()
    return Counter(
        tuple(words[start : start + n]) for n in range(1, LONGEST + 1) for start in range(len(words) - n + 1)
    )


def similarity(prediction: Counter, reference: Counter, weights: dict, unseen: float) -> float:
    """Of one caption with one reference: 0 to 10."""
    products, norms = np.zeros(LONGEST), np.zeros((2, LONGEST))
    for ngram, count in prediction.items():
        weight = weights.get(ngram, unseen)
        norms[0, len(ngram) - 1] += (count * weight) ** 2
        products[len(ngram) - 1] += min(count, reference[ngram]) * reference[ngram] * weight**2
    for ngram, count in reference.items():
        norms[1, len(ngram) - 1] += (count * weights.get(ngram, unseen)) ** 2
    norms = np.sqrt(norms).prod(axis=0)
    cosines = np.divide(products, norms, out=np.zeros(LONGEST), where=norms > 0)
    # the difference in length is that of the numbers of pairs of words, as in the evaluation code of COCO
    lengths = [sum(count for ngram, count in each.items() if len(ngram) == 2) for each in (prediction, reference)]
    return float(10 * cosines.mean() * np.exp(-((lengths[0] - lengths[1]) ** 2) / (2 * SIGMA**2)))
