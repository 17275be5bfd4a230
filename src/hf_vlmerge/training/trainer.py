"""A Trainer that logs every loss of the model, and groups parameters as the papers do."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from hf_vlmerge.training.groups import decayed_parameters, head_parameters
from hf_vlmerge.training.objectives import check_loss_options, has_loss_options, loss_options


class VlmergeTrainer(Trainer):
    """
    `Trainer` for models whose output has several losses: each field `*_loss` is logged as the mean over the forward
    passes since the last log line, whatever the number of accumulated batches and of processes.

    Where the model's own loss has label smoothing (UnIVAL), `label_smoothing_factor` is its ε, so that it goes together
    with masks of allowed tokens; the encouraging loss, R-drop and, once enough steps are done, the share of dropped
    tokens reach the model too.

    Takes `VlmergeTrainingArguments`; pass the processor or tokenizer as `processing_class`.

    Args:
        eval_collator: for evaluation, where training draws something at random; else it is `data_collator` too.
        score: called with the model after the loss of each evaluation; its numbers join the metrics.
    """

    def __init__(
        self,
        *args,
        eval_collator: Callable | None = None,
        score: Callable[[torch.nn.Module], dict[str, float]] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.eval_collator, self.score = eval_collator or self.data_collator, score
        model = self.plain_model
        self._own_loss = has_loss_options(model) and self.compute_loss_func is None
        if self._own_loss:
            self.label_smoother = None  # keeps the labels from the model
        else:
            check_loss_options(self.args, "compute_loss_func" if self.compute_loss_func else type(model).__name__)
        self._loss_sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._passes = 0

    @property
    def plain_model(self) -> torch.nn.Module:
        """The model whose `forward` names its arguments, without wrappers or adapters."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._own_loss and "labels" in inputs:
            inputs = {**loss_options(self.args, self.state.global_step, model.training), **inputs}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and isinstance(outputs, dict):
            self._passes += 1
            for name, value in outputs.items():
                if name.endswith("_loss"):
                    self._loss_sums[name] += value.detach()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._passes:  # a line of training, not of evaluation or of the end
            for name, total in self._loss_sums.items():
                logs[name] = self.accelerator.reduce(total, "mean").item() / self._passes
            self._loss_sums.clear()
            self._passes = 0
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset=None):
        collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.score is not None:
            scores = self.score(self.model)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """As the library's, without its pickled arguments: they hold paths of this machine; no loader wants them."""
        super()._save(output_dir, state_dict)
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def save_state(self) -> None:
        """As the library's; the best checkpoint is named by the last part of its path."""
        best = self.state.best_model_checkpoint
        self.state.best_model_checkpoint = best and Path(best).name
        super().save_state()

    def create_model_card(self, *args, **kwargs) -> None:
        """As the library's, which takes a model that does not come from the Hub for one trained from scratch."""
        super().create_model_card(*args, **kwargs)
        start = Path(self.plain_model.config._name_or_path or "")
        if self.is_world_process_zero() and start.name and start.is_dir():
            path = Path(self.args.output_dir, "README.md")
            said = f"was fine-tuned from the checkpoint `{start.resolve().name}`"
            path.write_text(
                path.read_text(encoding="utf-8").replace("was trained from scratch", said), encoding="utf-8"
            )

    def get_decay_parameter_names(self, model) -> list[str]:
        return decayed_parameters(model, self.args.decay_as_released)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Adds groups with the head's learning rate where it differs."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        factor = self.args.head_learning_rate_factor
        if not made or factor == 1:
            return optimizer
        model = self.model if model is None else model
        parameters = dict(model.named_parameters())
        head = {id(parameters[name]) for name in head_parameters(model)}
        for group in list(optimizer.param_groups):
            moved = [parameter for parameter in group["params"] if id(parameter) in head]
            if moved:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
                optimizer.add_param_group({**group, "params": moved, "lr": group["lr"] * factor})
        return optimizer
