"""Configuration of a toy network that no library knows: it travels with its weights."""

from transformers.configuration_utils import PreTrainedConfig


class ToyConfig(PreTrainedConfig):
    model_type = "toy_with_batch_norm"

    hidden_size: int = 16
    num_channels: int = 3
