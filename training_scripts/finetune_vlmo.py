"""Fine-tune a VLMo-style model, merged or not, on one task, and measure it on the validation split.

Gives   a folder with model and processor; prints the scores.
Costs   a minute or two on two CPU cores at the sizes of `settings/`.
Run     python training_scripts/finetune_vlmo.py training_scripts/settings/emoji_captions.yaml DATA runs/merged \
            retrieval runs/merged_retrieval

The tasks are those of the settings file: `retrieval` (recall in both directions), or answers from a closed list, which
are questions (lists of questions and answers a row) or a true-or-false sentence.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pretrain_vlmo import Experiment

from hf_vlmerge.data.collators import VlmoQuestionAnsweringCollator, VlmoRetrievalCollator
from hf_vlmerge.evaluation.classification import evaluate_answers
from hf_vlmerge.evaluation.retrieval import embed_all, evaluate_retrieval
from hf_vlmerge.models.vlmo.modeling_vlmo import VlmoForImageAndTextRetrieval, VlmoForQuestionAnswering
from hf_vlmerge.training.stages import Stage


def measure_retrieval(experiment: Experiment, model, text_column: str) -> dict[str, float]:
    """
    Recall over the validation images and one text of each (the first of a list); equal texts count once.

    `all_r1` ... `all_r10` are text retrieval among the training texts as well: the right name of thousands.
    """
    first = lambda row: row[text_column] if isinstance(row[text_column], str) else row[text_column][0]  # noqa: E731
    texts = {first(row): row["pixel_values"] for row in reversed(experiment.validation)}
    everything = [*texts, *sorted({first(row) for row in experiment.train} - texts.keys())]
    pixels = experiment.pixels(torch.stack(list(texts.values())))
    length = experiment.settings["model"]["max_text_length"]
    encoded = experiment.tokenizer(everything, padding=True, truncation=True, max_length=length, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    scores = evaluate_retrieval(model, pixels, {name: tensor[: len(texts)] for name, tensor in inputs.items()})
    embeds = [
        embed_all(model.eval(), kind, items, None, 256, False) for kind, items in (("images", pixels), ("text", inputs))
    ]
    similarity = (embeds[0] @ embeds[1].t()).numpy()
    return scores | {f"all_r{k}": share_in_top(similarity, range(len(texts)), k) for k in (1, 5, 10)}


def share_in_top(similarity: np.ndarray, truth: Sequence[int], k: int) -> float:
    """Share of rows in which fewer than k entries are above the entry at `truth`: (rows, candidates), (rows,)"""
    own = similarity[np.arange(len(similarity)), list(truth)]
    return float(((similarity > own[:, None]).sum(1) < k).mean())


def answer_examples(rows: list[dict], task: dict, answers: list[str]) -> list[dict]:
    """One example a question; unknown answers are left out. Rows of one group are not independent of each other."""
    examples = []
    for number, row in enumerate(rows):
        texts, labels = row[task["text"]], row[task["label"]]
        if isinstance(texts, str):
            texts, labels = [texts], [labels]
        for text, label in zip(texts, labels, strict=True):
            if str(label) in answers:
                common = {"pixel_values": row["pixel_values"], "group": row.get(task.get("group"), number)}
                examples.append(common | {"text": text, "label": answers.index(str(label))})
    return examples


def answer_list(rows: list[dict], task: dict) -> list[str]:
    """All answers of the training split, sorted."""
    labels = (row[task["label"]] for row in rows)
    return sorted({str(label) for value in labels for label in (value if isinstance(value, list) else [value])})


def finetune(experiment: Experiment, checkpoint: str | Path, name: str, seed: int = 0):
    """The fine-tuned model and its scores on the validation split."""
    task = experiment.settings["tasks"][name]
    stage = Stage(**task["stage"] | {"seed": seed})
    torch.manual_seed(seed)  # of the new head
    if task["kind"] == "retrieval":
        model = VlmoForImageAndTextRetrieval.from_pretrained(checkpoint)
        collator = experiment.collator(VlmoRetrievalCollator, task["text"], task.get("augmentation"))
        stage.train(model, experiment.train, collator, f"fine-tuning for {name}")
        return model, measure_retrieval(experiment, model, task["text"])
    answers = answer_list(experiment.train, task)
    labels = {"id2label": dict(enumerate(answers)), "label2id": {answer: i for i, answer in enumerate(answers)}}
    model = VlmoForQuestionAnswering.from_pretrained(checkpoint, **labels)
    collator = experiment.collator(VlmoQuestionAnsweringCollator, "text", task.get("augmentation"))
    stage.train(model, answer_examples(experiment.train, task, answers), collator, f"fine-tuning for {name}")
    held_out = answer_examples(experiment.validation, task, answers)
    collator = experiment.collator(VlmoQuestionAnsweringCollator, "text")
    return model, evaluate_answers(model, held_out, collator, group_by="group")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", help="YAML file with model, vocabulary and tasks")
    parser.add_argument("data", help="folder with train.parquet and validation.parquet, or the id of a data set")
    parser.add_argument("checkpoint", help="folder or Hub id of the model to start from")
    parser.add_argument("task", help="one of the tasks in the settings")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    experiment = Experiment.load(arguments.settings, arguments.data)
    model, scores = finetune(experiment, arguments.checkpoint, arguments.task, arguments.seed)
    model.save_pretrained(arguments.output)
    experiment.processor.save_pretrained(arguments.output)
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
