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
"""The block of VLMo-style models: experts, attention, feed-forward network, stochastic depth, relative positions.

B = batch, S = sequence (text first, then image), T = text tokens, F = image tokens (class token and patches),
D = width, H = heads, N = layers.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_vlmo import VlmoConfig


class Segment(NamedTuple):
    """A run of tokens and the expert that processes it."""

    expert: str
    tokens: int


Route = tuple[Segment, ...]


class VlmoExperts(nn.ModuleDict):
    """Copies of one module, one an expert (`vision`, `language`, `vision_language`), or a single `shared` one."""

    def __init__(self, make: Callable[[], nn.Module], experts: list[str]):
        super().__init__({expert: make() for expert in experts})

    def pick(self, expert: str) -> nn.Module:
        return self["shared" if "shared" in self else expert]

    def forward(self, hidden_states: torch.Tensor, route: Route, step: str = "forward") -> torch.Tensor:
        """
        Sends each segment of the sequence to its expert; a single call where they share one.

        Shapes:
            hidden_states (B, S, D) with S the sum of the route's tokens -> (B, S, anything)
        """
        modules = [self.pick(segment.expert) for segment in route]
        calls = [module if step == "forward" else getattr(module, step) for module in modules]
        if all(module is modules[0] for module in modules):
            return calls[0](hidden_states)
        pieces = hidden_states.split([segment.tokens for segment in route], dim=1)
        return torch.cat([call(piece) for call, piece in zip(calls, pieces, strict=True)], dim=1)


class VlmoAttention(nn.Module):
    """The weights of self-attention: fused q, k, v (no bias on k) and the output projection."""

    def __init__(self, config: VlmoConfig):
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def project_in(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, S, 3D)"""
        return self.qkv(hidden_states) + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def project_out(self, context: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)"""
        return self.proj(context)


class VlmoFeedForward(nn.Module):
    def __init__(self, config: VlmoConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(hidden_states)))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention with scores and softmax in float32; (B, H, S, D/H) each -> (B, S, H, D/H), (B, H, S, S)."""
    scores = torch.matmul(query * scaling, key.transpose(2, 3)).float()
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1).to(value.dtype)
    return torch.matmul(weights, value).transpose(1, 2), weights


class VlmoDropPath(nn.Module):
    """Stochastic depth: drops a whole residual branch of a sample, scaled so that the expectation is kept."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        keep = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.rate
        return branch * (keep / (1 - self.rate)).to(branch.dtype)


class VlmoLayer(GradientCheckpointingLayer):
    """Pre-norm block with layer scale: x + scale_1 * Attn(norm1(x)), then x + scale_2 * FFN(norm2(x)).

    Only norms, attention and FFN can have experts; the two layer scales are one per block in every architecture.
    """

    is_causal = False

    def __init__(self, config: VlmoConfig, index: int):
        super().__init__()
        self.config = config
        self.index = index
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5

        modalities = ["vision", "language"]
        if index >= config.num_lower_layers:
            modalities.append("vision_language")
        custom = set(config.expert_modules)

        def experts(make: Callable[[], nn.Module], *owners: str) -> VlmoExperts:
            return VlmoExperts(make, modalities if custom.intersection(owners) else ["shared"])

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

        self.norm1 = experts(norm, "attention", "layer_norm")
        self.attention = experts(lambda: VlmoAttention(config), "attention")
        self.norm2 = experts(norm, "ffn", "layer_norm")
        self.ffn = experts(lambda: VlmoFeedForward(config), "ffn")
        self.layer_scale_1 = nn.Parameter(torch.full((config.hidden_size,), float(config.layer_scale_init_value)))
        self.layer_scale_2 = nn.Parameter(torch.full((config.hidden_size,), float(config.layer_scale_init_value)))
        for name, module in self.named_modules():
            if name.endswith(("proj", "fc1", "fc2")):  # deeper blocks start smaller (section 4.1 of BEiT)
                module.initializer_scale = (2 * (index + 1)) ** -0.5
        self.drop_path = VlmoDropPath(config.drop_path_rate * index / max(1, config.num_hidden_layers - 1))

    def forward(
        self, hidden_states: torch.Tensor, bias: torch.Tensor, route: Route
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Shapes:
            hidden_states (B, S, D); bias (1 or B, H, S, S), added to the scores (positions and mask)
            -> hidden states (B, S, D), attention weights (B, H, S, S) or None where the implementation has none
        """
        context, weights = self.attend(self.norm1(hidden_states, route), bias, route)
        hidden_states = hidden_states + self.drop_path(self.layer_scale_1 * context)
        forwarded = self.ffn(self.norm2(hidden_states, route), route)
        return hidden_states + self.drop_path(self.layer_scale_2 * forwarded), weights

    def attend(
        self, hidden_states: torch.Tensor, bias: torch.Tensor, route: Route
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, tokens, width = hidden_states.shape
        qkv = self.attention(hidden_states, route, "project_in").view(batch, tokens, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, H, S, D/H) each
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        context, weights = attend(self, query, key, value, bias.to(query.dtype), scaling=self.scaling, is_causal=False)
        context = context.reshape(batch, tokens, width)
        return self.attention(context, route, "project_out"), weights


def image_position_index(grid: int, device: torch.device | None = None) -> torch.Tensor:
    """
    Rows of the position table for image tokens (class token, then patches row by row): (F, F) with F = grid^2 + 1.

    Offsets are query minus key; the three rows behind them serve class token to any, any to class token, and
    class token to itself.
    """
    span = 2 * grid - 1
    side = torch.arange(grid, device=device)
    row, column = side.repeat_interleave(grid), side.repeat(grid)
    offsets = (row[:, None] - row + grid - 1) * span + (column[:, None] - column + grid - 1)
    return with_class_token(offsets, first=span * span)


def text_position_index(tokens: int, grid: int, num_text_positions: int, device: torch.device | None = None):
    """
    Rows of the position table for text tokens: (T, T). [CLS] has its own three rows, the last of the table.

    Offsets are key minus query, the opposite of the image part: that is how the published tables were learned.
    """
    first = (2 * grid - 1) ** 2 + 5
    position = torch.arange(tokens - 1, device=device)
    offsets = first + num_text_positions - 2 + (position - position[:, None])
    return with_class_token(offsets, first=first + 2 * num_text_positions - 3)


def with_class_token(offsets: torch.Tensor, first: int) -> torch.Tensor:
    """Puts the class token's row `first`, column `first` + 1 and corner `first` + 2 around an (n, n) index."""
    index = nn.functional.pad(offsets, (1, 0, 1, 0), value=first)
    index[1:, 0] = first + 1
    index[0, 0] = first + 2
    return index


def resize_position_table(table: torch.Tensor, old_grid: int, new_grid: int) -> torch.Tensor:
    """
    The table of another image resolution: bicubic resize of the image offsets, all other rows kept (section 4.1).

    Shapes:
        table ((2 old_grid - 1)^2 + rest, N*H) -> ((2 new_grid - 1)^2 + rest, N*H)
    """
    if old_grid == new_grid:
        return table
    old, new = 2 * old_grid - 1, 2 * new_grid - 1
    image, rest = table[: old * old], table[old * old :]
    image = image.t().reshape(1, -1, old, old)
    image = nn.functional.interpolate(image.float(), size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([image.to(table.dtype).reshape(-1, new * new).t(), rest])


__all__ = ["VlmoAttention", "VlmoExperts", "VlmoFeedForward", "VlmoLayer"]
