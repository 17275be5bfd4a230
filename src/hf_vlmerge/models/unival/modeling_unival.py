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
"""UnIVAL (Shukor et al. 2023): one encoder-decoder for text, images, clips and sounds.

Media become tokens that stand before the text in the encoder. Positions are never added to embeddings: they act through
additive biases of the attention. One part of a bias is "untied": a product of projected positions, computed once and
shared by all layers of a stack (also from decoder to encoder). The other is a table of relative positions of each
layer, for text and for the grid of media tokens. Rows of a batch may hold different media.

B = batch, N = media tokens, T = text tokens, L = N + T, Q = target tokens of this call, S = target tokens in all,
D = width, H = heads, G = side of the position grid, V = vocabulary, K = kinds of media in a batch.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.cache_utils import DynamicCache
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.modeling_outputs import Seq2SeqModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput
from transformers.utils import TransformersKwargs
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder
from transformers.utils.output_capturing import capture_outputs

from .configuration_unival import TOWERS
from .configuration_unival import UnivalConfig
from .encoders_unival import UnivalAudioTower
from .encoders_unival import UnivalFourier
from .encoders_unival import UnivalImageTower
from .encoders_unival import UnivalVideoTower
from .encoders_unival import fourier_kernels
from .encoders_unival import mel_matrix
from .generation_unival import UnivalGenerationMixin
from .losses_unival import IGNORED
from .losses_unival import mean_loss

INPUT_OF = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_values"}
SHAPE_OF = {
    "image": ("rows", 3, "height", "width"),
    "video": ("rows", "frames", 3, "height", "width"),
    "audio": ("rows", "samples"),
}
# transformers 5.24 renamed past_key_values, in arguments and outputs
CACHE = "cache" if "cache" in Seq2SeqLMOutput.__annotations__ else "past_key_values"


@dataclass
class UnivalEncoderOutput(ModelOutput):
    """
    What the decoder needs of the encoder. All of it is expanded with the batch, so beams find their own row.

    Shapes:
        last_hidden_state (B, L, D), media tokens first; positions (B, L, D), normalised, for the decoder's bias;
        attention_mask (B, L), 1 = token, 0 = padding; hidden_states: layers + 1 of (B, L, D); attentions: one a layer
        of (B, H, L, L) (eager attention only)
    """

    last_hidden_state: torch.FloatTensor | None = None
    positions: torch.FloatTensor | None = None
    attention_mask: torch.Tensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class Media(NamedTuple):
    """The media tokens of a batch."""

    tokens: torch.Tensor  # (B, N, D)
    mask: torch.Tensor  # (B, N), 1 = token
    kinds: tuple[str, ...]  # the K kinds that occur
    ids: torch.Tensor  # (K, N), cells of the position grid
    choice: torch.Tensor | None  # (B,), each row's place in `kinds`; None where all rows have the same kind


def grid_ids(shape: tuple[int, ...], kind: str, grid: int, device: torch.device | None = None) -> torch.Tensor:
    """
    Cells of the G x G position grid for the tokens of a feature map, in the order of its flattening: (N,).

    Cell (r, c) has id r * G + c + 1. Images (h, w) fill it from the corner. Clips (t, h, w) repeat the same cells for
    every t: time has no position. Sounds (t, f) lie row by row in the smallest square that holds all their tokens.
    """
    if kind == "audio":
        count = shape[0] * shape[1]
        width = math.ceil(math.sqrt(count))
        height, repeats = width, 1
    else:
        (height, width), repeats = shape[-2:], shape[0] if kind == "video" else 1
        count = height * width
    if max(height, width) > grid:
        raise ValueError(f"the {kind} gives {height} x {width} tokens; this model has positions for {grid} x {grid}.")
    cell = torch.arange(count, device=device)
    return (cell // width * grid + cell % width + 1).repeat(repeats)


def code_ids(positions: torch.Tensor, side: int, grid: int) -> torch.Tensor:
    """Cells of the position grid for image codes: 0 for the start token, then a `side` x `side` square row by row."""
    code = positions - 1
    return torch.where(positions == 0, 0, code // side * grid + code % side + 1)


def grid_buckets(queries: torch.Tensor, keys: torch.Tensor, grid: int) -> torch.Tensor:
    """
    Rows of a table of relative grid positions; the three last ones serve id 0 (no cell).

    Shapes:
        queries (..., Q), keys (..., S) cells -> (..., Q, S) in 0..(2G - 1)^2 + 2
    """
    query, key = queries[..., :, None], keys[..., None, :]
    span = 2 * grid - 1
    row = (query - 1) // grid - (key - 1) // grid + grid - 1
    column = (query - 1) % grid - (key - 1) % grid + grid - 1
    outside = span * span + torch.where(query == 0, torch.where(key == 0, 2, 0), 1)
    return torch.where((query == 0) | (key == 0), outside, row * span + column)


def text_buckets(queries: torch.Tensor, keys: torch.Tensor, size: int, distance: int) -> torch.Tensor:
    """
    Rows of a table of relative text positions: exact up to `size` / 2 tokens, logarithmic up to `distance`.

    Shapes:
        queries (..., Q), keys (..., S) positions -> (..., Q, S) in 0..2 `size` - 2
    """
    offset = queries[..., :, None] - keys[..., None, :]
    exact = size // 2
    ratio = torch.log(offset.abs().clamp(min=exact).float() / exact)
    scaled = ratio * ((exact - 1) / math.log((distance - 1) / exact))
    # the margin keeps rounding from lifting the last distance, where the value is whole, into one bucket more
    far = torch.ceil(scaled - 1e-4).clamp(max=exact - 1).long() + exact
    return torch.where(offset.abs() <= exact, offset, offset.sign() * far) + size - 1


def position_scores(
    queries: torch.Tensor, keys: torch.Tensor, q_proj: nn.Linear, k_proj: nn.Linear, heads: int, scaling: float
) -> torch.Tensor:
    """
    The untied bias: scaled products of projected positions.

    For a few queries against many keys the key projection is applied to the queries instead, (q W_q) W_k^T · k: a
    decoding step then projects no key, and needs no cache of projected positions.

    Shapes:
        queries (1 or B, Q, D), keys (1 or B, S, D) -> (1 or B, H, Q, S), a query's scores side by side: fused
        attention on GPUs takes no other bias
    """
    rows, length, width = queries.shape
    query = (q_proj(queries) * scaling).view(rows, length, heads, -1).transpose(1, 2)  # (rows, H, Q, D/H)
    if length * heads >= width:
        key = k_proj(keys).view(*keys.shape[:2], heads, -1)
        return query @ key.permute(0, 2, 3, 1)
    folded = query @ k_proj.weight.view(heads, -1, width)  # (rows, H, Q, D)
    constant = query @ k_proj.bias.view(heads, -1, 1)  # (rows, H, Q, 1)
    if rows == 1:  # one plain product for all rows of keys
        scores = nn.functional.linear(keys, folded.view(heads * length, width)).transpose(1, 2).contiguous()
    else:
        scores = folded.view(rows, heads * length, width) @ keys.transpose(1, 2)
    return scores.reshape(-1, heads, length, keys.shape[1]) + constant


def relative_bias(tables: nn.ModuleList, buckets: torch.Tensor) -> list[torch.Tensor]:
    """Each layer's own part of the bias: (..., Q, S) -> one (..., H, Q, S) a layer"""
    return [nn.functional.embedding(buckets, table.weight).movedim(-1, -3) for table in tables]


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where visible, half the lowest number elsewhere (a bias is added to it): a shape -> the same"""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible.bool(), torch.finfo(dtype).min / 2)


def padding_to_the_right(embeddings: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of texts count from their first token, so rows begin with it: (B, T, D), (B, T) -> the same"""
    length = mask.shape[1]
    padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
    place = (torch.arange(length, device=mask.device) + padding) % length
    return embeddings.gather(1, place[..., None].expand_as(embeddings)), mask.gather(1, place)


def shift_right(labels: torch.Tensor, pad_token_id: int, start_token_id: int) -> torch.Tensor:
    """Decoder input of a target: the start token, then all but the last label (-100 becomes padding). (B, S)"""
    shifted = nn.functional.pad(labels[:, :-1], (1, 0), value=start_token_id)
    return shifted.masked_fill(shifted == IGNORED, pad_token_id)


def with_either_name_of_the_cache(forward: Callable) -> Callable:
    """Lets `forward` take its `past_key_values` as `cache` too, whatever the version of the library."""

    @functools.wraps(forward)
    def renamed(self, *args, cache: Cache | None = None, **kwargs):
        if cache is not None:
            kwargs["past_key_values"] = cache
        return forward(self, *args, **kwargs)

    return renamed


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
    """Plain attention with the softmax in float32; (B, H, S, D/H) each -> (B, Q, H, D/H), (B, H, Q, S)."""
    scores = torch.matmul(query * scaling, key.transpose(2, 3)).float() + attention_mask
    weights = scores.softmax(dim=-1).to(value.dtype)
    return torch.matmul(weights, value).transpose(1, 2), weights


class UnivalAttention(nn.Module):
    """Attention with an additive bias and a learned scale of each head's output (before the output projection)."""

    is_causal = False  # the bias holds the causal mask

    def __init__(self, config: UnivalConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = (config.attention_scale_factor * self.head_dim) ** -0.5
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )
        self.head_scale = nn.Parameter(torch.ones(config.num_attention_heads))

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, H, S, D/H)"""
        return states.view(*states.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        bias: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Self-attention, or cross-attention where `key_value_states` are given.

        Shapes:
            hidden_states (B, Q, D); bias (1 or B, H, Q, S); key_value_states (B, S, D)
            -> (B, Q, D), attention weights (B, H, Q, S) or None where the implementation has none
        """
        query = self.split_heads(self.q_proj(hidden_states))
        key, value = self.keys_and_values(hidden_states, key_value_states, past_key_values)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        context, weights = attend(self, query, key, value, bias.to(query.dtype), scaling=self.scaling, **kwargs)
        context = context * self.head_scale[:, None]  # (B, Q, H, D/H)
        return self.out_proj(context.reshape(hidden_states.shape)), weights

    def keys_and_values(
        self, hidden_states: torch.Tensor, key_value_states: torch.Tensor | None, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, H, S, D/H) of all tokens so far; those of the encoder are projected once a sequence."""
        if key_value_states is not None and cache is not None and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        source = hidden_states if key_value_states is None else key_value_states
        key, value = self.split_heads(self.k_proj(source)), self.split_heads(self.v_proj(source))
        if cache is None:
            return key, value
        if key_value_states is None:
            return cache.self_attention_cache.update(key, value, self.layer_idx)
        cache.is_updated[self.layer_idx] = True
        return cache.cross_attention_cache.update(key, value, self.layer_idx)


class UnivalDropPath(nn.Module):
    """Stochastic depth: drops a whole residual branch of a sample, scaled so that the expectation is kept."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        keep = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.rate
        return branch * (keep / (1 - self.rate)).to(branch.dtype)


class UnivalLayer(GradientCheckpointingLayer):
    """What encoder and decoder layers share: residual branches, and the FFN with a norm before it and one within."""

    def __init__(self, config: UnivalConfig, index: int, layers: int):
        super().__init__()
        width = config.hidden_size
        self.ffn_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.ffn_mid_norm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)
        self.fc2 = nn.Linear(config.intermediate_size, width)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = UnivalDropPath(config.drop_path_rate * index / max(1, layers - 1))

    def add(self, hidden_states: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.drop_path(self.dropout(branch))

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)"""
        inner = nn.functional.gelu(self.fc1(self.ffn_norm(hidden_states)))
        return self.add(hidden_states, self.fc2(self.ffn_mid_norm(inner)))


class UnivalEncoderLayer(UnivalLayer):
    """x + norm(Attn(norm(x))), then x + FFN(x)."""

    def __init__(self, config: UnivalConfig, index: int):
        super().__init__(config, index, config.encoder_layers)
        self.self_attn = UnivalAttention(config, index)
        self.self_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn_post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, bias: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """
        Shapes:
            hidden_states (B, L, D); bias (1 or B, H, L, L) -> (B, L, D)
        """
        context, _ = self.self_attn(self.self_attn_norm(hidden_states), bias, **kwargs)
        hidden_states = self.add(hidden_states, self.self_attn_post_norm(context))
        return self.feed_forward(hidden_states)


class UnivalDecoderLayer(UnivalLayer):
    """x + norm(Attn(norm(x))), x + norm(CrossAttn(norm(x))), then x + FFN(x)."""

    def __init__(self, config: UnivalConfig, index: int):
        super().__init__(config, index, config.decoder_layers)
        for name in ("self_attn", "cross_attn"):
            self.add_module(name, UnivalAttention(config, index))
            self.add_module(f"{name}_norm", nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps))
            self.add_module(f"{name}_post_norm", nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps))

    def forward(
        self,
        hidden_states: torch.Tensor,
        self_bias: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        cross_bias: torch.Tensor,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        W rows of targets may share one row of the encoder: their queries then stand in a line before its keys.

        Shapes:
            hidden_states (B · W, Q, D); self_bias (1 or B · W, H, Q, S); encoder_hidden_states (B, L, D);
            cross_bias (B, H, W · Q, L) -> (B · W, Q, D)
        """
        context, _ = self.self_attn(
            self.self_attn_norm(hidden_states), self_bias, past_key_values=past_key_values, **kwargs
        )
        hidden_states = self.add(hidden_states, self.self_attn_post_norm(context))
        queries = self.cross_attn_norm(hidden_states).reshape(len(encoder_hidden_states), -1, hidden_states.shape[2])
        context, _ = self.cross_attn(queries, cross_bias, encoder_hidden_states, past_key_values, **kwargs)
        context = self.cross_attn_post_norm(context).view_as(hidden_states)
        hidden_states = self.add(hidden_states, context)
        return self.feed_forward(hidden_states)


class UnivalPreTrainedModel(PreTrainedModel):
    """Initial values, and what the library needs to know."""

    config_class = UnivalConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["UnivalEncoderLayer", "UnivalDecoderLayer", "UnivalBottleneck", "UnivalAudioBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict = ["stft"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, UnivalAttention):
            init.ones_(module.head_scale)
        elif isinstance(module, UnivalFourier):
            init.copy_(module.weight, fourier_kernels(module.kernel_size[0])[module.part])
        elif isinstance(module, UnivalAudioTower):
            init.copy_(module.mel, mel_matrix(module.config))


class UnivalStack(UnivalPreTrainedModel):
    """What encoder and decoder share: text embeddings, text positions, relative tables."""

    def __init__(self, config: UnivalConfig, layers: int):
        super().__init__(config)
        width, heads = config.hidden_size, config.num_attention_heads
        self.scaling = (config.attention_scale_factor * width / heads) ** -0.5
        self.embed_tokens = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.text_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.text_positions = nn.Embedding(config.max_position_embeddings + 2, width)
        self.text_position_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.media_position_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        grid_rows = (2 * config.grid_size - 1) ** 2 + 3
        self.text_relative = nn.ModuleList(nn.Embedding(2 * config.text_bucket_size - 1, heads) for _ in range(layers))
        self.media_relative = nn.ModuleList(nn.Embedding(grid_rows, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def position_table(self) -> nn.Embedding:
        """Absolute positions of media cells: (G^2 + 1, D)"""
        return nn.Embedding(self.config.grid_size**2 + 1, self.config.hidden_size)

    def text_bias(self, queries: torch.Tensor, keys: torch.Tensor) -> list[torch.Tensor]:
        """Relative text bias of each layer; positions (b, Q), (b, S) -> (b, H, Q, S)"""
        buckets = text_buckets(queries, keys, self.config.text_bucket_size, self.config.text_bucket_distance)
        return relative_bias(self.text_relative, buckets)

    def media_bias(self, queries: torch.Tensor, keys: torch.Tensor) -> list[torch.Tensor]:
        """Relative grid bias of each layer; cells (b, Q), (b, S) -> (b, H, Q, S)"""
        return relative_bias(self.media_relative, grid_buckets(queries, keys, self.config.grid_size))


class UnivalEncoder(UnivalStack):
    """Towers, connectors and the layers over media and text."""

    _can_record_outputs = {"hidden_states": UnivalEncoderLayer, "attentions": UnivalAttention}

    def __init__(self, config: UnivalConfig):
        super().__init__(config, config.encoder_layers)
        width = config.hidden_size
        self.type_embedding = nn.Embedding(2, width)  # 0 text, 1 media
        self.media_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        towers = {"image": UnivalImageTower, "video": UnivalVideoTower, "audio": UnivalAudioTower}
        for kind in config.towers:
            tower = towers[kind](config)
            self.add_module(f"{kind}_tower", tower)
            self.add_module(f"{kind}_connector", nn.Linear(tower.out_channels, width))
            self.add_module(f"{kind}_positions", self.position_table())
        self.position_q_proj = nn.Linear(width, width)
        self.position_k_proj = nn.Linear(width, width)
        self.layers = nn.ModuleList(UnivalEncoderLayer(config, index) for index in range(config.encoder_layers))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        media_types: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UnivalEncoderOutput:
        """
        Args:
            attention_mask: 1 = token, 0 = padding; padding tokens are masked where it is absent. Padding on the left is
                moved to the right, in all that is returned.
            media_types: the media of each row: -1 none, 0 image, 1 clip, 2 sound. The media tensors then hold only the
                rows that have that media, in row order; without it every row has the one media that is given.

        Shapes:
            input_ids, attention_mask (B, T); pixel_values (rows, 3, height, width); pixel_values_videos
            (rows, frames, 3, height, width); input_values (rows, samples); media_types (B,) -> `UnivalEncoderOutput`
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds.")
        if attention_mask is None and input_ids is not None:
            attention_mask = input_ids != self.config.pad_token_id
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones(inputs_embeds.shape[:2], device=inputs_embeds.device)
        given = {"image": pixel_values, "video": pixel_values_videos, "audio": input_values}
        media = self.embed_media(given, media_types, len(inputs_embeds))
        if torch.compiler.is_compiling() or not attention_mask[:, :1].all():
            inputs_embeds, attention_mask = padding_to_the_right(inputs_embeds, attention_mask)
        text = self.dropout(self.text_norm(inputs_embeds + self.type_embedding.weight[0]))
        positions, biases = self.position_biases(media, inputs_embeds.shape[1])

        hidden_states, mask = text, attention_mask.to(torch.long)
        if media is not None:
            hidden_states, mask = torch.cat([media.tokens, text], dim=1), torch.cat([media.mask, mask], dim=1)
        padded = torch.compiler.is_compiling() or not mask.all()
        if padded:
            hidden_states = hidden_states * mask[:, :, None].to(hidden_states.dtype)
        key_mask = additive_mask(mask, hidden_states.dtype)[:, None, None, :] if padded else None

        for layer, bias in zip(self.layers, biases, strict=True):
            if media is not None and media.choice is not None:
                bias = bias[media.choice]
            hidden_states = layer(hidden_states, bias if key_mask is None else bias + key_mask, **kwargs)

        if media is not None and media.choice is not None:
            positions = positions[media.choice]
        return UnivalEncoderOutput(
            last_hidden_state=self.norm(hidden_states),
            positions=positions.expand(len(hidden_states), -1, -1),
            attention_mask=mask,
        )

    def embed_media(
        self, given: dict[str, torch.Tensor | None], media_types: torch.Tensor | None, rows: int
    ) -> Media | None:
        """Runs each tower over its rows and puts the tokens where they belong; None if there is no media at all."""
        given = {kind: values for kind, values in given.items() if values is not None and len(values)}
        for kind, values in given.items():
            if kind not in self.config.towers:
                raise ValueError(
                    f"{INPUT_OF[kind]} were given, but this model has no {kind} tower (towers: {self.config.towers})."
                )
            shape = SHAPE_OF[kind]
            if values.dim() != len(shape) or (kind != "audio" and values.shape[-3] != 3):
                expected = ", ".join(map(str, shape))
                raise ValueError(f"{INPUT_OF[kind]} has shape {tuple(values.shape)}; expected ({expected}).")
            if not values.is_floating_point():
                raise ValueError(f"{INPUT_OF[kind]} are {values.dtype}; expected floats, as the processor gives them.")
        places = self.place_media(given, media_types, rows)
        if not given:
            return None
        parts, ids = {}, {}
        for kind, values in given.items():
            features = self.get_submodule(f"{kind}_tower")(values)
            ids[kind] = grid_ids(features.shape[2:], kind, self.config.grid_size, features.device)
            tokens = self.get_submodule(f"{kind}_connector")(features.flatten(2).transpose(1, 2))  # (n, N, D)
            parts[kind] = self.dropout(self.media_norm(tokens + self.type_embedding.weight[1]))
        kinds = tuple(given)
        if media_types is None:
            (tokens,) = parts.values()
            return Media(tokens, torch.ones_like(tokens[:, :, 0], dtype=torch.long), kinds, ids[kinds[0]][None], None)

        length = max(part.shape[1] for part in parts.values())
        first = parts[kinds[0]]
        tokens = first.new_zeros(rows, length, first.shape[2])
        mask = torch.zeros(rows, length, dtype=torch.long, device=first.device)
        choice = torch.zeros(rows, dtype=torch.long, device=first.device)
        for i, kind in enumerate(kinds):
            tokens[places[kind], : parts[kind].shape[1]] = parts[kind]
            mask[places[kind], : parts[kind].shape[1]] = 1
            choice[places[kind]] = i
        grid = torch.stack([nn.functional.pad(ids[kind], (0, length - len(ids[kind]))) for kind in kinds])
        return Media(tokens, mask, kinds, grid, choice if len(kinds) > 1 else None)

    @staticmethod
    def place_media(
        given: dict[str, torch.Tensor], media_types: torch.Tensor | None, rows: int
    ) -> dict[str, torch.Tensor]:
        """The rows of the batch that hold each kind of media, checked against what was given."""
        if media_types is None:
            if len(given) > 1:
                names = " and ".join(INPUT_OF[kind] for kind in given)
                raise ValueError(f"{names} were given without media_types, which say what each row holds.")
            for kind, values in given.items():
                if len(values) != rows:
                    raise ValueError(
                        f"{INPUT_OF[kind]} has {len(values)} rows for {rows} texts; expected media_types, which say "
                        "what each row holds."
                    )
            return {}
        if media_types.shape != (rows,):
            raise ValueError(f"media_types has shape {tuple(media_types.shape)}; expected ({rows},).")
        places = {kind: (media_types == i).nonzero()[:, 0] for i, kind in enumerate(TOWERS)}
        for kind, place in places.items():
            count = len(given[kind]) if kind in given else 0
            if len(place) != count:
                raise ValueError(f"media_types has {len(place)} rows of kind {kind}, {INPUT_OF[kind]} has {count}.")
        return places

    def position_biases(self, media: Media | None, length: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """
        Normalised positions and the bias of every layer, once for each kind of media in the batch (K; 1 without media).

        Shapes:
            -> positions (K, L, D), one bias (K, H, L, L) a layer
        """
        config, device = self.config, self.text_positions.weight.device
        if length > config.max_position_embeddings:
            raise ValueError(
                f"the text has {length} tokens; this model takes at most {config.max_position_embeddings}."
            )
        place = torch.arange(length, device=device)[None]
        positions = self.text_position_norm(self.text_positions(place))  # (1, T, D)
        text = self.text_bias(place, place)
        if media is not None:
            tables = [self.get_submodule(f"{kind}_positions") for kind in media.kinds]
            cells = torch.stack([table(ids) for table, ids in zip(tables, media.ids, strict=True)])
            cells = self.media_position_norm(cells)  # (K, N, D)
            positions = torch.cat([cells, positions.expand(len(cells), -1, -1)], dim=1)
        heads, scaling = config.num_attention_heads, self.scaling
        untied = position_scores(positions, positions, self.position_q_proj, self.position_k_proj, heads, scaling)
        if media is None:
            return positions, [untied + bias for bias in text]
        tokens = media.ids.shape[1]
        biases = []
        for text_part, media_part in zip(text, self.media_bias(media.ids, media.ids), strict=True):
            bias = untied.clone()
            bias[..., :tokens, :tokens] += media_part
            bias[..., tokens:, tokens:] += text_part
            biases.append(bias)
        return positions, biases


class UnivalDecoder(UnivalStack):
    """The layers over the target: text, or the codes of an image."""

    _can_record_outputs = {
        "hidden_states": UnivalDecoderLayer,
        "attentions": OutputRecorder(UnivalAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(UnivalAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: UnivalConfig):
        super().__init__(config, config.decoder_layers)
        width = config.hidden_size
        self.code_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.image_positions = self.position_table()
        self.self_position_q_proj, self.self_position_k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.cross_position_q_proj, self.cross_position_k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.layers = nn.ModuleList(UnivalDecoderLayer(config, index) for index in range(config.decoder_layers))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_positions: torch.FloatTensor | None = None,
        code_mask: torch.BoolTensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """
        Args:
            attention_mask: of all target tokens so far. Needed for padding on the left only (positions then count
                tokens from the first real one): padding on the right is hidden by the causal mask.
            encoder_hidden_states, encoder_attention_mask, encoder_positions: fields of `UnivalEncoderOutput`. Where
                they have fewer rows, each serves W rows of targets that stand together: beams, samples, candidates.
            code_mask: True for the rows whose target is image codes.

        Shapes:
            input_ids (B · W, Q); attention_mask (B · W, S); encoder_hidden_states, encoder_positions (B, L, D);
            encoder_attention_mask (B, L); code_mask (B · W,) -> last_hidden_state (B · W, Q, D)
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either decoder_input_ids or decoder_inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if len(inputs_embeds) % len(encoder_positions):
            raise ValueError(
                f"the target has {len(inputs_embeds)} rows; expected a multiple of the encoder's "
                f"{len(encoder_positions)}."
            )
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        codes = self.code_rows(code_mask)
        hidden_states = self.dropout(self.select(codes, self.text_norm, self.code_norm, inputs_embeds))

        positions, visible = self.positions_and_mask(inputs_embeds, past, attention_mask)
        targets = self.select(codes, self.embed_text_positions, self.embed_code_positions, positions)  # (1 or B, S, D)
        self_biases = self.self_biases(targets, positions, past, codes, visible)
        shared = len(inputs_embeds) // len(encoder_positions)  # W
        cross_bias = self.cross_bias(targets[:, past:], encoder_positions, encoder_attention_mask, shared)

        for layer, self_bias in zip(self.layers, self_biases, strict=True):
            hidden_states = layer(
                hidden_states,
                self_bias,
                encoder_hidden_states,
                cross_bias,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states), **{CACHE: past_key_values}
        )

    def cross_bias(
        self, targets: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None, shared: int
    ) -> torch.Tensor:
        """
        The bias of all layers towards the encoder, where `shared` = W rows of targets follow each of its rows.

        Shapes:
            targets (1 or B · W, Q, D); positions (B, L, D); mask (B, L) -> (B, H, W · Q, L), or (B, H, 1, L) for all W
            rows where they have one and the same new position
        """
        if len(targets) > 1:
            targets = targets.reshape(len(positions), -1, targets.shape[2])  # (B, W · Q, D)
        elif targets.shape[1] > 1:
            targets = targets.repeat(1, shared, 1)
        q_proj, k_proj = self.cross_position_q_proj, self.cross_position_k_proj
        bias = position_scores(targets, positions, q_proj, k_proj, self.config.num_attention_heads, self.scaling)
        return bias if mask is None else bias + additive_mask(mask, bias.dtype)[:, None, None, :]

    @staticmethod
    def code_rows(code_mask: torch.Tensor | None) -> torch.Tensor | bool:
        """Which rows are codes: True or False where all agree, so that their biases are computed once, else (B,)."""
        if code_mask is None:
            return False
        same = bool((code_mask == code_mask[0]).all())
        return bool(code_mask[0]) if same else code_mask.bool()

    @staticmethod
    def select(codes: torch.Tensor | bool, text, code, value: torch.Tensor) -> torch.Tensor:
        """`text(value)` for text rows, `code(value)` for code rows, stacked over the batch where both occur."""
        if isinstance(codes, bool):
            return code(value) if codes else text(value)
        chosen, other = code(value), text(value)
        return torch.where(codes.view(-1, *[1] * (other.dim() - 1)), chosen, other)

    def positions_and_mask(
        self, inputs_embeds: torch.Tensor, past: int, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Positions (1 or B, S) of all target tokens, and which of them each query may see: (1 or B, 1, Q, S), or None
        where that is all of them."""
        total, device = past + inputs_embeds.shape[1], inputs_embeds.device
        positions = torch.arange(total, device=device)[None]
        single = inputs_embeds.shape[1] == 1  # and it comes last
        visible = None if single else (positions <= positions[:, past:].transpose(0, 1))[None, None]
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError(
                    f"decoder_attention_mask has {attention_mask.dim()} dimensions; expected (rows, tokens). "
                    "Generation with a static cache makes such masks; this model takes a dynamic one."
                )
            if attention_mask.shape[1] != total:
                raise ValueError(
                    f"decoder_attention_mask covers {attention_mask.shape[1]} tokens; expected {total}, all so far."
                )
            known = attention_mask[:, None, None, :].bool()
            visible = known if visible is None else visible & known
            if not attention_mask[:, 0].all():
                positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        return positions, visible

    def embed_text_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """(b, S) -> (b, S, D)"""
        limit = self.config.max_position_embeddings
        if positions.shape[1] > limit:
            raise ValueError(f"the target has {positions.shape[1]} tokens; this model takes at most {limit}.")
        return self.text_position_norm(self.text_positions(positions))

    def embed_code_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """(b, S) -> (b, S, D)"""
        side = self.config.code_grid_size
        if positions.shape[1] > side * side + 1:
            raise ValueError(
                f"the target has {positions.shape[1]} image codes; a start token and {side} x {side} codes is all "
                f"that an image of code_image_size {self.config.code_image_size} has."
            )
        return self.media_position_norm(self.image_positions(self.code_cells(positions)))

    def code_cells(self, positions: torch.Tensor) -> torch.Tensor:
        return code_ids(positions, self.config.code_grid_size, self.config.grid_size)

    def self_biases(
        self, targets: torch.Tensor, positions: torch.Tensor, past: int, codes: torch.Tensor | bool, visible
    ) -> list[torch.Tensor]:
        """
        The bias of every layer with the causal mask, for the new tokens only: one (1 or B, H, Q, S) a layer.

        Shapes:
            targets (1 or B, S, D); positions (1 or B, S); visible (1 or B, 1, Q, S) or None
        """
        untied = position_scores(
            targets[:, past:], targets, self.self_position_q_proj, self.self_position_k_proj,
            self.config.num_attention_heads, self.scaling,
        )  # fmt: skip
        if visible is not None:
            untied = untied + additive_mask(visible, untied.dtype)
        if codes is not True:
            text = self.text_bias(positions[:, past:], positions)
        if codes is not False:
            cells = self.code_cells(positions)
            code = self.media_bias(cells[:, past:], cells)
        if isinstance(codes, bool):
            return [untied + part for part in (code if codes else text)]
        rows = codes[:, None, None, None]
        return [untied + torch.where(rows, *parts) for parts in zip(code, text, strict=True)]


class UnivalModel(UnivalPreTrainedModel):
    """Encoder and decoder without a head."""

    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def __init__(self, config: UnivalConfig):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.encoder = UnivalEncoder(config)
        self.decoder = UnivalDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.shared

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.shared = self.encoder.embed_tokens = self.decoder.embed_tokens = value

    @can_return_tuple
    @with_either_name_of_the_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        media_types: torch.LongTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_code_mask: torch.BoolTensor | None = None,
        encoder_outputs: UnivalEncoderOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        """
        Args:
            media_types: see `UnivalEncoder.forward`.
            decoder_input_ids: the target; the start token alone where it is absent.
            decoder_attention_mask, decoder_code_mask: see `UnivalDecoder.forward`.
            encoder_outputs: an earlier `UnivalEncoderOutput`; text and media are then not looked at.

        Shapes:
            input_ids, attention_mask (B, T); pixel_values (rows, 3, height, width); pixel_values_videos
            (rows, frames, 3, height, width); input_values (rows, samples); media_types, decoder_code_mask (B,);
            decoder_input_ids (B, Q); decoder_attention_mask (B, S)
            -> last_hidden_state (B, Q, D), encoder_last_hidden_state (B, L, D)
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids, attention_mask, pixel_values, pixel_values_videos, input_values, media_types, inputs_embeds,
                return_dict=True, **kwargs,
            )  # fmt: skip
        elif getattr(encoder_outputs, "positions", None) is None:
            raise ValueError("encoder_outputs has no `positions`; expected the output of this model's encoder.")
        states = encoder_outputs.last_hidden_state
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            start = self.config.decoder_start_token_id
            decoder_input_ids = torch.full((len(states), 1), start, dtype=torch.long, device=states.device)
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=states,
            encoder_attention_mask=encoder_outputs.attention_mask,
            encoder_positions=encoder_outputs.positions,
            code_mask=decoder_code_mask,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            **{CACHE: getattr(decoder_outputs, CACHE)},
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=states,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class UnivalForConditionalGeneration(UnivalPreTrainedModel, UnivalGenerationMixin):
    """The model with its output projection, which is the embedding: every task is a text, boxes and images included."""

    _tied_weights_keys = {"lm_head.weight": "model.shared.weight"}

    def __init__(self, config: UnivalConfig):
        super().__init__(config)
        self.model = UnivalModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @with_either_name_of_the_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        media_types: torch.LongTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_code_mask: torch.BoolTensor | None = None,
        encoder_outputs: UnivalEncoderOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        smoothing: float = 0.0,
        allowed_tokens: torch.BoolTensor | None = None,
        confidence: torch.FloatTensor | None = None,
        encouraging_log_end: float | None = None,
        drop_worst_ratio: float = 0.0,
        rdrop_alpha: float = 0.0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """
        As `UnivalModel.forward`, with logits, and with a loss if `labels` are given: plain cross-entropy unless more is
        asked for.

        Args:
            labels: target ids with the end token, -100 where no loss is wanted; the decoder's input is made from them
                where it is absent. The loss is the mean over the others.
            logits_to_keep: compute the logits of this many last tokens only; 0 = of all.
            num_items_in_batch: labels that are not -100 in all batches (and processes) whose losses are added up: the
                loss is then this batch's share of their mean. The `Trainer` passes it.
            smoothing, encouraging_log_end, drop_worst_ratio: see `losses_unival.target_loss`. What is not dropped
                stands for all tokens of the batch.
            allowed_tokens: True for tokens that may be said, as `AnswerTrie.allowed_tokens` and `range_mask` make it.
            confidence: of each row's target, a factor of its log-probabilities.
            rdrop_alpha: in training, run twice with different dropout, and add this factor of their divergence.

        Shapes:
            labels (B, Q); allowed_tokens, to (B, Q, V); confidence (B,)
            -> loss (), logits (B, Q, V), encoder_last_hidden_state (B, L, D)
        """
        if labels is not None:
            use_cache = False
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if labels is not None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            elif num_items_in_batch is not None:
                raise ValueError(
                    "the Trainer keeps the labels to itself with label_smoothing_factor or compute_loss_func; expected "
                    "decoder_input_ids in the batch, as the processor and DataCollatorForSeq2Seq give them."
                )
        inputs = {
            "input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values,
            "pixel_values_videos": pixel_values_videos, "input_values": input_values, "media_types": media_types,
            "decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask,
            "decoder_code_mask": decoder_code_mask, "encoder_outputs": encoder_outputs,
            "past_key_values": past_key_values, "inputs_embeds": inputs_embeds,
            "decoder_inputs_embeds": decoder_inputs_embeds, "use_cache": use_cache, "return_dict": True, **kwargs,
        }  # fmt: skip
        outputs = self.model(**inputs)
        logits, loss = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:]), None
        if labels is not None:
            passes = [logits]
            if rdrop_alpha and self.training:
                passes.append(self.lm_head(self.model(**inputs).last_hidden_state))
            loss = mean_loss(
                passes,
                labels,
                num_items_in_batch,
                smoothing=smoothing,
                allowed_tokens=allowed_tokens,
                confidence=confidence,
                encouraging_log_end=encouraging_log_end,
                drop_worst_ratio=drop_worst_ratio,
                rdrop_alpha=rdrop_alpha,
            )
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """(B, S) -> (B, S); collators call it."""
        return shift_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)

    @staticmethod
    def _reorder_cache(past_key_values: EncoderDecoderCache, beam_idx: torch.Tensor) -> EncoderDecoderCache:
        """Beam search: the beams of a row see the same encoder output, so only what they wrote themselves moves."""
        past_key_values.self_attention_cache.reorder_cache(beam_idx)
        return past_key_values

    def _expand_inputs_for_generation(self, *args, encoder_outputs: UnivalEncoderOutput | None = None, **kwargs):
        # the encoder has run by now: beams and samples share its rows, and need no copies of the pixels
        kept = {name: value for name, value in kwargs.items() if name not in (*INPUT_OF.values(), "media_types")}
        input_ids, expanded = super()._expand_inputs_for_generation(*args, encoder_outputs={}, **kept)
        return input_ids, expanded | {"encoder_outputs": encoder_outputs}


UnivalPreTrainedModel.register_for_auto_class()  # so for every class of this file; see `AUTO_MAP`

__all__ = ["UnivalForConditionalGeneration", "UnivalModel", "UnivalPreTrainedModel"]
