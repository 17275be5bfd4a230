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
"""Image codes: the VQ-GAN that turns images into tokens and tokens into images (Esser et al. 2021, section 3.1), with
a Gumbel-softmax code book (Ramesh et al. 2021, section 2.1). The released one has 8 192 codes of 8 x 8 pixels.

It is a network of its own, not part of a UnIVAL checkpoint. The VQ models of `transformers` choose the nearest code;
this one has a linear map to one score a code, for which they have no place.

B = batch, C = channels of a level, E = width of a code, K = codes, h, w = sides of the code grid.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_image_codes_unival import UnivalImageCodesConfig


@dataclass
class UnivalImageCodesOutput(ModelOutput):
    """
    Shapes:
        loss (); reconstruction (B, 3, H, W) in about [-1, 1]; codes (B, h * w)
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None


class UnivalCodesBlock(nn.Module):
    """Twice norm, SiLU and 3x3 convolution, around a shortcut (1x1 where the channels change)."""

    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C', h, w)"""
        inner = self.conv1(nn.functional.silu(self.norm1(features)))
        inner = self.conv2(nn.functional.silu(self.norm2(inner)))
        return inner + (features if self.nin_shortcut is None else self.nin_shortcut(features))


class UnivalCodesAttention(nn.Module):
    """Attention with one head between all places of a feature map."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> the same"""
        normed = self.norm(features)
        query, key, value = (part(normed).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))  # (B, hw, C)
        context = nn.functional.scaled_dot_product_attention(query, key, value)
        return features + self.proj_out(context.transpose(1, 2).reshape(features.shape))


class UnivalCodesMiddle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = UnivalCodesBlock(channels, channels, groups)
        self.attn_1 = UnivalCodesAttention(channels, groups)
        self.block_2 = UnivalCodesBlock(channels, channels, groups)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(features)))


class UnivalCodesResample(nn.Module):
    """Half the resolution (padded on the right and below) or twice (nearest neighbour), then or with a convolution."""

    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if up else nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.up:
            return self.conv(nn.functional.interpolate(features, scale_factor=2.0, mode="nearest"))
        return self.conv(nn.functional.pad(features, (0, 1, 0, 1)))


class UnivalCodesLevel(nn.Module):
    """The blocks of one resolution, each with attention after it where the level has any, and the way to the next."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool, resample: str | None, groups: int):
        super().__init__()
        self.block = nn.ModuleList(UnivalCodesBlock(outputs if i else inputs, outputs, groups) for i in range(blocks))
        self.attn = nn.ModuleList(UnivalCodesAttention(outputs, groups) for _ in range(blocks if attention else 0))
        self.resample = resample
        if resample is not None:
            self.add_module(resample, UnivalCodesResample(outputs, resample == "upsample"))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            features = block(features)
            if self.attn:
                features = self.attn[i](features)
        return features if self.resample is None else self.get_submodule(self.resample)(features)


class UnivalCodesEncoder(nn.Module):
    """Images to latents."""

    def __init__(self, config: UnivalImageCodesConfig):
        super().__init__()
        groups, channels = config.norm_groups, config.base_channels
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(config.channel_multipliers):
            outputs = config.base_channels * multiplier
            resample = "downsample" if level + 1 < len(config.channel_multipliers) else None
            attention = level in config.attention_levels
            self.down.append(UnivalCodesLevel(channels, outputs, config.blocks_per_level, attention, resample, groups))
            channels = outputs
        self.mid = UnivalCodesMiddle(channels, groups)
        self.norm_out = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, config.latent_channels, 3, padding=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, latent channels, H / f, W / f)"""
        features = self.conv_in(pixel_values)
        for level in self.down:
            features = level(features)
        return self.conv_out(nn.functional.silu(self.norm_out(self.mid(features))))


class UnivalCodesDecoder(nn.Module):
    """Latents to images. Level i of `up` has the resolution of level i of the encoder, so the last one comes first."""

    def __init__(self, config: UnivalImageCodesConfig):
        super().__init__()
        groups, channels = config.norm_groups, config.base_channels * config.channel_multipliers[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = UnivalCodesMiddle(channels, groups)
        levels = []
        for level, multiplier in reversed(list(enumerate(config.channel_multipliers))):
            outputs = config.base_channels * multiplier
            resample, attention = "upsample" if level else None, level in config.attention_levels
            levels.append(UnivalCodesLevel(channels, outputs, config.blocks_per_level + 1, attention, resample, groups))
            channels = outputs
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, latent channels, h, w) -> (B, 3, h * f, w * f)"""
        features = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            features = level(features)
        return self.conv_out(nn.functional.silu(self.norm_out(features)))


class UnivalImageCodes(PreTrainedModel):
    """Images to codes and back. The original draws codes at random even when it only encodes; here the likeliest code
    is taken, so that equal images have equal codes."""

    config_class = UnivalImageCodesConfig
    base_model_prefix = "image_codes"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["UnivalCodesLevel"]

    def __init__(self, config: UnivalImageCodesConfig):
        super().__init__(config)
        self.encoder = UnivalCodesEncoder(config)
        self.decoder = UnivalCodesDecoder(config)
        self.to_code = nn.Conv2d(config.latent_channels, config.code_width, 1)
        self.code_scores = nn.Conv2d(config.code_width, config.num_codes, 1)
        self.code_book = nn.Embedding(config.num_codes, config.code_width)
        self.from_code = nn.Conv2d(config.code_width, config.latent_channels, 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):  # variance is kept: norms would raise what a smaller gain leaves of biases
            init.kaiming_normal_(module.weight, nonlinearity="linear")
        elif isinstance(module, UnivalCodesBlock):  # near the identity at first
            init.normal_(module.conv2.weight, std=0.1 * (9 * module.conv2.in_channels) ** -0.5)
        elif isinstance(module, UnivalCodesAttention):
            init.normal_(module.proj_out.weight, std=0.1 * module.proj_out.in_channels**-0.5)

    def scores(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        One score a code at each place of the grid.

        Shapes:
            pixel_values (B, 3, H, W) in [-1, 1] -> (B, K, H / f, W / f)

        Raises:
            ValueError: the sides are no multiples of f.
        """
        factor = self.config.factor
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3 or any(s % factor for s in pixel_values.shape[2:]):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected (B, 3, H, W) with multiples of {factor}."
            )
        return self.code_scores(self.to_code(self.encoder(pixel_values.to(self.dtype))))

    def encode(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """
        The codes of images, row by row.

        Shapes:
            pixel_values (B, 3, H, W) in [-1, 1] -> (B, H / f * W / f) in 0..K - 1
        """
        return self.scores(pixel_values).argmax(dim=1).flatten(1)

    def decode(self, codes: torch.LongTensor) -> torch.Tensor:
        """
        Images from codes. `(images + 1) / 2` is what `torchvision` and Pillow call 0..1.

        Shapes:
            codes (B, n) with n a square, or a grid (B, h, w) -> (B, 3, h * f, w * f) in [-1, 1]

        Raises:
            ValueError: n is no square, or a code is outside 0..K - 1.
        """
        if codes.dim() == 2:
            side = round(codes.shape[1] ** 0.5)
            if side == 0 or side * side != codes.shape[1]:
                raise ValueError(f"{codes.shape[1]} codes are no square; give a grid (B, h, w) for other images.")
            codes = codes.view(-1, side, side)
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.config.num_codes:
            raise ValueError(
                f"codes range from {low} to {high}; expected 0 to {self.config.num_codes - 1}: a token's id minus the "
                "id of <code_0>."
            )
        return self.render(self.code_book(codes).permute(0, 3, 1, 2)).clamp(-1, 1)

    def render(self, embedded: torch.Tensor) -> torch.Tensor:
        """(B, E, h, w) -> (B, 3, h * f, w * f), not yet clamped"""
        return self.decoder(self.from_code(embedded))

    def forward(
        self, pixel_values: torch.Tensor, temperature: float = 1.0, return_dict: bool | None = None
    ) -> UnivalImageCodesOutput | tuple:
        """
        Reconstruction and its loss: the mean squared error and the divergence of the codes from using all alike. The
        adversarial and perceptual terms of the paper need networks of their own and are left to a trainer.

        In training, codes are drawn, and gradients are those of a Gumbel softmax at `temperature` (anneal it).

        Shapes:
            pixel_values (B, 3, H, W) in [-1, 1] -> `UnivalImageCodesOutput`
        """
        scores = self.scores(pixel_values)
        codes = scores.argmax(dim=1)
        if self.training:
            chosen = nn.functional.gumbel_softmax(scores, tau=temperature, dim=1, hard=True)
            embedded = (chosen.movedim(1, -1) @ self.code_book.weight).movedim(-1, 1)
        else:
            embedded = self.code_book(codes).permute(0, 3, 1, 2)
        reconstruction = self.render(embedded)
        log_shares = scores.float().log_softmax(dim=1)
        uniform = torch.tensor(float(self.config.num_codes), device=scores.device).log()
        divergence = (log_shares.exp() * (log_shares + uniform)).sum(dim=1).mean()
        loss = nn.functional.mse_loss(reconstruction.float(), pixel_values.float()) + self.config.kl_weight * divergence
        outputs = UnivalImageCodesOutput(loss=loss, reconstruction=reconstruction, codes=codes.flatten(1))
        return outputs if return_dict is not False else outputs.to_tuple()


UnivalImageCodes.register_for_auto_class()

__all__ = ["UnivalImageCodes"]
