"""Examples with any medium, an instruction and a target become a batch, by one call of UnIVAL's processor."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import torch

from hf_vlmerge.data.masking import IGNORED
from hf_vlmerge.data.media import load_image
from hf_vlmerge.data.streaming import NUMBER

FIELD = re.compile(r"\{([^{}]+)\}")  # a column in an instruction
ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio"}  # of the processor


@dataclass(frozen=True)
class Columns:
    """
    Where an example has what.

    Args:
        media: image, video, audio -> column.
        texts: field of the instruction -> column.
        target: column of what is to be said: a string, several that are all right, or image codes. None where the box
            itself is to be said.
        box: column of x0, y0, x1, y1 in pixels of the image.
    """

    media: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    target: str | None = None
    box: str | None = None

    @property
    def said(self) -> list[str]:
        """Target and box, as far as there are any."""
        return [name for name in (self.target, self.box) if name]

    @property
    def lists(self) -> list[str]:
        """What goes together element by element where a row has several texts; see `streaming.Spread`."""
        return [*self.texts.values(), *self.said] if self.texts else []

    @property
    def all(self) -> list[str]:
        return [*self.media.values(), *self.texts.values(), *self.said]


def media_arguments(rows: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """Media of each row by kind, as the processor takes them: for each kind that occurs one entry a row, or None."""
    columns = {argument: [row.get(kind) for row in rows] for kind, argument in ARGUMENTS.items()}
    return {argument: media for argument, media in columns.items() if any(medium is not None for medium in media)}


class MediaTextCollator:
    """
    Media are decoded here, so a stream of undecoded examples holds one batch in memory.

    Args:
        processor: a `UnivalProcessor`, installed or loaded as remote code.
        columns: where an example has what.
        task: a task of the processor, whose instruction the texts are put into.
        template: or an instruction of one's own, `{field}` for each text (and `{box}` for the box).
        random: draw one of several targets, the frames of clips and a part of long sounds, from torch's generator,
            which trainers seed and restore. Without it the first target, and the middle ones.
        prompt_type: what the decoder starts with; see the processor.
        max_source_length, max_target_length: tokens that instruction and target are cut to, end token included; by
            default as many as the model has positions.

    Shapes:
        -> what the processor gives: input_ids, attention_mask (B, T); labels, decoder_input_ids (B, T'); media
    """

    def __init__(
        self,
        processor,
        columns: Columns,
        task: str | None = None,
        template: str | None = None,
        *,
        random: bool = False,
        prompt_type: str = "none",
        max_source_length: int | None = None,
        max_target_length: int | None = None,
    ):
        self.processor, self.columns, self.task, self.template = processor, columns, task, template
        self.random, self.prompt_type = random, prompt_type
        self.max_source_length, self.max_target_length = max_source_length, max_target_length

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        targets = {}
        if self.columns.target:
            targets["targets"] = [self.one_target(example) for example in examples]
        batch = dict(self.process(examples, with_box=True, **targets))
        if self.max_target_length:
            tokenizer = self.processor.tokenizer
            batch |= cut_targets(batch, self.max_target_length, tokenizer.eos_token_id, tokenizer.pad_token_id)
        return batch

    def without_targets(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What `generate` takes as `inputs`, and beside it what should come out and the sizes of the images."""
        decoded = [self.with_pictures(example) for example in examples]
        pictures = [example.get(self.columns.media.get("image")) for example in decoded]
        return {
            "inputs": dict(self.process(decoded, with_box=self.columns.target is not None)),
            "numbers": [example[NUMBER] for example in examples],
            "references": [self.reference(example) for example in examples],
            "sizes": [None if picture is None else picture.size[::-1] for picture in pictures],
        }

    def with_pictures(self, example: Mapping[str, Any]) -> dict[str, Any]:
        column = self.columns.media.get("image")
        pictures = {column: load_image(opened(example[column]))} if column and example[column] is not None else {}
        return dict(example) | pictures

    def process(self, examples: Sequence[Mapping[str, Any]], with_box: bool, **targets):
        media = [{kind: opened(example[name]) for kind, name in self.columns.media.items()} for example in examples]
        boxes = {"boxes": [example[self.columns.box] for example in examples]} if self.columns.box and with_box else {}
        return self.processor(
            **media_arguments(media),
            **self.instructions(examples),
            **boxes,
            **targets,
            prompt_type=self.prompt_type,
            generator=torch.default_generator if self.random else None,
            truncation=True,
            max_length=self.max_source_length,
        )

    def instructions(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        texts = [
            {name: as_text(example[column], column) for name, column in self.columns.texts.items()}
            for example in examples
        ]
        if self.task is None:
            return {"text": [fill(self.template, each) for each in texts]}
        return {"task": self.task, "text": texts} if self.columns.texts else {"task": self.task}

    def one_target(self, example: Mapping[str, Any]) -> Any:
        target = self.reference(example)
        if not isinstance(target, list) or not target or isinstance(target[0], int):  # one text, or image codes
            return target
        return target[int(torch.randint(len(target), ()))] if self.random else target[0]

    def reference(self, example: Mapping[str, Any]) -> Any:
        """A text, several that are all right, the codes of an image, or a box."""
        column = self.columns.said[0]
        value = example[column]
        if column != self.columns.target:
            return value
        if not isinstance(value, (list, tuple)):
            return as_text(value, column)
        return [each if isinstance(each, int) else as_text(each, column) for each in value]


def opened(medium: Any) -> Any:
    """A medium as it is; the bytes of one that `datasets` has left in an archive or on a server."""
    path = medium.get("path") if isinstance(medium, Mapping) and medium.get("bytes") is None else None
    if not path or "://" not in path:
        return medium
    with fsspec.open(path, "rb") as file:
        return file.read()


def as_text(value: Any, column: str) -> str:
    """What stands in a column, as a text."""
    if not isinstance(value, str | int | float):
        raise ValueError(f"column {column!r} has {value!r:.80}; expected a text.")
    return str(value)


def fill(template: str, texts: Mapping[str, str]) -> str:
    """A template with texts in it; other braces stay."""
    return FIELD.sub(lambda found: texts.get(found[1], found[0]), template)


def cut_targets(
    batch: Mapping[str, torch.Tensor], limit: int, end_token_id: int, pad_token_id: int
) -> dict[str, torch.Tensor]:
    """
    Targets of at most so many tokens, the last of them the end token; prompts of the decoder are not counted.

    Shapes:
        labels, decoder_input_ids (B, Q) -> (B, up to Q)
    """
    wanted = batch["labels"] != IGNORED
    place = wanted.cumsum(1)
    beyond = wanted & (place > limit)
    last = wanted & (place == limit) & beyond.any(1, keepdim=True)
    labels = batch["labels"].masked_fill(last, end_token_id).masked_fill(beyond, IGNORED)
    inputs = batch["decoder_input_ids"].masked_fill(beyond, pad_token_id)
    length = int((labels != IGNORED).any(0).nonzero().max()) + 1
    return {"labels": labels[:, :length], "decoder_input_ids": inputs[:, :length]}
