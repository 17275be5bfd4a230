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
"""VLMo-style models: one class whose configuration gives the five architectures of Sung et al. 2023 (section 3).

A pass takes an image, a text or both. In a joint pass the lower layers process each modality on its own, with that
modality's expert; the fusion layers process all tokens with the `vision_language` expert. So the lower stack of a
modality is the same work in every pass over the same input, and a `Stream` carries it from pass to pass: a
pre-training step runs each stack once.

B = batch, S = sequence (text first, then image), T = text tokens, F = image tokens (class token and patches),
D = width, H = heads, N = layers, M = fusion layers, V = vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils import can_return_tuple

from .configuration_vlmo import VlmoConfig
from .experts_vlmo import Segment
from .experts_vlmo import VlmoAttention
from .experts_vlmo import VlmoLayer
from .experts_vlmo import image_position_index
from .experts_vlmo import resize_position_table
from .experts_vlmo import text_position_index


@dataclass
class VlmoModelOutput(ModelOutput):
    """
    Shapes:
        last_hidden_state (B, S, D) after the final norm, text tokens first; pooler_output (B, D), the tanh-pooled
        first token (trained in joint passes only); hidden_states: N + 1 of (B, S, D); attentions: N of (B, H, S, S),
        zero between modalities where a layer processed them apart (eager attention only)
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class VlmoForPreTrainingOutput(ModelOutput):
    """
    Shapes:
        losses (): `loss` = itc_loss + itm_loss + mlm_loss_weight * mlm_loss; logits_per_image, logits_per_text (B, B);
        itm_logits (3B, 2) in a training step (matched, wrong image, wrong text; class 1 = match), else (B, 2);
        mlm_logits (B, T, V); image_embeds, text_embeds (B, D), unit length
    """

    loss: torch.FloatTensor | None = None
    itc_loss: torch.FloatTensor | None = None
    itm_loss: torch.FloatTensor | None = None
    mlm_loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    itm_logits: torch.FloatTensor | None = None
    mlm_logits: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None


@dataclass
class VlmoRetrievalOutput(ModelOutput):
    """
    Shapes:
        loss (); logits_per_image (B images, B texts), logits_per_text its transpose; image_embeds, text_embeds (B, D),
        unit length
    """

    loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None


@dataclass
class VlmoClassifierOutput(ModelOutput):
    """
    Shapes:
        loss (); logits (B, num_labels)
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None


class Stream(NamedTuple):
    """One modality (or both) on its way through the layers."""

    embedded: torch.Tensor  # (B, S, D), input of the first layer
    states: torch.Tensor  # (B, S, D), output of the last layer that has run
    text_mask: torch.Tensor | None  # (B, T), 1 = token, 0 = padding; None for an image
    text_tokens: int
    image_tokens: int

    def take(self, rows: torch.Tensor) -> "Stream":
        """The stream of other rows of the batch, with gradient: a negative costs no pass of its own."""
        mask = None if self.text_mask is None else self.text_mask[rows]
        return self._replace(embedded=self.embedded[rows], states=self.states[rows], text_mask=mask)

    def join(self, image: "Stream") -> "Stream":
        """Text tokens first, then image tokens."""
        return Stream(
            torch.cat([self.embedded, image.embedded], dim=1),
            torch.cat([self.states, image.states], dim=1),
            self.text_mask,
            self.text_tokens,
            image.image_tokens,
        )


def stack_streams(streams: list[Stream]) -> Stream:
    """One batch of the rows of several streams of equal lengths."""
    first = streams[0]
    mask = None if first.text_mask is None else torch.cat([stream.text_mask for stream in streams])
    embedded = torch.cat([stream.embedded for stream in streams])
    return first._replace(embedded=embedded, states=torch.cat([stream.states for stream in streams]), text_mask=mask)


class Trace:
    """Hidden states and attention weights of a pass, kept only if the caller asked for them."""

    def __init__(self, enabled: bool = False):
        self.enabled = enabled
        self.hidden_states: list[torch.Tensor] = []
        self.attentions: list[torch.Tensor | None] = []

    def add(self, hidden_states: torch.Tensor, weights: torch.Tensor | None) -> None:
        if self.enabled:
            self.hidden_states.append(hidden_states)
            self.attentions.append(weights)

    def join(self, image: "Trace") -> "Trace":
        """The trace of two stacks that ran side by side, as one of the joint sequence."""
        joined = Trace(self.enabled)
        joined.hidden_states = [
            torch.cat(pair, dim=1) for pair in zip(self.hidden_states, image.hidden_states, strict=True)
        ]
        for text, picture in zip(self.attentions, image.attentions, strict=True):
            joined.attentions.append(None if text is None else block_diagonal(text, picture))
        return joined


def block_diagonal(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """(B, H, T, T) and (B, H, F, F) -> (B, H, T + F, T + F), zero between the two."""
    right, left = image.shape[-1], text.shape[-1]
    return torch.cat([nn.functional.pad(text, (0, right)), nn.functional.pad(image, (left, 0))], dim=2)


class VlmoTextEmbeddings(nn.Module):
    """Words and segment 0, normalised. No absolute positions: order enters through the relative positions alone."""

    def __init__(self, config: VlmoConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(2, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.text_layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, D)"""
        return self.dropout(self.layer_norm(self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]))


class VlmoImageEmbeddings(nn.Module):
    """A class token and one token a patch; neither positions nor a norm."""

    def __init__(self, config: VlmoConfig):
        super().__init__()
        self.image_size = config.image_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, image_size, image_size) -> (B, F, D)"""
        if pixel_values.shape[-2:] != (self.image_size, self.image_size):
            height, width = pixel_values.shape[-2:]
            raise ValueError(
                f"pixel_values are {height} x {width}, but this model takes {self.image_size} x {self.image_size}; "
                "resize the images, or the model with `model.resize_image_size(...)`."
            )
        patches = self.patch_projection(pixel_values.to(self.patch_projection.weight.dtype)).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)


class VlmoEmbeddings(nn.Module):
    def __init__(self, config: VlmoConfig):
        super().__init__()
        self.text = VlmoTextEmbeddings(config)
        self.image = VlmoImageEmbeddings(config)
        self.modality_type_embeddings = nn.Embedding(config.num_modality_types, config.hidden_size)


class VlmoEncoder(nn.Module):
    """All layers, the table of relative positions that they share, and the final norm."""

    def __init__(self, config: VlmoConfig):
        super().__init__()
        self.config = config
        rows = (2 * config.grid_size - 1) ** 2 + 5 + 2 * config.num_text_positions
        columns = config.num_hidden_layers * config.num_attention_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, columns))
        self.layers = nn.ModuleList(VlmoLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def run(self, stream: Stream, experts: tuple[str, ...], first: int, last: int, trace: Trace) -> Stream:
        """
        Layers first..last-1 over the stream.

        Args:
            experts: one name for all tokens, or two: of the text part and of the image part.
        """
        if first == last:
            return stream
        tokens = stream.text_tokens + stream.image_tokens
        parts = (tokens,) if len(experts) == 1 else (stream.text_tokens, stream.image_tokens)
        route = tuple(Segment(expert, part) for expert, part in zip(experts, parts, strict=True))
        mask = self.mask(stream)
        hidden_states = stream.states
        for layer, positions in zip(self.layers[first:last], self.position_bias(stream, first, last), strict=True):
            bias = positions if mask is None else positions + mask
            hidden_states, weights = layer(hidden_states, bias, route)
            trace.add(hidden_states, weights)
        return stream._replace(states=hidden_states)

    def mask(self, stream: Stream) -> torch.Tensor | None:
        """Additive mask of the keys, (B, 1, 1, S); None where all tokens count."""
        if stream.text_mask is None:
            return None
        visible = nn.functional.pad(stream.text_mask, (0, stream.image_tokens), value=1)[:, None, None, :]
        floor = torch.finfo(stream.states.dtype).min
        return torch.zeros_like(visible, dtype=stream.states.dtype).masked_fill(visible == 0, floor)

    def position_bias(self, stream: Stream, first: int, last: int) -> torch.Tensor:
        """
        Relative position bias of layers first..last-1: (last - first, 1, H, S, S).

        The text and image squares of a joint pass equal those of the single passes; between the modalities there is one
        value a head and direction.
        """
        heads = self.config.num_attention_heads
        table = self.relative_position_bias_table[:, first * heads : last * heads]
        text, image = stream.text_tokens, stream.image_tokens
        grid, device = self.config.grid_size, table.device
        if text > self.config.num_text_positions:
            raise ValueError(
                f"the text has {text} tokens, but this model takes at most {self.config.num_text_positions}."
            )
        index = torch.empty(text + image, text + image, dtype=torch.long, device=device)
        cross = (2 * grid - 1) ** 2 + 3
        index[:text, text:], index[text:, :text] = cross, cross + 1
        if text:
            index[:text, :text] = text_position_index(text, grid, self.config.num_text_positions, device)
        if image:
            index[text:, text:] = image_position_index(grid, device)
        bias = nn.functional.embedding(index, table)  # (S, S, layers * H)
        return bias.permute(2, 0, 1).reshape(last - first, 1, heads, *index.shape)


class VlmoPooler(nn.Module):
    def __init__(self, config: VlmoConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, D)"""
        return torch.tanh(self.dense(hidden_states[:, 0]))


class VlmoPreTrainedModel(PreTrainedModel):
    """Initial values (section 4.1 and BEiT's depth scaling), and loading at another image resolution."""

    config_class = VlmoConfig
    base_model_prefix = "vlmo"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["VlmoLayer"]
    # contrastive and matching losses are means over rows, not sums over tokens that a trainer could rescale
    accepts_loss_kwargs = False
    # a checkpoint may carry the heads of another task
    _keys_to_ignore_on_load_unexpected = [r"^itc\.", r"^itm_head\.", r"^mlm_head\.", r"^classifier\."]
    num_images = 1

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std * getattr(module, "initializer_scale", 1.0))
        elif isinstance(module, nn.Embedding):
            # padding is an ordinary row with random values, only its gradient is blocked
            init.normal_(module.weight, std=std)
        elif isinstance(module, VlmoAttention):
            init.zeros_(module.q_bias)
            init.zeros_(module.v_bias)
        elif isinstance(module, VlmoLayer):
            init.constant_(module.layer_scale_1, self.config.layer_scale_init_value)
            init.constant_(module.layer_scale_2, self.config.layer_scale_init_value)
        elif isinstance(module, VlmoImageEmbeddings):
            init.normal_(module.cls_token, std=std)
        elif isinstance(module, VlmoEncoder):
            init.zeros_(module.relative_position_bias_table)
        elif isinstance(module, VlmoContrastiveHead):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.two_branches:
                init.constant_(module.logit_vl_scale, self.config.logit_scale_init_value)
        elif isinstance(module, VlmoMlmHead):
            init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """
        As in transformers, and a checkpoint of another resolution is fitted to the `image_size` that is asked for, as
        keyword or in `config`: the image part of the position table is resized; nothing else depends on the resolution.
        """
        shared = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
        hub = {key: kwargs[key] for key in shared if key in kwargs}
        if config is None:
            config, kwargs = cls.config_class.from_pretrained(
                pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
            )
            kwargs.update(hub)
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        stored = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub)
        wanted = (config.image_size, max(config.num_modality_types, 1 + cls.num_images))
        config.image_size, config.num_modality_types = stored.image_size, stored.num_modality_types
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.resize_image_size(wanted[0])
        model.resize_modality_types(wanted[1])
        return loaded

    def resize_image_size(self, image_size: int) -> None:
        """Fits the model to images of another size by a bicubic resize of the position table (section 4.1)."""
        if image_size == self.config.image_size:
            return
        if image_size % self.config.patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {self.config.patch_size}.")
        old_grid, base = self.config.grid_size, self.base_model
        self.config.image_size = base.embeddings.image.image_size = image_size
        table = resize_position_table(base.encoder.relative_position_bias_table.data, old_grid, self.config.grid_size)
        base.encoder.relative_position_bias_table = nn.Parameter(table)

    def resize_modality_types(self, rows: int) -> None:
        """Grows the modality embedding; a new row starts as a copy of the image's."""
        embedding = self.base_model.embeddings.modality_type_embeddings
        if rows == embedding.num_embeddings:
            return
        grown = torch.cat(
            [embedding.weight.data, embedding.weight.data[1:2].expand(rows - embedding.num_embeddings, -1)]
        )
        self.base_model.embeddings.modality_type_embeddings = nn.Embedding.from_pretrained(grown, freeze=False)
        self.config.num_modality_types = rows

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embeddings.text.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.embeddings.text.word_embeddings = value


class VlmoModel(VlmoPreTrainedModel):
    """The encoder without a head, and the passes that the heads are built from."""

    def __init__(self, config: VlmoConfig):
        super().__init__(config)
        self.embeddings = VlmoEmbeddings(config)
        self.encoder = VlmoEncoder(config)
        self.pooler = VlmoPooler(config)
        self.post_init()

    def text_stream(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Stream:
        """Embedded text; `input_ids` and `attention_mask` (B, T)."""
        embedded = self.embeddings.text(input_ids) + self.embeddings.modality_type_embeddings.weight[0]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return Stream(embedded, embedded, mask, embedded.shape[1], 0)

    def image_stream(self, pixel_values: torch.Tensor, image_type: int = 1) -> Stream:
        """Embedded image; `pixel_values` (B, 3, image_size, image_size)."""
        embedded = self.embeddings.image(pixel_values) + self.embeddings.modality_type_embeddings.weight[image_type]
        return Stream(embedded, embedded, None, 0, embedded.shape[1])

    def lower(self, stream: Stream, trace: Trace | None = None) -> Stream:
        """The lower layers over one modality, with its own expert."""
        expert = "language" if stream.text_tokens else "vision"
        return self.encoder.run(stream, (expert,), 0, self.config.num_lower_layers, trace or Trace())

    def upper(self, stream: Stream, expert: str, trace: Trace | None = None) -> torch.Tensor:
        """The fusion layers with one expert, and the final norm: (B, S, D)."""
        config = self.config
        stream = self.encoder.run(
            stream, (expert,), config.num_lower_layers, config.num_hidden_layers, trace or Trace()
        )
        return self.encoder.norm(stream.states)

    def joint_input(self, stream: Stream) -> Stream:
        """What a joint pass wants of one modality: lower states, or embeddings if the lower layers attend jointly."""
        return stream if self.config.joint_attention_in_lower_layers else self.lower(stream)

    def fuse(self, joint: Stream, trace: Trace | None = None) -> torch.Tensor:
        """The rest of a joint pass over joined `joint_input`s: (B, T + F, D)."""
        trace = trace or Trace()
        if self.config.joint_attention_in_lower_layers:
            joint = joint._replace(states=joint.embedded)
            joint = self.encoder.run(joint, ("language", "vision"), 0, self.config.num_lower_layers, trace)
        return self.upper(joint, "vision_language", trace)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> VlmoModelOutput:
        """
        A text pass, an image pass, or a joint pass, by what is given.

        Shapes:
            input_ids, attention_mask (B, T); pixel_values (B, 3, image_size, image_size) -> see `VlmoModelOutput`
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("expected input_ids, pixel_values or both; got neither.")
        want_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        want_weights = self.config.output_attentions if output_attentions is None else output_attentions
        text_trace, image_trace = (Trace(bool(want_states or want_weights)) for _ in range(2))
        text = None if input_ids is None else self.text_stream(input_ids, attention_mask)
        image = None if pixel_values is None else self.image_stream(pixel_values)

        if text is not None and image is not None:
            embedded = text.join(image).embedded
            if self.config.joint_attention_in_lower_layers:
                joint, trace = text.join(image), text_trace
            else:
                joint = self.lower(text, text_trace).join(self.lower(image, image_trace))
                trace = text_trace.join(image_trace)
            states = self.fuse(joint, trace)
        else:
            stream, expert = (image, "vision") if text is None else (text, "language")
            embedded, trace = stream.embedded, text_trace
            states = self.upper(self.lower(stream, trace), expert, trace)

        output = VlmoModelOutput(
            last_hidden_state=states,
            pooler_output=self.pooler(states),
            hidden_states=(embedded, *trace.hidden_states) if want_states else None,
            attentions=tuple(trace.attentions) if want_weights else None,
        )
        return output


class VlmoContrastiveHead(nn.Module):
    """Image-text contrast: a projection for each modality and a learned temperature; pre-training has a second set for
    the outputs of the `vision_language` experts ("vl" branch)."""

    def __init__(self, config: VlmoConfig, two_branches: bool):
        super().__init__()
        self.two_branches = two_branches

        def projection() -> nn.Linear:
            return nn.Linear(config.hidden_size, config.hidden_size, bias=False)

        self.image_projection, self.text_projection = projection(), projection()
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        if two_branches:
            self.image_vl_projection, self.text_vl_projection = projection(), projection()
            self.logit_vl_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))

    def similarity(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """(B, D) and (B, D) -> (B images, B texts)"""
        return scale.exp() * image_embeds @ text_embeds.t()


def embed(projection: nn.Linear, hidden_states: torch.Tensor) -> torch.Tensor:
    """Projected first token of unit length: (B, S, D) -> (B, D)"""
    return nn.functional.normalize(projection(hidden_states[:, 0]), dim=-1)


def contrastive_loss(logits: torch.Tensor) -> torch.Tensor:
    """Mean of both directions' cross-entropies with the diagonal as target: (B, B) -> ()"""
    target = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.t(), target)) / 2


def draw_negatives(logits: torch.Tensor) -> torch.Tensor:
    """For each row one other row, drawn in proportion to exp(logit): (B, B) -> (B,)"""
    if len(logits) < 2:
        raise ValueError("image-text matching draws its negatives from the batch: expected at least 2 rows, got 1.")
    others = logits.detach().float().fill_diagonal_(-torch.inf)
    return torch.multinomial(others.softmax(dim=-1), 1).squeeze(1)


class VlmoMlmHead(nn.Module):
    """Predicts the masked words; the decoder is not tied to the word embeddings."""

    def __init__(self, config: VlmoConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.text_layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, V)"""
        hidden_states = self.layer_norm(nn.functional.gelu(self.dense(hidden_states)))
        return self.decoder(hidden_states) + self.bias


class VlmoForPreTraining(VlmoPreTrainedModel):
    """Contrast (ITC), matching (ITM) and masked words (MLM), section 4.1."""

    def __init__(self, config: VlmoConfig):
        super().__init__(config)
        self.vlmo = VlmoModel(config)
        self.itc = VlmoContrastiveHead(config, two_branches=True)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.mlm_head = VlmoMlmHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        mlm_input_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        negative_image_index: torch.LongTensor | None = None,
        negative_text_index: torch.LongTensor | None = None,
        **kwargs,
    ) -> VlmoForPreTrainingOutput:
        """
        A training step if `labels` are given, else the outputs of the three heads for matched pairs.

        Each single-modality lower stack runs once: contrast, matched and unmatched pairs share it (the image's also
        serves the masked text), which is the same loss and gradient as separate passes, except that in training mode
        they also share the draws of dropout and stochastic depth. `joint_attention_in_lower_layers` leaves nothing to
        share in joint passes.

        Args:
            mlm_input_ids: ids with masked words; `labels` their true ids and -100 elsewhere. Without labels the MLM
                logits are those of `input_ids`.
            negative_image_index, negative_text_index: rows of the batch to pair each text and each image with; drawn by
                contrastive similarity when absent.

        Shapes:
            input_ids, attention_mask, mlm_input_ids, labels (B, T); pixel_values (B, 3, image_size, image_size);
            negative indices (B,) -> see `VlmoForPreTrainingOutput`
        """
        base = self.vlmo
        text = base.text_stream(input_ids, attention_mask)
        image = base.image_stream(pixel_values)
        text_lower, image_lower = base.lower(text), base.lower(image)
        output = self.contrast(text_lower, image_lower, with_loss=labels is not None)

        joint_attention = self.config.joint_attention_in_lower_layers
        text, image = (text, image) if joint_attention else (text_lower, image_lower)
        if labels is None:
            states = base.fuse(text.join(image))
            output.itm_logits = self.itm_head(base.pooler(states))
            output.mlm_logits = self.mlm_head(states[:, : text.text_tokens])
            return output
        if mlm_input_ids is None:
            raise ValueError("labels were given without mlm_input_ids, the text in which those words are masked.")

        if negative_image_index is None:
            negative_image_index = draw_negatives(output.logits_per_text)
        if negative_text_index is None:
            negative_text_index = draw_negatives(output.logits_per_image)
        masked = base.joint_input(base.text_stream(mlm_input_ids, attention_mask))
        wrong_image, wrong_text = (
            text.join(image.take(negative_image_index)),
            text.take(negative_text_index).join(image),
        )
        states = base.fuse(stack_streams([text.join(image), wrong_image, wrong_text, masked.join(image)]))

        rows = len(input_ids)
        output.itm_logits = self.itm_head(base.pooler(states[: 3 * rows]))
        matches = torch.zeros(3 * rows, dtype=torch.long, device=states.device)
        matches[:rows] = 1
        output.itm_loss = nn.functional.cross_entropy(output.itm_logits, matches)
        output.mlm_logits = self.mlm_head(states[3 * rows :, : text.text_tokens])
        output.mlm_loss = masked_cross_entropy(output.mlm_logits, labels)
        output.loss = output.itc_loss + output.itm_loss + self.config.mlm_loss_weight * output.mlm_loss
        return output

    def contrast(self, text: Stream, image: Stream, with_loss: bool) -> VlmoForPreTrainingOutput:
        """ITC on the outputs of the modality's own experts, and for the loss also of the `vision_language` experts."""
        base, head = self.vlmo, self.itc
        text_states, image_states = base.upper(text, "language"), base.upper(image, "vision")
        text_embeds = embed(head.text_projection, text_states)
        image_embeds = embed(head.image_projection, image_states)
        logits = head.similarity(image_embeds, text_embeds, head.logit_scale)
        output = VlmoForPreTrainingOutput(
            logits_per_image=logits, logits_per_text=logits.t(), image_embeds=image_embeds, text_embeds=text_embeds
        )
        if with_loss:
            if self.config.expert_modules:  # else the experts are one, and so are their outputs
                text_states, image_states = base.upper(text, "vision_language"), base.upper(image, "vision_language")
            image_vl, text_vl = (
                embed(head.image_vl_projection, image_states),
                embed(head.text_vl_projection, text_states),
            )
            loss_vl = contrastive_loss(head.similarity(image_vl, text_vl, head.logit_vl_scale))
            output.itc_loss = (self.config.itc_loss_weight * contrastive_loss(logits) + loss_vl) / 2
        return output

    def get_output_embeddings(self) -> nn.Linear:
        return self.mlm_head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.mlm_head.decoder = value
        self.mlm_head.bias = nn.Parameter(
            nn.functional.pad(self.mlm_head.bias.data, (0, value.out_features - len(self.mlm_head.bias)))
        )


def masked_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over labels other than -100; 0 where a batch has none. (B, T, V), (B, T) -> ()"""
    total = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    return total / (labels != -100).sum().clamp(min=1)


class VlmoForImageAndTextRetrieval(VlmoPreTrainedModel):
    """Image and text embeddings for retrieval by cosine similarity, each from a pass over its own modality."""

    def __init__(self, config: VlmoConfig):
        super().__init__(config)
        self.vlmo = VlmoModel(config)
        self.itc = VlmoContrastiveHead(config, two_branches=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        return_loss: bool | None = None,
        **kwargs,
    ) -> VlmoRetrievalOutput:
        """
        Embeddings of what is given, similarities if both are, and the contrastive loss if it is asked for.

        Shapes:
            input_ids, attention_mask (texts, T); pixel_values (images, 3, image_size, image_size) -> see
            `VlmoRetrievalOutput`
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("expected input_ids, pixel_values or both; got neither.")
        base, head, output = self.vlmo, self.itc, VlmoRetrievalOutput()
        if input_ids is not None:
            states = base.upper(base.lower(base.text_stream(input_ids, attention_mask)), "language")
            output.text_embeds = embed(head.text_projection, states)
        if pixel_values is not None:
            states = base.upper(base.lower(base.image_stream(pixel_values)), "vision")
            output.image_embeds = embed(head.image_projection, states)
        if input_ids is not None and pixel_values is not None:
            output.logits_per_image = head.similarity(output.image_embeds, output.text_embeds, head.logit_scale)
            output.logits_per_text = output.logits_per_image.t()
        if return_loss:
            output.loss = contrastive_loss(output.logits_per_image)
        return output


class VlmoClassifier(nn.Module):
    def __init__(self, config: VlmoConfig, inputs: int):
        super().__init__()
        width = 2 * config.hidden_size
        self.dense = nn.Linear(inputs * config.hidden_size, width)
        self.layer_norm = nn.LayerNorm(width, eps=config.classifier_layer_norm_eps)
        self.decoder = nn.Linear(width, config.num_labels)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """(B, inputs * D) -> (B, num_labels)"""
        return self.decoder(nn.functional.gelu(self.layer_norm(self.dense(pooled))))


class VlmoForQuestionAnswering(VlmoPreTrainedModel):
    """Visual question answering as classification over the frequent answers (3129 in the paper)."""

    def __init__(self, config: VlmoConfig):
        super().__init__(config)
        self.vlmo = VlmoModel(config)
        self.classifier = VlmoClassifier(config, inputs=1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> VlmoClassifierOutput:
        """
        The loss is the binary cross-entropy summed over answers, mean over rows (section 4.1).

        Shapes:
            input_ids, attention_mask (B, T); pixel_values (B, 3, image_size, image_size);
            labels (B, num_labels) soft scores or (B,) answer ids -> see `VlmoClassifierOutput`
        """
        pooled = self.vlmo(input_ids, attention_mask, pixel_values, return_dict=True).pooler_output
        output = VlmoClassifierOutput(logits=self.classifier(pooled))
        if labels is not None:
            if labels.dim() == 1:
                labels = nn.functional.one_hot(labels, self.config.num_labels)
            loss = nn.functional.binary_cross_entropy_with_logits(output.logits, labels.to(output.logits.dtype))
            output.loss = loss * self.config.num_labels
        return output


class VlmoForImagesAndTextClassification(VlmoPreTrainedModel):
    """Is a sentence true of a pair of images (NLVR2)? One joint pass an image; the text's lower stack runs once."""

    num_images = 2

    def __init__(self, config: VlmoConfig):
        super().__init__(config)
        self.vlmo = VlmoModel(config)
        self.classifier = VlmoClassifier(config, inputs=self.num_images)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> VlmoClassifierOutput:
        """
        Shapes:
            input_ids, attention_mask (B, T); pixel_values (B, 2, 3, image_size, image_size); labels (B,)
            -> see `VlmoClassifierOutput`
        """
        base = self.vlmo
        if pixel_values.dim() != 5 or pixel_values.shape[1] != self.num_images:
            raise ValueError(f"expected pixel_values of shape (B, 2, 3, H, W), got {tuple(pixel_values.shape)}.")
        text = base.joint_input(base.text_stream(input_ids, attention_mask))
        types = range(1, 1 + self.num_images)
        images = [base.joint_input(base.image_stream(pixel_values[:, i - 1], image_type=i)) for i in types]
        pooled = base.pooler(base.fuse(stack_streams([text.join(image) for image in images])))
        pooled = torch.cat(pooled.chunk(self.num_images), dim=-1)  # (B, 2D)
        output = VlmoClassifierOutput(logits=self.classifier(pooled))
        if labels is not None:
            output.loss = nn.functional.cross_entropy(output.logits, labels)
        return output


VlmoPreTrainedModel.register_for_auto_class()  # so for every class of this file; see `AUTO_MAP`

__all__ = [
    "VlmoForImageAndTextRetrieval",
    "VlmoForImagesAndTextClassification",
    "VlmoForPreTraining",
    "VlmoForQuestionAnswering",
    "VlmoModel",
    "VlmoPreTrainedModel",
]
