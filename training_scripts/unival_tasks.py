"""Tasks of UnIVAL as rows of Parquet files, and batches that mix them. Used by `train_unival.py`."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset
from transformers import BatchFeature

from hf_vlmerge.models.unival.media_unival import load_audio, load_image, load_video
from hf_vlmerge.models.unival.processing_unival import UnivalProcessor
from hf_vlmerge.models.unival.prompts_unival import BOX, PROMPTS, clean_caption_target, clean_text, make_prompt

COLUMNS = {"image": "image", "video": "frames", "audio": "audio"}  # where the medium stands
ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio"}  # of the processor


@dataclass
class Sizes:
    """What media are brought to before they are kept in memory."""

    image_size: int
    num_frames: int
    sampling_rate: int


@dataclass
class Example:
    """One thing to be said about one medium."""

    text: str  # what the instruction is about; empty where it takes nothing
    prompt: str
    targets: list[str]  # all of them right
    media: str  # image, video or audio
    medium: Any
    group: Any  # examples of one group are not independent
    box: list[float] | None = None  # x0, y0, x1, y1 in pixels of the medium


@dataclass
class Task:
    """
    An entry of the settings.

    Args:
        data: folder below DATA with train.parquet and validation.parquet.
        media: image, video or audio.
        prompt: a task of `PROMPTS`.
        kind: how it is scored: answers (from the list of all training answers), captions (CIDEr-D) or boxes (Acc@0.5).
        target: column of what is to be said, or of boxes; lists go with lists of texts, else they are alternatives.
        text: column of what is asked, a string or a list.
        question: one text for all rows, in place of `text`.
        rows: rows of a batch; 0 is only scored.
        only: the one text that is scored, of many.
        group: column whose value examples share that are not independent; by default those of one medium.
        max_words: of captions.
        baseline: a rule of `unival_baselines.py` beside the usual ones.
        stated: what the best rule without a network is known to reach on other examples, as a fraction.
    """

    data: str
    media: str
    prompt: str
    kind: str
    target: str
    text: str | None = None
    question: str | None = None
    rows: int = 0
    only: str | None = None
    group: str | None = None
    max_words: int = 30
    baseline: str | None = None
    stated: float | None = None

    def examples(self, row: dict, medium: Any, scale: np.ndarray, number: int) -> list[Example]:
        """All examples of a row; boxes are multiplied by `scale`."""
        texts, targets = self.question or (row[self.text] if self.text else ""), row[self.target]
        if isinstance(texts, str):
            texts, targets = [texts], [targets]
        group = number if self.group is None else row[self.group]
        found = []
        for text, target in zip(texts, targets, strict=True):
            if self.only not in (None, text):
                continue
            box = (np.array(target) * scale).tolist() if self.kind == "boxes" else None
            targets = [BOX] if self.kind == "boxes" else self.answers(target)
            found.append(Example(text, self.prompt_of(text), targets, self.media, medium, group, box))
        return found

    def prompt_of(self, text: str) -> str:
        fields = {} if PROMPTS[self.prompt].caption else {"text" if self.kind == "boxes" else "question": text}
        return make_prompt(self.prompt, **fields)

    def answers(self, target: str | list[str]) -> list[str]:
        targets = [target] if isinstance(target, str) else target
        if self.kind == "captions":
            return [clean_caption_target(clean_text(each), self.max_words) for each in targets]
        return [str(each) for each in targets]


@dataclass
class Corpus:
    """The data sets of the tasks; each split is decoded once and kept in memory."""

    root: Path
    tasks: dict[str, Task]
    sizes: Sizes

    @cached_property
    def train(self) -> dict[str, list[Example]]:
        return self.load("train")

    @cached_property
    def validation(self) -> dict[str, list[Example]]:
        return self.load("validation")

    def load(self, split: str) -> dict[str, list[Example]]:
        """Examples of every task."""
        examples = {name: [] for name in self.tasks}
        for data in sorted({task.data for task in self.tasks.values()}):
            tasks = {name: task for name, task in self.tasks.items() if task.data == data}
            (media,) = {task.media for task in tasks.values()}
            file = self.root / data / f"{split}.parquet"
            rows = datasets.load_dataset("parquet", data_files={split: str(file)}, split=split)
            for number, row in enumerate(rows):
                medium, scale = decode(row[COLUMNS[media]], media, self.sizes)
                for name, task in tasks.items():
                    examples[name] += task.examples(row, medium, scale, number)
        return examples

    def texts(self) -> Iterator[str]:
        """Everything that is said in training, for a vocabulary."""
        for examples in self.train.values():
            for example in examples:
                yield example.prompt
                yield from (f" {target}" for target in example.targets if target != BOX)


def decode(value: Any, media: str, sizes: Sizes) -> tuple[Any, np.ndarray]:
    """A medium as an array of bytes or samples, and what boxes are multiplied by."""
    if media == "image":
        picture, side = load_image(value), sizes.image_size
        scale = side / np.array([*picture.size, *picture.size])
        return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC)), scale
    if media == "video":
        return load_video(value, sizes.num_frames), np.ones(4)
    return load_audio(value, sizes.sampling_rate), np.ones(4)


class Mixture(IterableDataset):
    """
    Examples in an order that gives every batch the same number of rows of each task: a batch is `batch_size` examples
    in a row. Each task's examples come in random order, all of them before any comes again.
    """

    def __init__(self, examples: dict[str, list[Example]], tasks: dict[str, Task], seed: int):
        self.parts = [(examples[name], task.rows) for name, task in tasks.items() if task.rows]
        self.batch_size = sum(rows for _, rows in self.parts)
        self.seed = seed

    def __iter__(self) -> Iterator[Example]:
        orders = [(shuffled(examples, self.seed), rows) for examples, rows in self.parts]
        for order, rows in cycle(orders):
            for _ in range(rows):
                yield next(order)


def shuffled(examples: list, seed: int) -> Iterator:
    """All of them in random order, again and again."""
    generator = random.Random(seed)
    while True:
        yield from generator.sample(examples, len(examples))


class Collator:
    """
    One call of the processor for rows of any media.

    Args:
        seed: where given, one of several targets is drawn, and long sounds are cropped at random. Without it the first
            and the middle.
        with_targets: give labels.
    """

    def __init__(self, processor: UnivalProcessor, seed: int | None = None, with_targets: bool = True):
        self.processor, self.with_targets = processor, with_targets
        self.draws = None if seed is None else random.Random(seed)
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __call__(self, examples: list[Example]) -> BatchFeature:
        inputs: dict[str, Any] = {"text": [example.prompt for example in examples]}
        for media, argument in ARGUMENTS.items():
            column = [example.medium if example.media == media else None for example in examples]
            if any(medium is not None for medium in column):
                inputs[argument] = column
        if self.with_targets:
            inputs["targets"] = [self.choose(example.targets) for example in examples]
            if any(example.box is not None for example in examples):
                inputs["boxes"] = [example.box for example in examples]
        return self.processor(**inputs, size=self.processor.grounding_size, generator=self.generator)

    def choose(self, targets: list[str]) -> str:
        return targets[0] if self.draws is None else self.draws.choice(targets)
