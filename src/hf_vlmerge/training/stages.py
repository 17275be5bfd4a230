"""One stage of training, from arguments that fit on a line of YAML."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_vlmerge.training.arguments import VlmergeTrainingArguments
from hf_vlmerge.training.trainer import VlmergeTrainer


@dataclass(frozen=True)
class Stage:
    """
    What the stages of an experiment have in common: steps of AdamW with linear warm-up and decay.

    Args:
        steps, batch_size, learning_rate, warmup_steps, weight_decay: as they say.
        head_learning_rate_factor: learning rate of the classifier over that of the rest.
        seed: of the order of examples, of masks, dropout and augmentation; stages with the same seed see the same data.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    head_learning_rate_factor: float = 1.0
    seed: int = 0

    def train(self, model: torch.nn.Module, examples, collator: Callable, description: str = "") -> dict[str, float]:
        """Trains the model in place and returns the last logged losses."""
        with tempfile.TemporaryDirectory() as folder:  # the Trainer wants a place; nothing is saved there
            arguments = VlmergeTrainingArguments(
                output_dir=folder,
                max_steps=self.steps,
                per_device_train_batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                warmup_steps=self.warmup_steps,
                weight_decay=self.weight_decay,
                head_learning_rate_factor=self.head_learning_rate_factor,
                seed=self.seed,
                optim="adamw_torch_fused",
                lr_scheduler_type="linear",
                logging_steps=max(1, self.steps // 10),
                save_strategy="no",
                dataloader_drop_last=True,
                dataloader_pin_memory=False,
                use_cpu=not torch.cuda.is_available(),
            )
            if description:
                print(description, flush=True)
            trainer = VlmergeTrainer(model=model, args=arguments, train_dataset=examples, data_collator=collator)
            trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        return {name: value for name, value in lines[-1].items() if name.endswith("loss")}
