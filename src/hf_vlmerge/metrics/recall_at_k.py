"""Recall of image-text retrieval."""

from collections.abc import Sequence

import numpy as np


def recall_at_k(
    similarity, image_of_text, ks: Sequence[int] = (1, 5, 10), *, per_item: bool = False
) -> dict[str, float | list[float]]:
    """
    Text and image retrieval over all images and all texts (the 5K setting of COCO has 5,000 images in one matrix).

    Text retrieval (`tr_r1` ...): is any text of the image among its top k? Image retrieval (`ir_r1` ...): is the text's
    image among its top k? An item that ties with others for a place gets the expected value over a random order of
    those that tie, so a model that gives every pair the same score gets chance, not 0 or 1.

    Args:
        similarity: larger is closer; any array.
        image_of_text: row of the image to which each text belongs; an image may have several texts, or none (it is
            then left out of text retrieval).
        ks: cut-offs.
        per_item: also `tr_items` and `ir_items`, the mean over `ks` for each image with texts and for each text.

    Shapes:
        similarity (images, texts); image_of_text (texts,)
        -> fractions: `tr_r{k}`, `ir_r{k}`, `tr_mean` and `ir_mean` over the cut-offs, `mean` of the two

    Raises:
        ValueError: shapes that do not fit, an image that does not exist, a score that is NaN.
    """
    similarity, image_of_text = np.asarray(similarity), np.asarray(image_of_text)
    check(similarity, image_of_text)
    ks = list(ks)
    own = image_of_text == np.arange(len(similarity))[:, None]  # (images, texts)
    tr = np.array([hits_of_texts(*row, ks) for row in zip(similarity, own, strict=True) if row[1].any()])
    right = similarity[image_of_text, np.arange(len(image_of_text))]
    ahead, tied = (similarity > right).sum(0), (similarity == right).sum(0)
    ir = np.stack([np.clip((k - ahead) / tied, 0, 1) for k in ks], axis=1)

    scores = {f"tr_r{k}": float(value) for k, value in zip(ks, tr.mean(0), strict=True)}
    scores |= {f"ir_r{k}": float(value) for k, value in zip(ks, ir.mean(0), strict=True)}
    scores |= {"tr_mean": float(tr.mean()), "ir_mean": float(ir.mean())}
    scores["mean"] = (scores["tr_mean"] + scores["ir_mean"]) / 2
    if per_item:
        scores |= {"tr_items": tr.mean(1).tolist(), "ir_items": ir.mean(1).tolist()}
    return scores


def hits_of_texts(scores: np.ndarray, own: np.ndarray, ks: list[int]) -> list[float]:
    """Probability that one of an image's own texts is in its top k, for each k; scores and own (texts,)."""
    best = scores[own].max()
    ahead, tied = int((scores > best).sum()), scores == best
    ours, all_tied = int((tied & own).sum()), int(tied.sum())
    return [1 - miss_probability(all_tied, ours, k - ahead) for k in ks]


def miss_probability(candidates: int, ours: int, places: int) -> float:
    """That none of `ours` is among the first `places` of `candidates` in random order."""
    miss = 1.0
    for taken in range(min(max(places, 0), candidates)):
        miss *= max(0, candidates - ours - taken) / (candidates - taken)
    return miss


def check(similarity: np.ndarray, image_of_text: np.ndarray) -> None:
    if similarity.ndim != 2 or image_of_text.shape != similarity.shape[1:] or not similarity.size:
        raise ValueError(
            "expected similarity (images, texts) and image_of_text (texts,); "
            f"got {similarity.shape} and {image_of_text.shape}."
        )
    if image_of_text.min() < 0 or image_of_text.max() >= len(similarity):
        raise ValueError(f"image_of_text has a row outside the {len(similarity)} images of the similarity matrix.")
    if np.isnan(similarity).any():
        raise ValueError("the similarity matrix has NaN, which no order can rank.")
