"""A toy network with batch normalisation, whose counter of batches is an integer buffer."""

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .configuration_toy import ToyConfig


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.stem = nn.Conv2d(config.num_channels, config.hidden_size, 4, stride=4)
        self.norm = nn.BatchNorm2d(config.hidden_size)
        self.project = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(self, pixel_values):
        x = self.norm(self.stem(pixel_values)).flatten(2).transpose(1, 2)  # (B, P, D)
        return BaseModelOutput(last_hidden_state=self.project(x))
