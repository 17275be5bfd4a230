# Copyright 2026 The hf_vlmerge authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Text, images, clips and sounds for UnIVAL in one call, and model output back to boxes and codes."""

import inspect
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.functional import pad
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .batching_unival import make_rows
from .batching_unival import media_types
from .batching_unival import text_rows
from .chats_unival import media_of_chats
from .generation_unival import GENERATION_SETTINGS
from .generation_unival import SPECIAL_IDS
from .generation_unival import AnswerTrie
from .grounding_unival import bins_of_boxes
from .grounding_unival import boxes_of_bins
from .losses_unival import IGNORED
from .media_unival import generator_of
from .media_unival import load_image
from .media_unival import load_video
from .prompts_unival import BOX
from .prompts_unival import PROMPTS
from .prompts_unival import fields_of
from .prompts_unival import make_prompt
from .prompts_unival import make_target
from .prompts_unival import prompt_of

PROMPT_TYPES = ("none", "prev_output", "src")
# A chat becomes the texts of its messages; a picture alone is to be described.
CHAT_TEMPLATE = (
    "{%- set ns = namespace(text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message.content is string -%}{%- set ns.text = ns.text + ' ' + message.content -%}"
    "{%- else -%}{%- for part in message.content if part.type == 'text' -%}"
    "{%- set ns.text = ns.text + ' ' + part.text -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endfor -%}"
    "{{- ns.text if ns.text else ' what does the image describe?' -}}"
)


class UnivalProcessor(ProcessorMixin):
    """
    A `UnivalImageProcessor`, a `UnivalFeatureExtractor` and a tokenizer of `build_tokenizer`.

    Args:
        image_processor, feature_extractor, tokenizer: the parts.
        num_frames (`int`): frames taken of a clip.
        frame_size (`int`): side in pixels of the square cut from them.
        resize_frames (`bool`): bring the shorter side of a clip to `frame_size` before the square is cut. The models
            were trained on clips stored at that size, which this leaves as they are; without it larger clips lose
            their borders and smaller ones get black ones.
        grounding_size (`int`): side of pictures whose boxes are read or written.
    """

    def __init__(
        self,
        image_processor=None,
        feature_extractor=None,
        tokenizer=None,
        num_frames: int = 16,
        frame_size: int = 384,
        resize_frames: bool = True,
        grounding_size: int = 512,
        chat_template: str | None = CHAT_TEMPLATE,
        **kwargs,
    ):
        self.num_frames = num_frames
        self.frame_size = frame_size
        self.resize_frames = resize_frames
        self.grounding_size = grounding_size
        super().__init__(image_processor, feature_extractor, tokenizer, chat_template=chat_template, **kwargs)
        self._first = {kind: tokenizer.convert_tokens_to_ids(f"<{kind}_0>") for kind in ("code", "bin")}
        self._counts = {kind: _count_tokens(tokenizer, kind) for kind in ("code", "bin")}

    def __call__(
        self,
        images=None,
        text=None,
        videos=None,
        audio=None,
        *,
        task=None,
        boxes=None,
        targets=None,
        prompt_type="none",
        size=None,
        num_frames=None,
        frame_size=None,
        sampling_rate=None,
        generator=None,
        padding=True,
        truncation=False,
        max_length=None,
        return_tensors="pt",
    ) -> BatchFeature:
        """
        Inputs of the model for one example or a batch; rows may have an image, a clip, a sound or text only.

        Args:
            images, videos, audio: one medium, or a list with one entry a row, None for rows without it. See
                `media_unival` for what may be given. A list of pictures as `videos` is one clip.
            text: a string or a list; an instruction as it is, or with `task` what its instruction is made with (a
                mapping where it takes several texts, such as `{"premise": ..., "hypothesis": ...}`). A leading space
                is added where there is none.
            task: a key of `PROMPTS`.
            boxes: one box x0, y0, x1, y1 a row (pixels of the original image) or None; its four location tokens replace
                `{box}` in the row's text or target.
            targets: what the model is to say, a string a row (a leading space is added), or a row's image codes as
                integers; gives `labels` and `decoder_input_ids`. The task "visual_grounding" takes them from `boxes`.
            prompt_type: what the decoder starts with: "none"; "prev_output", the tokens of the text; "src", these and
                the end token. Such a start is not learnt. Without targets it is given as `decoder_input_ids`, padded
                on the right.
            size: side of the images (or the form of image processors, {"height": side, "width": side}); by default
                that of the image processor, or `grounding_size` with boxes or a task that is about them.
            num_frames, frame_size: of clips; the processor's own by default.
            sampling_rate: of sounds that are arrays; None means the feature extractor's.
            generator: a `torch.Generator` or a seed for random frames of each interval and random crops of long sounds;
                without it the middle ones are taken.
            padding, truncation, max_length, return_tensors: as for tokenizers ("pt" or "np").

        Shapes:
            -> input_ids, attention_mask (B, T); media_types (B,): -1 none, 0 image, 1 video, 2 audio; and for the rows
            that have them, in row order: pixel_values (·, 3, H, W), pixel_values_videos (·, F, 3, H, W),
            input_values (·, samples); labels, decoder_input_ids (B, T'); decoder_code_mask (B,), all True, where image
            codes are to be said

        Raises:
            ValueError: numbers of rows differ, a row has two media, a medium cannot be decoded, a box lies outside its
                image, a text has more tokens than the model has positions, or there is nothing to do.
        """
        if prompt_type not in PROMPT_TYPES:
            raise ValueError(f"expected prompt_type to be one of {PROMPT_TYPES}; got {prompt_type!r}.")
        generator = generator_of(generator)
        size = _side(size)
        rows = make_rows(images=images, videos=videos, audio=audio, text=text, boxes=boxes, targets=targets)
        data = {"media_types": media_types(rows)}
        grounding = boxes is not None or (task is not None and prompt_of(task).grounding)
        pictures = {i: load_image(each) for i, each in enumerate(rows["images"] or ()) if each is not None}
        size = self.grounding_size if size is None and grounding else size
        num_frames = self.num_frames if num_frames is None else num_frames
        data |= self._images(list(pictures.values()), size)
        data |= self._videos(rows["videos"], num_frames, frame_size or self.frame_size, generator)
        data |= self._audio(rows["audio"], sampling_rate, generator)
        box_tokens = self._box_tokens(rows["boxes"], pictures, data)

        sources = _sources(rows["text"], task, len(data["media_types"]))
        source_ids = None
        if sources is not None:
            source_ids = self._encode(_with_boxes(sources, box_tokens), truncation, max_length)
            self._check_positions(source_ids, "text")
            data |= self._padded_sources(source_ids, padding, max_length)
        says_codes = _says_codes(rows["targets"], task)
        answers = _answers(rows["targets"], task, rows["boxes"], self._counts["code"])
        if answers is not None:
            answers = self._encode(_with_boxes(answers, box_tokens), truncation and not says_codes, None)
        data |= self._decoder_inputs(source_ids, answers, prompt_type, says_codes)
        if says_codes:
            data["decoder_code_mask"] = torch.ones(len(data["media_types"]), dtype=torch.bool)
        return _tensors(data, return_tensors)

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        *,
        tokenize=False,
        return_dict=False,
        return_tensors="pt",
        processor_kwargs=None,
        **kwargs,
    ):
        """
        The text of one chat or several, or with `tokenize` the inputs of the model, one row a chat.

        Args:
            conversation: messages whose content is a string or a list of parts: texts, and one image, video or sound,
                `{"type": "audio", "path": ...}`. The source stands under the kind's name, "url" or "path", and may be
                whatever `__call__` takes.
            return_dict: the inputs rather than `input_ids` alone.
            processor_kwargs: arguments of `__call__`, which may also be given as they are.
            **kwargs: as for any processor, such as `add_generation_prompt`.

        Raises:
            ValueError: a chat has more than one medium, or what `__call__` raises.
        """
        own = set(inspect.signature(self.__call__).parameters)
        options = {name: kwargs.pop(name) for name in own & kwargs.keys()} | (processor_kwargs or {})
        text = super().apply_chat_template(conversation, chat_template, tokenize=False, **kwargs)
        if not tokenize:
            return text
        kind = "pt" if return_tensors in (None, "auto") else return_tensors
        inputs = self(text=text, **media_of_chats(conversation) | {"return_tensors": kind} | options)
        return inputs if return_dict else inputs["input_ids"]

    def _images(self, pictures: list, side: int | None) -> dict[str, Tensor]:
        if not pictures:
            return {}
        options = {} if side is None else {"size": {"height": side, "width": side}}
        return dict(self.image_processor(pictures, return_tensors="pt", **options))

    def _videos(self, clips: list | None, num_frames: int, side: int, generator) -> dict[str, Tensor]:
        clips = [load_video(clip, num_frames, generator) for clip in clips or () if clip is not None]
        if not clips:
            return {}
        return {"pixel_values_videos": torch.stack([fit_frames(clip, side, self.resize_frames) for clip in clips])}

    def _audio(self, sounds: list | None, sampling_rate: int | None, generator) -> dict[str, Tensor]:
        sounds = [sound for sound in sounds or () if sound is not None]
        if not sounds:
            return {}
        return dict(self.feature_extractor(sounds, sampling_rate=sampling_rate, generator=generator))

    def _box_tokens(self, boxes: list | None, pictures: dict, data: dict) -> dict[int, str]:
        """The four location tokens of the rows that have a box."""
        given = {i: box for i, box in enumerate(boxes or ()) if box is not None}
        for row in given:
            if row not in pictures:
                raise ValueError(f"row {row} has a box and no image that it could belong to.")
        if not given:
            return {}
        sizes = torch.tensor([pictures[row].size[::-1] for row in given])
        side = data["pixel_values"].shape[-1]
        bins = bins_of_boxes(torch.tensor(list(given.values())), sizes, side, self._count("bin"))
        return {row: "".join(f"<bin_{i}>" for i in each) for row, each in zip(given, bins.tolist(), strict=True)}

    def _encode(self, texts: list[str], truncation: bool, max_length: int | None) -> list[list[int]]:
        """Ids of each text with start and end token; texts never become special tokens, whatever they contain."""
        limit = self.tokenizer.model_max_length
        cut = {"truncation": True, "max_length": min(max_length or limit, limit)} if truncation else {}
        return self.tokenizer(texts, split_special_tokens=True, verbose=False, **cut)["input_ids"]

    def _check_positions(self, ids: list[list[int]], what: str) -> None:
        limit = self.tokenizer.model_max_length
        for row, each in enumerate(ids):
            if len(each) > limit:
                raise ValueError(
                    f"the {what} of row {row} has {len(each)} tokens and the model has {limit} text positions; "
                    "shorten it or pass truncation=True."
                )

    def _padded_sources(self, ids: list[list[int]], padding: Any, max_length: int | None) -> dict[str, Tensor]:
        length = None
        if padding == "max_length":
            length = max_length or self.tokenizer.model_max_length
        elif padding in (False, "do_not_pad") and len({len(row) for row in ids}) > 1:
            raise ValueError("texts of different lengths make no batch without padding; pass padding=True.")
        return {
            "input_ids": _pad(ids, self.tokenizer.pad_token_id, length),
            "attention_mask": _pad([[1] * len(row) for row in ids], 0, length),
        }

    def _decoder_inputs(
        self, sources: list | None, answers: list | None, prompt_type: str, says_codes: bool
    ) -> dict[str, Tensor]:
        """
        What the decoder starts with, and what it is to say: at each place of `decoder_input_ids` (start, prompt,
        answer) the label is the next token; places whose next token is the prompt's have none.
        """
        if answers is None and prompt_type == "none":
            return {}
        if prompt_type != "none" and sources is None:
            raise ValueError(f"prompt_type={prompt_type!r} starts the decoder with the text; there is none.")
        count = len(answers if answers is not None else sources)
        cut = {"none": slice(0, 1), "prev_output": slice(0, -1), "src": slice(None)}[prompt_type]
        starts = [sources[i][cut] for i in range(count)] if sources else [[self.tokenizer.bos_token_id]] * count
        pad_id = self.tokenizer.pad_token_id
        if answers is None:
            return {"decoder_input_ids": _pad(starts, pad_id)}
        inputs = [start + answer[1:-1] for start, answer in zip(starts, answers, strict=True)]
        if not says_codes:  # whose positions are those of a grid
            self._check_positions(inputs, "target")
        labels = [[IGNORED] * (len(start) - 1) + answer[1:] for start, answer in zip(starts, answers, strict=True)]
        return {"decoder_input_ids": _pad(inputs, pad_id), "labels": _pad(labels, IGNORED)}

    # --------------------------------------------------------------------------------------------- output of the model

    def post_process_grounding(self, sequences: Tensor, target_sizes: Any, size: int | None = None) -> Tensor:
        """
        Boxes in pixels of the original images from generated location tokens.

        Args:
            sequences: generated ids; the first four after the start token are a row's box.
            target_sizes: height and width of the original images, a list of pairs or (B, 2).
            size: side that the images were resized to; `grounding_size` by default.

        Shapes:
            sequences (B, T) -> (B, 4) x0, y0, x1, y1; a row whose tokens are not four locations is nan
        """
        first, count = self._first["bin"], self._count("bin")
        bins = torch.full((len(sequences), 4), -1)
        for row, ids in enumerate(_content(sequences)):
            if len(ids) >= 4 and all(first <= i < first + count for i in ids[:4]):
                bins[row] = torch.tensor(ids[:4]) - first
        sizes = torch.as_tensor(target_sizes)
        if tuple(sizes.shape) != (len(bins), 2):
            raise ValueError(f"expected {len(bins)} pairs of height and width; got {tuple(sizes.shape)}.")
        return boxes_of_bins(bins, sizes.cpu(), size or self.grounding_size, count)

    def post_process_image_codes(self, sequences: Tensor) -> Tensor:
        """
        The grid of image codes from generated ids, for the decoder of the image tokenizer.

        Shapes:
            sequences (B, T) -> (B, S, S) int64, row by row, for S² codes between the special tokens

        Raises:
            ValueError: a row has other tokens or no square number of codes.
        """
        first, count = self._first["code"], self._count("code")
        grids = []
        for row, ids in enumerate(_content(sequences)):
            side = round(len(ids) ** 0.5)
            if not ids or side * side != len(ids) or not all(first <= i < first + count for i in ids):
                others = sum(not first <= i < first + count for i in ids)
                raise ValueError(
                    f"expected a square number of image codes; row {row} has {len(ids)} tokens, of which {others} are "
                    "no codes."
                )
            grids.append(torch.tensor(ids).view(side, side) - first)
        return torch.stack(grids)

    # ------------------------------------------------------------------------------------------------------ generation

    def answer_trie(self, answers: list[str]) -> AnswerTrie:
        """For `generate(answer_trie=...)` and `score_candidates`: only these answers, a leading space added."""
        texts = [_spaced(answer, row) for row, answer in enumerate(text_rows(answers))]
        ids = self._encode(texts, False, None) if texts else []
        return AnswerTrie([row[1:-1] for row in ids], self.tokenizer.eos_token_id)

    def generation_settings(self, task: str) -> dict[str, Any]:
        """
        Arguments of `generate()` that a task was evaluated with: `model.generate(**inputs, **settings)`.

        Raises:
            ValueError: there are none for the task.
        """
        if task not in GENERATION_SETTINGS:
            raise ValueError(f"there are no settings for {task!r}; there are for {', '.join(GENERATION_SETTINGS)}.")
        settings = dict(GENERATION_SETTINGS[task])
        if task in PROMPTS and PROMPTS[task].codes:
            settings["token_range"] = (self._first["code"], self._first["code"] + self._count("code"))
        return settings

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "media_types", "pixel_values", "pixel_values_videos", "input_values"]

    # ------------------------------------------------------------------------------------------------------ vocabulary

    def _count(self, kind: str) -> int:
        """How many codes or bins there are."""
        if not self._counts[kind]:
            raise ValueError(f"the tokenizer has no <{kind}_0>: make it with build_tokenizer.")
        return self._counts[kind]


def _count_tokens(tokenizer: Any, kind: str) -> int:
    """How many of <kind_0>, <kind_1>, ... the vocabulary has, without reading it."""
    unknown = (None, tokenizer.unk_token_id)
    names = range(len(tokenizer))
    return bisect_left(names, True, key=lambda i: tokenizer.convert_tokens_to_ids(f"<{kind}_{i}>") in unknown)


def fit_frames(frames: Tensor, side: int, resize: bool = True) -> Tensor:
    """
    The square in the middle of each frame, scaled to [-1, 1].

    Args:
        frames: pixels as bytes.
        side: of the square. Frames that are smaller get a black border.
        resize: first bring the shorter side to `side` (bicubic).

    Shapes:
        (F, 3, H, W) uint8 -> (F, 3, side, side) float32
    """
    shorter = min(frames.shape[-2:])
    if resize and shorter != side:
        size = [side if length == shorter else length * side // shorter for length in frames.shape[-2:]]
        frames = frames.contiguous(memory_format=torch.channels_last)  # 4 to 8 times faster to resize
        frames = interpolate(frames, size=size, mode="bicubic", antialias=True)
    missing = [max(side - length, 0) for length in frames.shape[-2:]]
    if any(missing):
        (above, left) = (length // 2 for length in missing)
        frames = pad(frames, (left, missing[1] - left, above, missing[0] - above))
    top, left = (round((length - side) / 2) for length in frames.shape[-2:])
    square = frames[..., top : top + side, left : left + side].contiguous()
    return square.float().div_(255).sub_(0.5).div_(0.5)


def _sources(texts: list | None, task: str | None, count: int) -> list[str] | None:
    """Instructions of all rows."""
    if task is None:
        return None if texts is None else [_spaced(text, row) for row, text in enumerate(texts)]
    fields = fields_of(task)
    if texts is None and fields:
        raise ValueError(f"the task {task!r} takes {', '.join(fields)}; pass it as text.")
    if texts is not None and not fields:
        raise ValueError(f"the task {task!r} takes no text; its instruction is {prompt_of(task).source!r}.")
    texts = [{}] * count if texts is None else texts
    return [make_prompt(task, **(text if isinstance(text, Mapping) else {fields[0]: text})) for text in texts]


def _side(size: Any) -> int | None:
    """Of a square, from a number or what image processors take."""
    side = size.get("height") if isinstance(size, Mapping) else size
    if isinstance(size, Mapping) and set(size.items()) != {("height", side), ("width", side)}:
        raise ValueError(f"expected size to be a square, a number or equal height and width; got {dict(size)}.")
    if side is not None and side < 1:
        raise ValueError(f"expected a size of at least 1 pixel; got {side}.")
    return side


def _answers(targets: list | None, task: str | None, boxes: list | None, num_codes: int) -> list[str] | None:
    """What is to be said in all rows."""
    if targets is None:
        if boxes is None or task is None or prompt_of(task).target != BOX:
            return None
        return [BOX] * len(boxes)
    if _says_codes(targets, task):
        return [_code_tokens(codes, row, num_codes) for row, codes in enumerate(targets)]
    if task is not None:
        return [make_target(task, _string(target, row)) for row, target in enumerate(targets)]
    return [_spaced(target, row) for row, target in enumerate(targets)]


def _says_codes(targets: list | None, task: str | None) -> bool:
    """Whether the rows are to be answered with images: targets are then numbers of codes."""
    if task is not None:
        return prompt_of(task).codes
    return targets is not None and not isinstance(targets[0], str)


def _code_tokens(codes: Any, row: int, count: int) -> str:
    """The tokens of an image. Others than those of the vocabulary would be spelled as text."""
    if isinstance(codes, str) or not hasattr(codes, "__iter__") or not all(0 <= int(code) < count for code in codes):
        raise ValueError(f"expected image codes from 0 to {count - 1} for every row; row {row} has others.")
    return "".join(f"<code_{int(code)}>" for code in codes)


def _string(text: Any, row: int) -> str:
    if not isinstance(text, str):
        raise ValueError(f"expected a string for every row; row {row} has {type(text).__name__}.")
    return text


def _spaced(text: Any, row: int) -> str:
    """With a leading space, which belongs to the first piece of every text that the models have seen."""
    text = _string(text, row)
    return text if not text or text[0].isspace() else f" {text}"


def _with_boxes(texts: list[str], tokens: dict[int, str]) -> list[str]:
    """Location tokens in the place of `{box}`."""
    for row, text in enumerate(texts):
        if BOX in text and row not in tokens:
            raise ValueError(f"row {row} has {BOX} in its text and no box in boxes.")
    return [text.replace(BOX, tokens[row]) if row in tokens else text for row, text in enumerate(texts)]


def _pad(rows: list[list[int]], value: int, length: int | None = None) -> Tensor:
    length = max([length or 0, *map(len, rows)])
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def _content(sequences: Tensor) -> list[list[int]]:
    """Generated ids without start, end and padding."""
    return [[i for i in row if i >= SPECIAL_IDS] for row in torch.as_tensor(sequences).tolist()]


def _tensors(data: dict[str, Tensor], return_tensors: str | None) -> BatchFeature:
    if str(getattr(return_tensors, "value", return_tensors)) not in ("pt", "np", "None"):
        raise ValueError(f"expected return_tensors to be 'pt' or 'np'; got {return_tensors!r}.")
    if str(getattr(return_tensors, "value", return_tensors)) == "np":
        data = {name: value.numpy() for name, value in data.items()}
    return BatchFeature(data)


UnivalProcessor.register_for_auto_class()

__all__ = ["UnivalProcessor"]
