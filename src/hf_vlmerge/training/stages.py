"""One stage of training: a few numbers that fit on a line of YAML, run by the Trainer under one progress bar."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.trainer_callback import PrinterCallback

from hf_vlmerge.training.arguments import VlmergeTrainingArguments
from hf_vlmerge.training.progress import ProgressBar
from hf_vlmerge.training.trainer import VlmergeTrainer


@dataclass(frozen=True)
class Stage:
    """
    Steps of AdamW with linear warm-up and decay.

    Args:
        steps, batch_size, learning_rate, warmup_steps, weight_decay: as they say.
        head_learning_rate_factor: learning rate of the classifier over that of the rest.
        bf16: matrix products in bfloat16; weights stay float32.
        seed: of the order of examples, of masks, dropout and augmentation; stages with the same seed see the same data.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    head_learning_rate_factor: float = 1.0
    bf16: bool = False
    seed: int = 0

    def train(
        self,
        model: torch.nn.Module,
        examples,
        collator: Callable,
        description: str,
        output: str | Path | None = None,
        **arguments,
    ) -> dict[str, float]:
        """
        Trains the model in place and returns the losses of the last log line.

        Args:
            description: stands beside the progress bar.
            output: where checkpoints go, if `arguments` (more `TrainingArguments`) ask for any.
        """
        with tempfile.TemporaryDirectory() as scratch:
            trainer = VlmergeTrainer(
                model=model,
                args=self.training_arguments(str(output or scratch), arguments),
                train_dataset=examples,
                data_collator=collator,
                callbacks=[ProgressBar(description)],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        return {name: value for name, value in lines[-1].items() if name.endswith("loss")}

    def training_arguments(self, output: str, more: dict) -> VlmergeTrainingArguments:
        own = {
            "output_dir": output,
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "weight_decay": self.weight_decay,
            "head_learning_rate_factor": self.head_learning_rate_factor,
            "bf16": self.bf16,
            "seed": self.seed,
            "logging_steps": min(10, self.steps),
            "save_strategy": "no",
            "dataloader_drop_last": True,
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
        }
        return VlmergeTrainingArguments(**own | more)
