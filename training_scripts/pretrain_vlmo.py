"""Pre-train one VLMo-style model (contrast, matching, masked words) on image-text pairs.

Gives   a folder with model, processor and the losses it ended with.
Costs   minutes on two CPU cores at the sizes of `settings/`.
Run     python training_scripts/pretrain_vlmo.py training_scripts/settings/emoji_captions.yaml DATA runs/seed \
            --experts "" --steps 300
        python training_scripts/pretrain_vlmo.py training_scripts/settings/emoji_captions.yaml DATA runs/specific \
            --seed-checkpoint runs/seed --steps 600

DATA is a folder with train.parquet, or the id of a data set on the Hub. Without a seed checkpoint all experts start
from one random initialisation, which is the same for every architecture.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import yaml

from hf_vlmerge.conversion.specialise import specialise
from hf_vlmerge.data.augmentation import Augmentation
from hf_vlmerge.data.collators import VlmoPreTrainingCollator, scaled
from hf_vlmerge.data.examples import load_examples
from hf_vlmerge.data.tokenizer import train_wordpiece
from hf_vlmerge.models.vlmo.configuration_vlmo import VlmoConfig
from hf_vlmerge.models.vlmo.image_processing_vlmo import VlmoImageProcessor
from hf_vlmerge.models.vlmo.modeling_vlmo import VlmoForPreTraining
from hf_vlmerge.models.vlmo.processing_vlmo import VlmoProcessor
from hf_vlmerge.training.stages import Stage

ALL_EXPERTS = ["attention", "ffn", "layer_norm"]


@dataclass
class Experiment:
    """One settings file and one data set; splits are decoded once and kept in memory."""

    settings: dict
    data: str

    @classmethod
    def load(cls, settings: str | Path, data: str) -> "Experiment":
        return cls(yaml.safe_load(Path(settings).read_text()), data)

    @cached_property
    def train(self) -> list[dict]:
        return load_examples(self.data, "train", self.settings["model"]["image_size"])

    @cached_property
    def validation(self) -> list[dict]:
        return load_examples(self.data, "validation", self.settings["model"]["image_size"])

    @cached_property
    def tokenizer(self):
        """A WordPiece vocabulary of the training texts: all columns named, strings or lists of strings."""
        texts = (row[column] for column in self.settings["vocabulary"]["columns"] for row in self.train)
        flat = (text for value in texts for text in ([value] if isinstance(value, str) else value))
        length = self.settings["model"]["max_text_length"]
        return train_wordpiece(flat, self.settings["vocabulary"]["size"], max_length=length)

    @property
    def processor(self) -> VlmoProcessor:
        side = self.settings["model"]["image_size"]
        size = {"height": side, "width": side}
        length = self.settings["model"]["max_text_length"]
        image_processor = VlmoImageProcessor(size=size, image_mean=[self.image_mean] * 3)
        return VlmoProcessor(image_processor, self.tokenizer, max_text_length=length)

    @property
    def image_mean(self) -> float:
        """The brightness that becomes 0; 1 for pictures on white, of which a network then sees the drawing alone."""
        return self.settings.get("image_mean", 0.5)

    def pixels(self, images: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor] = scaled) -> torch.Tensor:
        """What the processor makes of uint8 images, and of those that `change` gives."""
        return change(images) + (1 - 2 * self.image_mean)

    def config(self, expert_modules: list[str]) -> VlmoConfig:
        return VlmoConfig(vocab_size=len(self.tokenizer), expert_modules=expert_modules, **self.settings["model"])

    def collator(self, collator_class, text_column: str, augmentation: dict | None = None, **options):
        """Cuts texts to the model's length; `augmentation`, of a stage's settings, are arguments of `Augmentation`."""
        return collator_class(
            self.tokenizer,
            max_length=self.settings["model"]["max_text_length"],
            text_column=text_column,
            augmentation=partial(self.pixels, change=Augmentation(**augmentation) if augmentation else scaled),
            **options,
        )


def pretrain(
    experiment: Experiment,
    expert_modules: list[str],
    steps: int,
    seed: int = 0,
    start: dict[str, torch.Tensor] | None = None,
    description: str = "",
) -> VlmoForPreTraining:
    """
    Trains from `start`, the tensors of a modality-agnostic model, or from the initialisation that the seed gives.

    Whatever the architecture, its experts start as copies of one another: those of the agnostic model.
    """
    if start is None:
        torch.manual_seed(seed)
        start = VlmoForPreTraining(experiment.config([])).state_dict()
    model = VlmoForPreTraining(experiment.config(expert_modules))
    model.load_state_dict(specialise(start, expert_modules, model.config.num_fusion_layers))
    options = dict(experiment.settings["pretraining"])
    collator = experiment.collator(
        VlmoPreTrainingCollator,
        options.pop("text_column"),
        options.pop("augmentation", None),
        mask_probability=options.pop("mask_probability"),
    )
    options.pop("seed_steps", None)
    Stage(**options | {"steps": steps, "seed": seed}).train(model, experiment.train, collator, description)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", help="YAML file with model, vocabulary and stages")
    parser.add_argument("data", help="folder with train.parquet, or the id of a data set on the Hub")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument(
        "--experts", default=",".join(ALL_EXPERTS), help="modules with experts; empty: modality-agnostic"
    )
    parser.add_argument(
        "--seed-checkpoint", type=Path, help="modality-agnostic checkpoint that every expert starts from"
    )
    parser.add_argument("--steps", type=int, help="instead of the settings' own")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    experiment = Experiment.load(arguments.settings, arguments.data)
    start = None
    if arguments.seed_checkpoint:
        start = VlmoForPreTraining.from_pretrained(arguments.seed_checkpoint).state_dict()
    experts = [name for name in arguments.experts.split(",") if name]
    steps = arguments.steps or experiment.settings["pretraining"]["steps"]
    model = pretrain(experiment, experts, steps, arguments.seed, start)
    model.save_pretrained(arguments.output)
    experiment.processor.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
