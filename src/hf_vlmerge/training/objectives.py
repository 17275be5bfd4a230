"""What of a model's loss is decided a step at a time, or for a whole run: arguments of its `forward`."""

import inspect
from typing import Any

from torch import nn

from hf_vlmerge.training.arguments import LossArguments, VlmergeTrainingArguments


def loss_options(args: LossArguments, updates: int, training: bool = True) -> dict[str, Any]:
    """
    Loss arguments of `UnivalForConditionalGeneration.forward`.

    Args:
        args: with `label_smoothing_factor`, as `VlmergeTrainingArguments` has it.
        updates: how many steps of the optimiser are done.
        training: evaluation drops no token.
    """
    dropping = training and updates > args.drop_worst_after
    return {
        "smoothing": args.label_smoothing_factor,
        "encouraging_log_end": args.encouraging_log_end,
        "drop_worst_ratio": args.drop_worst_ratio if dropping else 0.0,
        "rdrop_alpha": args.rdrop_alpha,
    }


def has_loss_options(model: nn.Module) -> bool:
    """Whether a model's own loss takes them."""
    return "smoothing" in inspect.signature(model.forward).parameters


def check_loss_options(args: VlmergeTrainingArguments, loss: str) -> None:
    """
    For a loss that does not take the options; label smoothing is the library's own then.

    Raises:
        ValueError: the arguments ask for another one.
    """
    for name in ("encouraging_log_end", "drop_worst_ratio", "rdrop_alpha"):
        if getattr(args, name):
            raise ValueError(
                f"{name} is {getattr(args, name)}, but {loss} has none; UnivalForConditionalGeneration has."
            )
