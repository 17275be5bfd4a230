"""Parts that keep what they have learnt before."""

from torch import nn


def freeze_batch_norm(model: nn.Module) -> None:
    """
    BatchNorm layers use their running statistics in training too, and neither these nor their weights change. What a
    batch gives is then the sum of what its examples give, however they are divided among processes.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(False)
            module.register_forward_pre_hook(use_running_statistics)  # `model.train()` would turn them off again


def use_running_statistics(module: nn.Module, inputs: tuple) -> None:
    module.eval()


def freeze_embeddings(model: nn.Module) -> None:
    """The token table, and with it the output projection where the two are one, as in UnIVAL's fine-tuning."""
    model.get_input_embeddings().requires_grad_(False)
