"""`shapes` as a map-style data set: captions, questions or matching pairs."""

from collections.abc import Callable
from operator import index as as_integer

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from hf_vlmerge.data.shapes.captions import corrupt, fixed_captions, random_caption
from hf_vlmerge.data.shapes.questions import ANSWERS, answers_of, ask, choose, families_of
from hf_vlmerge.data.shapes.render import render
from hf_vlmerge.data.shapes.world import LEVELS, SPLITS, Scene, checked, generator_for, scenes_of

TASKS = ("captions", "questions", "matching")


class ShapesDataset:
    """
    Scenes with a text each, made on request: the same index gives the same example in any order and process.

    Args:
        num_examples: length; a longer set begins with the same examples.
        split: train, validation, test or test_compositional. Splits are by content: no scene is in two of them.
        level: easy (1-2 things), pair (two things, and each caption names size, colour and shape of both and their
            relation), medium (2-3 things), hard (3-5 things, captions as at pair).
        task: what `text` is. captions: a caption (and `captions`, five fixed ones). questions: a question with its
            `answer` and the answer's `label` (an index into `ShapesDataset.answers`). matching: a caption that is true
            (`label` 1) or differs from the truth in one point (0).
        image_size: pixels a side.
        seed: of all examples.
        noise: standard deviation of the pixel noise, of 255.

    Items are dicts: `image` (Pillow, RGB), `text`, and the columns of the task.

    Raises:
        ValueError: an unknown split, level or task (the nearest name is offered), or sizes below 1.
    """

    answers = ANSWERS

    def __init__(
        self,
        num_examples: int,
        split: str = "train",
        level: str = "easy",
        task: str = "captions",
        image_size: int = 48,
        seed: int = 0,
        noise: float = 10.0,
    ):
        if num_examples < 1 or image_size < 12:
            raise ValueError(f"expected num_examples >= 1 and image_size >= 12; got {num_examples} and {image_size}.")
        self.num_examples, self.image_size, self.seed, self.noise = num_examples, image_size, seed, noise
        self.split = checked(split, SPLITS, "split")
        self.level = checked(level, LEVELS, "level")
        self.task = checked(task, TASKS, "task")

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> dict:
        scene, columns, random = self._draw(index)
        pixels = render(scene, random, self.image_size, self.noise)
        return {"image": Image.fromarray(pixels), **columns}

    def scene(self, index: int) -> Scene:
        """The scene behind an example."""
        return self._draw(index)[0]

    def texts(self) -> list[str]:
        """All texts, without a single pixel."""
        return [self._draw(i)[1]["text"] for i in range(len(self))]

    def arrays(self, progress: bool = False) -> tuple[np.ndarray, dict[str, list]]:
        """
        Everything at once, for training from memory.

        Shapes:
            -> images (num_examples, image_size, image_size, 3), uint8; the other columns as lists
        """
        images = np.empty((len(self), self.image_size, self.image_size, 3), dtype=np.uint8)
        rows = []
        for i in tqdm(range(len(self)), desc="drawing shapes", unit="scene", disable=not progress, leave=False):
            scene, columns, random = self._draw(i)
            images[i] = render(scene, random, self.image_size, self.noise)
            rows.append(columns)
        return images, {name: [row[name] for row in rows] for name in rows[0]}

    def _draw(self, index: int) -> tuple[Scene, dict, np.random.Generator]:
        """Scene, text columns, and the generator in the state in which the pixels draw from it."""
        index = as_integer(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside a data set of {len(self)} examples.")
        random = generator_for(self.seed, f"{self.split}/{self.level}/{self.task}", index % len(self))
        make: Callable = {"captions": self._caption, "questions": self._question, "matching": self._match}[self.task]
        return *make(random), random

    def _caption(self, random: np.random.Generator) -> tuple[Scene, dict]:
        scene = next(scenes_of(random, self.level, self.split))
        text = random_caption(scene, self.level, random).text
        return scene, {"text": text, "captions": [caption.text for caption in fixed_captions(scene)]}

    def _question(self, random: np.random.Generator) -> tuple[Scene, dict]:
        settings = LEVELS[self.level]
        family = choose(random, families_of(settings))
        answer = choose(random, list(answers_of(family, settings)))
        for scene in scenes_of(random, self.level, self.split):  # until one admits such a question
            text = ask(scene, family, answer, self.level, random)
            if text is not None:
                return scene, {"text": text, "answer": answer, "label": ANSWERS.index(answer), "family": family}

    def _match(self, random: np.random.Generator) -> tuple[Scene, dict]:
        scene = next(scenes_of(random, self.level, self.split))
        caption = random_caption(scene, self.level, random)
        label = int(random.random() < 0.5)
        text = caption.text if label else corrupt(caption, scene, self.level, random).text
        return scene, {"text": text, "label": label}
