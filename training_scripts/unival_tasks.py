"""Tasks of UnIVAL as rows of Parquet files, and batches that mix them. Used by `train_unival.py`."""

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset
from transformers import BatchFeature

from hf_vlmerge.data.media_text import media_arguments
from hf_vlmerge.data.streaming import aligned
from hf_vlmerge.models.unival.media_unival import load_audio, load_image, load_video
from hf_vlmerge.models.unival.processing_unival import UnivalProcessor
from hf_vlmerge.models.unival.prompts_unival import BOX, clean_caption_target, clean_text, fields_of, make_prompt

COLUMNS = {"image": "image", "video": "frames", "audio": "audio"}  # where the medium stands


@dataclass
class Sizes:
    """What media are brought to before they are kept in memory."""

    image_size: int
    frame_size: int
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
    row: int  # of its data set; examples of one row are about one medium
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
        texts: in a batch about each medium; 0 is only scored.
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
    texts: int = 0
    only: str | None = None
    group: str | None = None
    max_words: int = 30
    baseline: str | None = None
    stated: float | None = None

    def examples(self, row: dict, medium: Any, scale: np.ndarray, number: int) -> list[Example]:
        """All examples of a row; boxes are multiplied by `scale`."""
        texts, targets = self.question or (row[self.text] if self.text else ""), row[self.target]
        group = number if self.group is None else row[self.group]
        found = []
        for text, target in aligned(texts, targets):
            if self.only not in (None, text):
                continue
            prompt = make_prompt(self.prompt, **dict.fromkeys(fields_of(self.prompt), text))
            box = (np.array(target) * scale).tolist() if self.kind == "boxes" else None
            said = [BOX] if self.kind == "boxes" else self.answers(target)
            found.append(Example(text, prompt, said, self.media, medium, number, group, box))
        return found

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
        return np.asarray(resize(picture, side)), side / np.array([*picture.size, *picture.size])
    if media == "video":
        frames = [resize(load_image(frame), sizes.frame_size) for frame in value]
        return load_video(frames, sizes.num_frames), np.ones(4)
    return load_audio(value, sizes.sampling_rate), np.ones(4)


def resize(picture: Image.Image, side: int) -> Image.Image:
    return picture.resize((side, side), Image.Resampling.BICUBIC)


class Mixture(IterableDataset):
    """
    Batches of one kind of media, kind after kind, with the same number of media of each data set and of texts of each
    task about each medium. Texts about one medium stand side by side, so that its tower needs to run only once
    (`unival_towers.py`).

    Args:
        media: data set -> media of a batch. They come in random order, all of them before any comes again.
    """

    def __init__(self, examples: dict[str, list[Example]], tasks: dict[str, Task], media: dict[str, int], seed: int):
        self.seed = seed
        self.kinds = defaultdict(list)  # kind of media -> media of a data set, how many of them, texts about each
        for data, count in media.items():
            texts = {name: task.texts for name, task in tasks.items() if task.data == data and task.texts}
            (kind,) = {tasks[name].media for name in texts}
            self.kinds[kind].append((by_medium({name: examples[name] for name in texts}), count, texts))

    def __iter__(self) -> Iterator[list[Example]]:
        generator = random.Random(self.seed)
        streams = {
            kind: [(shuffled(media, generator), count, texts) for media, count, texts in parts]
            for kind, parts in self.kinds.items()
        }
        while True:
            for parts in streams.values():
                drawn = ((next(order), texts) for order, count, texts in parts for _ in range(count))
                yield [example for medium, texts in drawn for example in draw(medium, texts, generator)]


def by_medium(examples: dict[str, list[Example]]) -> list[dict[str, list[Example]]]:
    """What each task has to say about each medium of a data set."""
    media = {}
    for name, each in examples.items():
        for example in each:
            media.setdefault(example.row, {}).setdefault(name, []).append(example)
    return list(media.values())


def draw(medium: dict[str, list[Example]], texts: dict[str, int], generator: random.Random) -> list[Example]:
    """So many examples of each task; of any task for one that has none about this medium."""
    drawn = []
    for name, count in texts.items():
        known = medium.get(name) or [example for each in medium.values() for example in each]
        drawn += generator.sample(known, count) if count <= len(known) else generator.choices(known, k=count)
    return drawn


def shuffled(items: list, generator: random.Random) -> Iterator:
    """All of them in random order, again and again."""
    while True:
        yield from generator.sample(items, len(items))


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
        inputs |= media_arguments([{example.media: example.medium} for example in examples])
        if self.with_targets:
            inputs["targets"] = [self.choose(example.targets) for example in examples]
            if any(example.box is not None for example in examples):
                inputs["boxes"] = [example.box for example in examples]
        return self.processor(**inputs, size=self.processor.grounding_size, generator=self.generator)

    def choose(self, targets: list[str]) -> str:
        return targets[0] if self.draws is None else self.draws.choice(targets)
