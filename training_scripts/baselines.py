"""What a model has to beat on the validation split: scores that need no network.

Gives   retrieval: recall of each text when an image is named after the nearest training image (squared distance of
        16 x 16 pixels), among the validation texts and among all texts; answers: the most frequent answer, and the most
        frequent answer to the same question.
Costs   seconds.
Run     python training_scripts/baselines.py training_scripts/settings/emoji_captions.yaml DATA
"""

import argparse
import json
from collections import Counter, defaultdict

import numpy as np
import torch
from finetune_vlmo import answer_examples, answer_list, share_in_top
from pretrain_vlmo import Experiment

from hf_vlmerge.data.examples import load_examples


def retrieval_baseline(data: str, text_column: str) -> dict[str, float]:
    """Text retrieval by the nearest training image of each text; texts without one come last."""
    train, validation = (load_examples(data, split, 16) for split in ("train", "validation"))
    pixels = [torch.stack([row["pixel_values"] for row in rows]).flatten(1).float() for rows in (train, validation)]
    distance = torch.cdist(pixels[1], pixels[0]).numpy()  # (validation, train)
    texts = np.array([row[text_column] for row in train])
    scores = {}
    own = [row[text_column] for row in validation]
    for name, candidates in (("validation texts", own), ("all texts", sorted({*own, *texts}))):
        nearest = np.full((len(own), len(candidates)), -1e9)
        for column, text in enumerate(candidates):
            if (texts == text).any():
                nearest[:, column] = -distance[:, texts == text].min(1)
        truth = [candidates.index(text) for text in own]
        scores |= {f"R@{k}, {name}": share_in_top(nearest, truth, k) for k in (1, 5, 10)}
    return scores


def answer_baselines(experiment: Experiment, task: dict) -> dict[str, float]:
    """Accuracy of the majority answer, and of the majority answer to the same text."""
    answers = answer_list(experiment.train, task)
    train, validation = (answer_examples(rows, task, answers) for rows in (experiment.train, experiment.validation))
    overall, by_text = Counter(row["label"] for row in train), defaultdict(Counter)
    for row in train:
        by_text[row["text"]][row["label"]] += 1
    majority = overall.most_common(1)[0][0]
    guesses = [by_text[row["text"]].most_common(1)[0][0] if row["text"] in by_text else majority for row in validation]
    labels = np.array([row["label"] for row in validation])
    return {"majority": float((labels == majority).mean()), "text only": float((labels == np.array(guesses)).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", help="YAML file with tasks")
    parser.add_argument("data", help="folder with train.parquet and validation.parquet, or the id of a data set")
    arguments = parser.parse_args()
    experiment = Experiment.load(arguments.settings, arguments.data)
    for name, task in experiment.settings["tasks"].items():
        if task["kind"] == "retrieval":
            scores = retrieval_baseline(arguments.data, task["text"])
        else:
            scores = answer_baselines(experiment, task)
        print(name, json.dumps({key: round(value, 4) for key, value in scores.items()}))


if __name__ == "__main__":
    main()
