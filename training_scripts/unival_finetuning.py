"""What the scripts that fine-tune UnIVAL share: checkpoint, examples, batches, scores, and the facts of the card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from huggingface_hub import hf_hub_download
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.trainer_utils import get_last_checkpoint

from hf_vlmerge import metrics
from hf_vlmerge.data.media_text import ARGUMENTS, FIELD, Columns, MediaTextCollator
from hf_vlmerge.data.streaming import (
    Examples,
    Spread,
    first_rows,
    nearest,
    only_columns,
    open_split,
    stream_examples,
)
from hf_vlmerge.models.unival.generation_unival import GENERATION_SETTINGS
from hf_vlmerge.models.unival.prompts_unival import BOX, PROMPTS, clean_caption_target, fields_of
from hf_vlmerge.training.freezing import freeze_batch_norm, freeze_embeddings
from hf_vlmerge.training.objectives import has_loss_options
from hf_vlmerge.training.script_arguments import DataTrainingArguments, ModelArguments

FOR_BEAMS = ("early_stopping", "length_penalty")  # options that mean nothing without beams


@dataclass
class FineTuning:
    """
    Args:
        checkpoint, revision: what `model` was loaded from; on the Hub its commit.
        train: examples by number, or a stream of them.
        validation: examples by number, if any.
        collator, eval_collator: make batches of them.
    """

    checkpoint: str
    revision: str
    model: torch.nn.Module
    processor: Any
    data: DataTrainingArguments
    train: Any
    validation: Examples | None
    collator: MediaTextCollator
    eval_collator: MediaTextCollator

    @classmethod
    def load(cls, model_arguments: ModelArguments, data: DataTrainingArguments, seed: int) -> "FineTuning":
        """
        Raises:
            ValueError: a prompt, column or split does not exist, or the checkpoint is not UnIVAL's; and what the
                library raises where a checkpoint has code of its own that is not trusted.
        """
        columns = columns_of(data)
        if data.predict_with_generate and metric_of(data.prompt) is None:
            raise ValueError(f"predict_with_generate has no metric for images, which {data.prompt!r} makes.")
        model, processor, revision = load_checkpoint(model_arguments)
        prompt = {"task": data.prompt} if data.prompt in PROMPTS else {"template": data.prompt}
        lengths = {name: getattr(data, name) for name in ("prompt_type", "max_source_length", "max_target_length")}
        return cls(
            model_arguments.model_name_or_path,
            revision,
            model,
            processor,
            data,
            train_examples(data, columns, seed),
            validation_examples(data, columns),
            MediaTextCollator(processor, columns, **prompt, **lengths, random=True),
            MediaTextCollator(processor, columns, **prompt, **lengths),
        )

    def scores(self, model: torch.nn.Module, accelerator: Accelerator, batch_size: int) -> dict[str, float]:
        """The metric that fits the prompt, over all validation examples, whatever the number of processes."""
        count, processes = len(self.validation), accelerator.num_processes
        padded = -(-count // processes) * processes  # as many batches for each, since sharded models run together
        mine = [number % count for number in range(accelerator.process_index, padded, processes)]
        loader = DataLoader(Subset(self.validation, mine), batch_size, collate_fn=self.eval_collator.without_targets)
        model.eval()
        said = {}
        for batch in tqdm(loader, desc="generating", leave=False, disable=not accelerator.is_main_process):
            found = self.generate(model, send_to_device(batch["inputs"], accelerator.device), batch["sizes"])
            said |= dict(zip(batch["numbers"], zip(found, batch["references"], strict=True), strict=True))
        everything = {number: pair for part in gather_object([said]) for number, pair in part.items()}
        return rate(metric_of(self.data.prompt), *zip(*everything.values(), strict=True))

    def generate(self, model: torch.nn.Module, inputs: dict, sizes: list) -> list:
        """What the model says about each row: a text, or a box in pixels of its image."""
        start = inputs["decoder_input_ids"].shape[1] if "decoder_input_ids" in inputs else 1
        sequences = model.generate(**inputs, **self.generation_options(start))[:, start:]
        if metric_of(self.data.prompt) == "grounding_accuracy":
            return self.processor.post_process_grounding(sequences, sizes).tolist()
        return [text.strip() for text in self.processor.batch_decode(sequences, skip_special_tokens=True)]

    def generation_options(self, start: int) -> dict[str, Any]:
        """Those that the task was evaluated with, unless others are asked for; `start` tokens are there already."""
        task, positions = self.data.prompt, self.processor.tokenizer.model_max_length
        options = self.processor.generation_settings(task) if task in GENERATION_SETTINGS else {"max_new_tokens": 64}
        if self.data.generation_num_beams:
            options["num_beams"] = self.data.generation_num_beams
        if options.get("num_beams", 1) == 1:
            options = {name: value for name, value in options.items() if name not in FOR_BEAMS}
        wanted = self.data.max_target_length or options["max_new_tokens"]
        return options | {"max_new_tokens": max(1, min(wanted, positions + 1 - start))}

    def card_facts(self) -> dict[str, Any]:
        """Arguments of `Trainer.create_model_card`. Folders are named by their last part: no path gets on a page."""
        data, media = self.data, next(iter(self.eval_collator.columns.media), "image")
        facts = {"tags": ["unival", "hf_vlmerge"], "tasks": f"{media}-text-to-text"}
        if not Path(self.checkpoint).is_dir():
            facts["finetuned_from"] = self.checkpoint
        local = Path(data.dataset_name).is_dir()
        facts["dataset"] = Path(data.dataset_name).resolve().name if local else data.dataset_name
        if not local:
            facts |= {"dataset_tags": data.dataset_name, "dataset_args": data.dataset_config_name}
        return facts


def load_checkpoint(arguments: ModelArguments) -> tuple[torch.nn.Module, Any, str]:
    """
    Model, processor and their commit on the Hub; of the installed package or, where that is allowed, with code of their
    own.
    """
    source, revision = arguments.model_name_or_path, arguments.model_revision
    if not Path(source).is_dir():
        revision = Path(hf_hub_download(source, "config.json", revision=revision)).parent.name  # snapshots/<commit>/
    options = {"revision": revision, "trust_remote_code": arguments.trust_remote_code}
    model = AutoModelForImageTextToText.from_pretrained(source, **options)
    if not has_loss_options(model):
        raise ValueError(f"expected a checkpoint of UnIVAL; {source} is a {type(model).__name__}.")
    if arguments.freeze_batch_norm:
        freeze_batch_norm(model)
    if arguments.freeze_embeddings:
        freeze_embeddings(model)
    return model, AutoProcessor.from_pretrained(source, **options), revision


def columns_of(data: DataTrainingArguments) -> Columns:
    """
    Where an example has what: for a task its texts are the columns in the order of its fields; a template names its
    columns itself.

    Raises:
        ValueError: there is no such task, or it takes another number of texts.
    """
    media = {kind: name for kind in ARGUMENTS if (name := getattr(data, f"{kind}_column"))}
    if data.prompt not in PROMPTS:
        if not set(data.prompt) & set(" {"):
            raise ValueError(
                f"there is no prompt {data.prompt!r}{nearest(data.prompt, PROMPTS)}; there are {', '.join(PROMPTS)}, "
                "or an instruction of your own with {column} in it."
            )
        names = [name for name in FIELD.findall(data.prompt) if name != "box"]
        if data.text_column:
            raise ValueError(f"an instruction of your own names its columns; got text_column {data.text_column} too.")
        return Columns(media, {name: name for name in names}, data.target_column, data.box_column)
    fields = fields_of(data.prompt)
    if len(fields) != len(data.text_column):
        raise ValueError(
            f"{data.prompt!r} takes {', '.join(fields) or 'no text'}: expected {len(fields)} names in text_column; got "
            f"{len(data.text_column)}."
        )
    texts = dict(zip(fields, data.text_column, strict=True))
    if PROMPTS[data.prompt].target == BOX:
        return Columns(media, texts, None, data.target_column)
    return Columns(media, texts, data.target_column, data.box_column)


def train_examples(data: DataTrainingArguments, columns: Columns, seed: int):
    rows = open_split(data.dataset_name, data.train_split, config=data.dataset_config_name, streaming=data.streaming)
    rows = only_columns(first_rows(rows, data.max_train_samples), columns.all, data.dataset_name)
    spread = Spread(columns.lists, rows.features)
    return stream_examples(rows, spread, data.shuffle_buffer_size, seed) if data.streaming else Examples(rows, spread)


def validation_examples(data: DataTrainingArguments, columns: Columns) -> Examples | None:
    """By number, so that processes share them exactly; of a stream the first rows are kept, undecoded."""
    if data.validation_split is None:
        return None
    split = data.validation_split
    rows = open_split(data.dataset_name, split, config=data.dataset_config_name, streaming=data.streaming)
    rows = only_columns(first_rows(rows, data.max_eval_samples), columns.all, data.dataset_name)
    spread = Spread(columns.lists, rows.features)
    return Examples(list(tqdm(rows, desc=f"reading {split}", leave=False)) if data.streaming else rows, spread)


def metric_of(prompt: str) -> str | None:
    """Its name in `hf_vlmerge.metrics`."""
    if prompt not in PROMPTS:
        return "exact_match"
    if PROMPTS[prompt].codes:
        return None
    if PROMPTS[prompt].target == BOX:
        return "grounding_accuracy"
    return "cider_d" if PROMPTS[prompt].caption else "exact_match"


def rate(metric: str, said: tuple, references: tuple) -> dict[str, float]:
    """A metric of answers or captions, each with one or several references, or of boxes."""
    if metric != "grounding_accuracy":
        references = [each if isinstance(each, (list, tuple)) else [each] for each in references]
        clean = plain_caption if metric == "cider_d" else str
        said = [clean(text) for text in said]
        references = [[clean(text) for text in texts] for texts in references]
    return getattr(metrics, metric)(said, references)


def plain_caption(text: str) -> str:
    """Lower case, no punctuation, of any length."""
    return clean_caption_target(text.lower(), max_words=len(text))


def last_checkpoint(given: str | None, output: str) -> str | None:
    """
    Where to resume: a folder, or the newest one in `output` for "last".

    Raises:
        ValueError: there is no such folder.
    """
    if given is None:
        return None
    found = get_last_checkpoint(output) if given == "last" and Path(output).is_dir() else given
    if found is None or not Path(found).is_dir():
        raise ValueError(
            f"resume_from_checkpoint is {given!r}; expected a folder checkpoint-<step>, or 'last' in {output}."
        )
    return found
