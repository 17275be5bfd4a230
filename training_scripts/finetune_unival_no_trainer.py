"""Fine-tune a UnIVAL checkpoint on any data set of `datasets`, with a plain loop of `accelerate` to change at will.

Gives   a folder with model, processor, model card, losses and scores; with --push_to_hub the same on the Hub.
Costs   as `finetune_unival.py`, whose losses and scores it repeats step for step.
Run     python training_scripts/finetune_unival_no_trainer.py training_scripts/settings/finetune_unival.yaml
        or under `accelerate launch --config_file training_scripts/accelerate_configs/<name>.yaml`

The arguments have the Trainer's names and defaults, so one settings file serves both scripts where it keeps to them.
"""

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, skip_first_batches
from accelerate.utils import DistributedType, set_seed
from huggingface_hub import HfApi
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import get_scheduler
from unival_finetuning import FineTuning, last_checkpoint

from hf_vlmerge.data.masking import IGNORED
from hf_vlmerge.hub.card import write_model_card
from hf_vlmerge.training.arguments import LossArguments
from hf_vlmerge.training.groups import decayed_parameters
from hf_vlmerge.training.objectives import loss_options
from hf_vlmerge.training.script_arguments import DataTrainingArguments, ModelArguments, parse_arguments

NOT_SAID = ("output_dir", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_private_repo")  # on the card

STATE = ("done", "epoch", "done_of_epoch", "window", "log_history")  # of a loop


@dataclass
class LoopArguments(LossArguments):
    """What of `VlmergeTrainingArguments` the loop needs, with the same defaults."""

    output_dir: str = field(default="trainer_output", metadata={"help": "Folder to write."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Examples of a process in a batch."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "The same in evaluation."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches of a step."})
    learning_rate: float = field(default=5e-5, metadata={"help": "At its highest."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "A schedule of transformers."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps, or below 1 the share of all steps."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of all but norms and biases."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Of AdamW."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradients are clipped to it; 0 leaves them."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Unless max_steps is given."})
    max_steps: int = field(default=-1, metadata={"help": "Steps of the optimiser; a stream needs them."})
    label_smoothing_factor: float = field(default=0.0, metadata={"help": "Share of the other tokens in the target."})
    logging_steps: int = field(default=500, metadata={"help": "Steps of a line in log_history.json."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints; 0 writes none."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that decode."})
    seed: int = field(default=42, metadata={"help": "Of order, dropout and draws."})
    bf16: bool = field(default=False, metadata={"help": "Matrix products in bfloat16; else as the launcher says."})
    use_cpu: bool = field(default=False, metadata={"help": "Also needed for several processes on a CPU."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "Folder checkpoint-<step>, or last."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the folder at the end."})
    hub_model_id: str | None = field(default=None, metadata={"help": "By default the name of the folder."})
    hub_private_repo: bool | None = field(default=None, metadata={"help": "By default as the account has it."})


class Loop:
    """Model, optimiser, schedule and batches of one run, and how far it is: all of it is in its checkpoints."""

    def __init__(self, tuning: FineTuning, arguments: LoopArguments, accelerator: Accelerator):
        self.tuning, self.arguments, self.accelerator = tuning, arguments, accelerator
        accumulated, train = arguments.gradient_accumulation_steps, tuning.train
        if accumulated > 1 and accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError("this loop accumulates no gradients under DeepSpeed; finetune_unival.py does.")
        options = {"num_workers": arguments.dataloader_num_workers}
        batch, stream = arguments.per_device_train_batch_size, isinstance(train, IterableDataset)
        loader = DataLoader(train, batch, shuffle=not stream, collate_fn=tuning.collator, **options)
        optimizer = torch.optim.AdamW(
            parameter_groups(tuning.model, arguments.weight_decay),
            lr=arguments.learning_rate,
            betas=(0.9, arguments.adam_beta2),
            fused=True,
        )
        self.model, self.optimizer, self.loader = accelerator.prepare(tuning.model, optimizer, loader)
        register_fsdp_forward_method(self.model, "generate")  # nothing is done unless it is sharded
        self.steps_of_epoch = None if stream else math.ceil(len(self.loader) / accumulated)
        self.steps, self.done = self.all_steps(), 0
        self.epoch, self.done_of_epoch = 0, 0
        self.window, self.log_history = [], []  # losses since the last line, lines
        warmup = arguments.warmup_steps
        warmup = int(warmup) if warmup >= 1 else math.ceil(self.steps * warmup)
        # the schedule counts steps of all processes together, so it is not prepared
        self.schedule = get_scheduler(arguments.lr_scheduler_type, self.optimizer, warmup, self.steps)
        accelerator.register_for_checkpointing(self.schedule, self)

    def all_steps(self) -> int:
        if self.arguments.max_steps > 0:
            return self.arguments.max_steps
        if self.steps_of_epoch is None:
            raise ValueError("a stream has no length: expected max_steps; got none.")
        return math.ceil(self.arguments.num_train_epochs * self.steps_of_epoch)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def groups(self) -> Iterator[list[dict]]:
        """Batches of each step, epoch after epoch, from the first one that is not done."""
        size = self.arguments.gradient_accumulation_steps
        while True:
            loader = skip_first_batches(self.loader, self.done_of_epoch * size) if self.done_of_epoch else self.loader
            loader.set_epoch(self.epoch)
            batches = begun_again(loader) if self.done_of_epoch else iter(loader)
            while group := list(islice(batches, size)):
                self.done_of_epoch += 1
                yield group
            if not self.done_of_epoch:
                raise ValueError("the training split has no examples.")
            self.epoch, self.done_of_epoch = self.epoch + 1, 0

    def run(self) -> None:
        arguments, accelerator = self.arguments, self.accelerator
        bar = tqdm(
            total=self.steps,
            initial=self.done,
            desc="fine-tuning",
            unit="step",
            disable=not accelerator.is_main_process,
        )
        for group in islice(self.groups(), max(0, self.steps - self.done)):
            rate = self.schedule.get_last_lr()[0]
            self.window.append(self.step(group))
            self.done += 1
            bar.update()
            if self.done % arguments.logging_steps == 0 or self.done == self.steps:
                loss = torch.stack(self.window).mean().item()
                self.log_history.append({"step": self.done, "loss": loss, "learning_rate": rate})
                bar.set_postfix(loss=f"{loss:.3f}")
                self.window.clear()
            if arguments.save_steps and self.done % arguments.save_steps == 0:
                accelerator.save_state(str(Path(arguments.output_dir, f"checkpoint-{self.done}")))
        bar.close()

    def step(self, group: list[dict]) -> torch.Tensor:
        """
        One step of the optimiser; gives the mean loss over the target tokens of its batches and processes.

        Each batch gives its share of that mean. Processes average their gradients where a sum is meant: hence a factor.
        """
        accelerator, model = self.accelerator, self.model
        model.train()
        tokens = accelerator.reduce(sum((batch["labels"] != IGNORED).sum() for batch in group), "sum")
        options, total = loss_options(self.arguments, self.done), 0.0
        for number, batch in enumerate(group, start=1):
            with nullcontext() if number == len(group) else accelerator.no_sync(model):
                loss = model(**batch, num_items_in_batch=tokens, **options).loss
                accelerator.backward(loss * accelerator.num_processes)
            total = total + loss.detach()
        if self.arguments.max_grad_norm:
            accelerator.clip_grad_norm_(model.parameters(), self.arguments.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return accelerator.reduce(total, "sum")

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss, a mean over examples of the means of their batches as the Trainer has it, and the metric."""
        accelerator, tuning, size = self.accelerator, self.tuning, self.arguments.per_device_eval_batch_size
        self.model.eval()
        options = loss_options(self.arguments, self.done, training=False)
        losses = []
        loader = accelerator.prepare(DataLoader(tuning.validation, size, collate_fn=tuning.eval_collator))
        for batch in tqdm(loader, desc="evaluating", leave=False, disable=not accelerator.is_main_process):
            loss = self.model(**batch, **options).loss
            losses.append(accelerator.gather_for_metrics(loss.repeat(len(batch["labels"]))))
        scores = {"eval_loss": torch.cat(losses).mean().item()}
        if tuning.data.predict_with_generate:
            found = tuning.scores(accelerator.unwrap_model(self.model), accelerator, size)
            scores |= {f"eval_{name}": value for name, value in found.items()}
        return scores

    def save(self, folder: Path, scores: dict[str, float], repo_id: str | None) -> None:
        """Model, processor, losses, scores and card, by the main process."""
        accelerator = self.accelerator
        weights = accelerator.get_state_dict(self.model)
        if accelerator.is_main_process:
            accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=weights)
            self.tuning.processor.save_pretrained(folder)
            (folder / "log_history.json").write_text(json.dumps(self.log_history, indent=2))
            (folder / "eval_results.json").write_text(json.dumps(scores, indent=2))
            write_card(folder, self.tuning, self.settings(), scores, repo_id)
        accelerator.wait_for_everyone()

    def settings(self) -> dict[str, Any]:
        """What the card says about the run."""
        said = (each.name for each in fields(self.arguments) if each.name not in NOT_SAID)
        return {"num_devices": self.accelerator.num_processes} | {name: getattr(self.arguments, name) for name in said}


def begun_again(loader: DataLoader) -> Iterator[dict]:
    """Batches of a loader that has drawn its seed for this epoch already, before the run was interrupted."""
    batches, state = iter(loader), torch.get_rng_state()
    first = list(islice(batches, 1))
    torch.set_rng_state(state)
    return chain(first, batches)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """What is decayed and what is not, of the parameters that are trained."""
    decayed = set(decayed_parameters(model))
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name not in decayed]["params"].append(parameter)
    return groups


def write_card(folder: Path, tuning: FineTuning, settings: dict, scores: dict[str, float], name: str | None) -> None:
    facts = tuning.card_facts()
    hub_id, start = facts.get("finetuned_from"), Path(tuning.checkpoint).resolve().name
    scores = {name.removeprefix("eval_"): value for name, value in scores.items()}
    write_model_card(
        folder,
        scores={facts["dataset"]: scores} if scores else None,
        data=[facts["dataset"]],
        datasets=[facts["dataset_tags"]] if "dataset_tags" in facts else [],
        parents={hub_id: tuning.revision} if hub_id else None,
        settings=settings,
        name=name,
        summary=f"UnIVAL, fine-tuned from the checkpoint `{hub_id or start}` on {facts['dataset']}.",
    )


def create_repository(arguments: LoopArguments) -> str:
    """The name of the repository with its owner, as the card needs it."""
    name = arguments.hub_model_id or Path(arguments.output_dir).resolve().name
    return HfApi().create_repo(name, private=arguments.hub_private_repo, exist_ok=True).repo_id


def push(folder: Path, repo_id: str) -> None:
    HfApi().upload_folder(
        repo_id=repo_id, folder_path=folder, commit_message="End of training", ignore_patterns=["checkpoint-*/**"]
    )


def main() -> None:
    model_arguments, data, arguments = parse_arguments(ModelArguments, DataTrainingArguments, LoopArguments)
    checkpoint = last_checkpoint(arguments.resume_from_checkpoint, arguments.output_dir)
    accelerator = Accelerator(
        cpu=arguments.use_cpu,
        mixed_precision="bf16" if arguments.bf16 else None,
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False, use_seedable_sampler=True),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],  # towers of other media
    )
    set_seed(arguments.seed)
    tuning = FineTuning.load(model_arguments, data, arguments.seed)
    loop = Loop(tuning, arguments, accelerator)
    if checkpoint:
        accelerator.load_state(checkpoint)
    pushes = arguments.push_to_hub and accelerator.is_main_process
    repo_id = create_repository(arguments) if pushes else None  # before the training: a login that fails costs nothing
    loop.run()
    scores = {} if tuning.validation is None else loop.evaluate()
    folder = Path(arguments.output_dir)
    loop.save(folder, scores, repo_id)
    if accelerator.is_main_process:
        print(json.dumps(scores, indent=2))
        if repo_id:
            push(folder, repo_id)
    accelerator.end_training()


if __name__ == "__main__":
    main()
