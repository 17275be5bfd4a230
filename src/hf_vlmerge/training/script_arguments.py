"""Arguments of scripts that fine-tune on `datasets` data sets, from flags or from one YAML or JSON file."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from hf_vlmerge.data.streaming import nearest


@dataclass
class ModelArguments:
    """Which model, and what of it stays as it is."""

    model_name_or_path: str = field(metadata={"help": "Id on the Hub or folder of model and processor."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the model's own code, where this package does not know its type."}
    )
    freeze_embeddings: bool = field(default=False, metadata={"help": "Keep the token table."})
    freeze_batch_norm: bool = field(default=False, metadata={"help": "Keep BatchNorm and use its statistics."})


@dataclass
class DataTrainingArguments:
    """Which data, which columns of it, and what the model is to make of them."""

    dataset_name: str = field(metadata={"help": "Id on the Hub, or folder with <split>.parquet."})
    prompt: str = field(metadata={"help": "Task of the processor, or an instruction with {column} in it."})
    target_column: str = field(metadata={"help": "What is to be said; boxes for visual_grounding."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str | None = field(default=None, metadata={"help": "Split to evaluate on; none by default."})
    streaming: bool = field(default=False, metadata={"help": "Read the training split as a stream; needs max_steps."})
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Undecoded examples that a stream is shuffled among; 0 keeps its order."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Rows of the training split to use."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Rows of the validation split to use."})
    image_column: str | None = field(default=None, metadata={"help": "Column of pictures."})
    video_column: str | None = field(default=None, metadata={"help": "Column of clips, or of lists of frames."})
    audio_column: str | None = field(default=None, metadata={"help": "Column of sounds."})
    text_column: list[str] = field(
        default_factory=list, metadata={"help": "Column of each text that the prompt takes, in its order."}
    )
    box_column: str | None = field(default=None, metadata={"help": "Column of boxes that the prompt is about."})
    prompt_type: str = field(
        default="none", metadata={"help": "Start of the decoder: none, or the instruction (prev_output, src)."}
    )
    max_source_length: int | None = field(default=None, metadata={"help": "Tokens of an instruction."})
    max_target_length: int | None = field(default=None, metadata={"help": "Tokens of a target and its end."})
    predict_with_generate: bool = field(
        default=False, metadata={"help": "Evaluate what is generated: exact match, CIDEr-D or accuracy of boxes."}
    )
    generation_num_beams: int | None = field(default=None, metadata={"help": "Instead of the task's own."})

    def __post_init__(self):
        if self.validation_split is None and self.predict_with_generate:
            raise ValueError("predict_with_generate evaluates a split: expected validation_split; got none.")
        if self.streaming and self.validation_split and self.max_eval_samples is None:
            raise ValueError(
                "streaming keeps the validation rows in memory, undecoded: expected max_eval_samples to say how many; "
                "got none."
            )


def parse_arguments(*classes: type, arguments: Sequence[str] | None = None) -> tuple:
    """
    An instance of each dataclass from flags, `--name value`, or from a .yaml, .yml or .json file with the same names,
    after which flags may change some.

    A file is turned into flags, so that both give the same. What is wrong ends the program with one sentence, as
    `argparse` does it.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser(classes, allow_abbrev=False, usage="%(prog)s [SETTINGS.yaml] [--name value ...]")
    known = [each.name for one in classes for each in fields(one) if each.init]
    if given and Path(given[0]).suffix in (".yaml", ".yml", ".json"):
        try:
            given = flags(read_settings(Path(given[0]))) + given[1:]
        except ValueError as error:
            parser.error(str(error))
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            given, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        parser.error(str(error))
    if rest:
        name = rest[0].removeprefix("--").partition("=")[0]
        parser.error(f"there is no argument {rest[0]!r}{nearest(name, known)}.")
    return tuple(parsed)


def read_settings(path: Path) -> Mapping[str, Any]:
    """The settings of a YAML or JSON file; what is wrong with it is a ValueError of one sentence."""
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(settings, Mapping):
        raise ValueError(f"{path.name}: expected a mapping of names to values; got {settings!r}.")
    return settings


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a command line."""
    found = []
    for name, value in settings.items():
        if value is None or value == []:
            continue
        if isinstance(value, Mapping):
            value = json.dumps(value)
        values = value if isinstance(value, list) else [value]
        found += [f"--{name}", *map(str, values)]
    return found
