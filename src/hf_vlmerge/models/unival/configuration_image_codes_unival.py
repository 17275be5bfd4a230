# Copyright 2026 The hf_vlmerge authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Configuration of the VQ-GAN of image codes (Esser et al. 2021)."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class UnivalImageCodesConfig(PreTrainedConfig):
    r"""
    Sizes of a VQ-GAN; the defaults are those of the released Gumbel model (f = 8, 8 192 codes).

    Args:
        num_codes (`int`): codes K of the code book.
        code_width (`int`): width E of a code.
        latent_channels (`int`): channels that the encoder gives and the decoder takes.
        base_channels (`int`): channels of the first convolution.
        channel_multipliers (`list[int]`): channels of each level in units of `base_channels`; from one level to the
            next the image is halved.
        blocks_per_level (`int`): residual blocks of a level of the encoder; the decoder has one more.
        attention_levels (`list[int]`): levels with attention after each block. Level 3 is 32 x 32 at 256 pixels.
        norm_groups (`int`): groups of every group norm.
        kl_weight (`float`): weight in the loss of the divergence from using all codes alike.
    """

    model_type = "unival_image_codes"

    num_codes: int = 8192
    code_width: int = 256
    latent_channels: int = 256
    base_channels: int = 128
    channel_multipliers: list[int] | tuple[int, ...] = (1, 1, 2, 4)
    blocks_per_level: int = 2
    attention_levels: list[int] | tuple[int, ...] = (3,)
    norm_groups: int = 32
    kl_weight: float | int = 1e-8
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.channel_multipliers, self.attention_levels = list(self.channel_multipliers), list(self.attention_levels)
        super().__post_init__(**kwargs)

    def validate_channels(self):
        if self.base_channels % self.norm_groups:
            raise ValueError(f"base_channels {self.base_channels} is not a multiple of norm_groups {self.norm_groups}.")

    @property
    def factor(self) -> int:
        """Pixels along a side of what one code stands for."""
        return 2 ** (len(self.channel_multipliers) - 1)


UnivalImageCodesConfig.register_for_auto_class()

__all__ = ["UnivalImageCodesConfig"]
