"""
What a UnIVAL model has to beat on the validation split, without a network. Used by `train_unival.py`.

A constant box or caption is the training one that fits the validation split itself best: a bound for what constants
reach. All the other rules see the training split only.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from unival_tasks import Example, Task

from hf_vlmerge.metrics import cider_d, grounding_accuracy
from hf_vlmerge.metrics.cider_d import count_ngrams

NEIGHBOURS = {"first_frame": 3, "spectral_neighbours": 5}
MAX_BOXES = 2000  # candidates of a constant box
MAX_CAPTIONS = 30  # candidates of a constant caption that are scored exactly


def baselines(task: Task, train: list[Example], validation: list[Example]) -> dict[str, np.ndarray]:
    """Scores of every validation example by each rule: name -> (examples,)"""
    if task.kind == "boxes":
        return {"constant box": constant_box(train, validation), "box of the text": box_of_text(train, validation)}
    if task.kind == "captions":
        return {"constant caption": constant_caption(train, validation)}
    scores = answers_of_text(train, validation)
    if task.baseline == "first_frame":
        scores["first frame, 3-NN"] = neighbours(train, validation, first_frame, NEIGHBOURS["first_frame"])
    if task.baseline == "spectral_neighbours":
        scores["log spectrum, 5-NN"] = neighbours(train, validation, spectrum, NEIGHBOURS["spectral_neighbours"])
    return scores


def answers_of_text(train: list[Example], validation: list[Example]) -> dict[str, np.ndarray]:
    """The most frequent answer, and the most frequent answer to the same text."""
    overall, by_text = Counter(example.targets[0] for example in train), defaultdict(Counter)
    for example in train:
        by_text[example.text][example.targets[0]] += 1
    majority = overall.most_common(1)[0][0]
    guesses = [by_text[each.text].most_common(1)[0][0] if each.text in by_text else majority for each in validation]
    right = lambda said: np.array([s == each.targets[0] for s, each in zip(said, validation, strict=True)], float)  # noqa: E731
    return {"majority": right([majority] * len(validation)), "text only": right(guesses)}


def neighbours(
    train: list[Example], validation: list[Example], describe: Callable[[Example], torch.Tensor], count: int
) -> np.ndarray:
    """The most frequent answer of the nearest training media (the nearer one among equals)."""
    known, asked = (torch.stack([describe(example) for example in examples]) for examples in (train, validation))
    mean, deviation = known.mean(dim=0), known.std(dim=0) if describe is spectrum else torch.ones(())
    distance = torch.cdist((asked - mean) / deviation, (known - mean) / deviation)
    nearest = distance.topk(count, largest=False).indices.tolist()
    said = [Counter(train[i].targets[0] for i in row).most_common(1)[0][0] for row in nearest]
    return np.array([answer == example.targets[0] for answer, example in zip(said, validation, strict=True)], float)


def first_frame(example: Example) -> torch.Tensor:
    """16 x 16 pixels of a clip's first frame."""
    return torch.nn.functional.adaptive_avg_pool2d(example.medium[0].float(), 16).flatten()


def spectrum(example: Example) -> torch.Tensor:
    """Mean and deviation over time of the logarithm of the power in 64 bands."""
    power = torch.stft(example.medium, 1024, 512, window=torch.hann_window(1024), return_complex=True).abs().square()
    bands = torch.nn.functional.adaptive_avg_pool1d(power.T, 64)  # (frames, 64)
    levels = (bands + 1e-8).log10()
    return torch.cat([levels.mean(dim=0), levels.std(dim=0)])


def constant_box(train: list[Example], validation: list[Example]) -> np.ndarray:
    """The training box that fits the validation split best."""
    truth = np.array([example.box for example in validation])
    candidates = np.unique([example.box for example in train], axis=0)
    candidates = np.random.default_rng(0).permutation(candidates)[:MAX_BOXES]
    return max((hits(np.broadcast_to(box, truth.shape), truth) for box in candidates), key=np.sum)


def box_of_text(train: list[Example], validation: list[Example]) -> np.ndarray:
    """For each text, the training box that fits the others of the text best; unknown texts are wrong."""
    by_text = defaultdict(list)
    for example in train:
        by_text[example.text].append(example.box)
    best = {}
    for text, boxes in by_text.items():
        boxes = np.array(boxes)
        candidates = np.random.default_rng(0).permutation(np.unique(boxes, axis=0))[:200]
        best[text] = max(candidates, key=lambda box, boxes=boxes: hits(np.broadcast_to(box, boxes.shape), boxes).sum())
    said = np.array([best.get(example.text, np.zeros(4)) for example in validation])
    return hits(said, np.array([example.box for example in validation]))


def hits(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.array(grounding_accuracy(boxes, truth, per_item=True)["items"])


def constant_caption(train: list[Example], validation: list[Example]) -> np.ndarray:
    """The training caption that fits the validation split best, among those nearest to the mean of its references."""
    references = [example.targets for example in validation]
    centre = mean_vector([text for texts in references for text in texts])
    candidates = sorted({text for example in train for text in example.targets})
    candidates.sort(key=lambda text: -cosine(count_ngrams(text), centre))
    scores = (caption_scores([text] * len(references), references) for text in candidates[:MAX_CAPTIONS])
    return max(scores, key=np.sum)


def caption_scores(said: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    return np.array(cider_d(said, references, per_item=True)["items"])


def mean_vector(texts: list[str]) -> dict[tuple, float]:
    """Sum of n-gram counts, each weighted by how few of the texts have it."""
    counts = [count_ngrams(text) for text in texts]
    documents = Counter(ngram for each in counts for ngram in each)
    total = Counter()
    for each in counts:
        total.update(each)
    return {ngram: total[ngram] * np.log(len(texts) / documents[ngram]) ** 2 for ngram in total}


def cosine(counts: Counter, centre: dict[tuple, float]) -> float:
    """Up to a factor: what a text has in common with the mean, by its own length."""
    return sum(count * centre.get(ngram, 0.0) for ngram, count in counts.items()) / np.sqrt(sum(counts.values()))
