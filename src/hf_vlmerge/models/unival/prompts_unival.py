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
"""The instructions that UnIVAL was trained with, and the cleaning of what is put into them."""

import re
import string
from typing import NamedTuple

LEADING_MARKS = ",.!?*#:;~"
BOX = "{box}"  # stands for the four location tokens of a row's box
MAX_SOURCE_WORDS = 80
MAX_TARGET_WORDS = 20


class Prompt(NamedTuple):
    """
    One instruction. Leading spaces, and the two of grounded captioning, are part of it: the pieces of the vocabulary
    depend on them.
    """

    source: str
    target: str = " {target}"
    question_mark: bool = False  # a question gets one if it has none
    cleaned: bool = True  # what is put in is lower-cased and so on; else it is only cut to words
    grounding: bool = False  # pictures of the side that boxes need
    caption: bool = False  # the target is a caption: no punctuation, cut to words
    codes: bool = False  # the target is an image, as codes


_CAPTION = {"caption": True}

PROMPTS: dict[str, Prompt] = {
    "image_captioning": Prompt(" what does the image describe?", **_CAPTION),
    "video_captioning": Prompt(" what does the video describe?", **_CAPTION),
    "audio_captioning": Prompt(
        " what does the video describe?", **_CAPTION
    ),  # "video": what the models were trained on
    "audio_captioning_pretraining": Prompt(" what does the audio describe?", **_CAPTION),
    "question_answering": Prompt(" {question}", question_mark=True),
    "question_answering_pretraining": Prompt(" {question}"),
    "visual_grounding": Prompt(' which region does the text " {text} " describe?', target=BOX, grounding=True),
    "grounded_captioning": Prompt(f"  what does the region describe? region:{BOX}", grounding=True),
    "image_text_matching": Prompt(' does the image describe " {caption} "?'),
    "video_text_matching": Prompt(' does the video describe " {caption} "?'),
    "audio_text_matching": Prompt(' does the audio describe " {caption} "?'),
    "answer_matching": Prompt(' what is the answer to question " {question} ". is " {answer} "?'),
    "visual_entailment": Prompt(' does the image describe " {hypothesis} "?'),
    "visual_entailment_with_premise": Prompt(' can image and text1 " {premise} " imply text2 " {hypothesis} "?'),
    "text_to_image": Prompt(" what is the complete image? caption: {caption}", cleaned=False, codes=True),
}


def prompt_of(task: str) -> Prompt:
    """
    The instruction of a task.

    Raises:
        ValueError: there is no such task.
    """
    if task not in PROMPTS:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(PROMPTS)}.")
    return PROMPTS[task]


def fields_of(task: str) -> list[str]:
    """What a task's instruction has to be given, in order (the box apart)."""
    return [name for _, name, _, _ in string.Formatter().parse(prompt_of(task).source) if name and name != "box"]


def make_prompt(task: str, *, objects: list[str] | None = None, **fields: str) -> str:
    """
    The instruction of a task with cleaned texts in it; `{box}` stays where the location tokens of a box belong.

    Args:
        task: a key of `PROMPTS`.
        objects: names of things in the picture, for questions: put after the instruction.
        **fields: what the instruction needs, such as `question=`.

    Raises:
        ValueError: there is no such task, or a field is missing or unknown.
    """
    prompt, needed = prompt_of(task), fields_of(task)
    if set(fields) != set(needed):
        expected = ", ".join(needed) or "no texts"
        raise ValueError(f"the task {task!r} takes {expected}; got {', '.join(fields) or 'none'}.")
    clean = clean_text if prompt.cleaned else cut_words
    values = {name: clean(value) for name, value in fields.items()}
    if prompt.question_mark:
        values = {name: value if value.endswith("?") else f"{value}?" for name, value in values.items()}
    source = re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), prompt.source)
    return f"{source} object: {' '.join(objects)}" if objects else source


def make_target(task: str, target: str) -> str:
    """What the model is to say for a task: with its leading space, captions without punctuation and cut to 20 words."""
    prompt = prompt_of(task)
    return prompt.target.replace("{target}", clean_caption_target(target) if prompt.caption else target)


def clean_text(text: str, max_words: int = MAX_SOURCE_WORDS) -> str:
    """A question, caption or phrase as the instructions want it. In pre-training, captions to be learnt are cleaned so
    too, and cut to 30 words."""
    text = text.lower().lstrip(LEADING_MARKS).replace("-", " ").replace("/", " ").replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return cut_words(text, max_words)


def clean_caption_target(caption: str, max_words: int = MAX_TARGET_WORDS) -> str:
    """A caption to be learnt: without punctuation, cut to words."""
    caption = caption.translate(str.maketrans("", "", string.punctuation)).strip()
    return " ".join(caption.split()[:max_words])


def cut_words(text: str, max_words: int = MAX_SOURCE_WORDS) -> str:
    """The first words of a text, split at spaces."""
    return " ".join(text.split(" ")[:max_words])


__all__ = ["PROMPTS", "Prompt", "clean_caption_target", "clean_text", "make_prompt", "make_target"]
