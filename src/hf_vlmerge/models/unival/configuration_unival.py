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
"""Configuration of UnIVAL (Shukor et al. 2023): sizes of the transformer and of its three convolutional towers."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

TOWERS = ("image", "video", "audio")
AUTO_MAP = {  # Auto class -> our class, as config.json names it for those who do not have the package
    "AutoConfig": "configuration_unival.UnivalConfig",
    "AutoModel": "modeling_unival.UnivalModel",
    "AutoModelForImageTextToText": "modeling_unival.UnivalForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_unival.UnivalForConditionalGeneration",
}


@strict
class UnivalConfig(PreTrainedConfig):
    r"""
    Sizes and switches of a UnIVAL model; the defaults are those of every released model.

    Args:
        encoder_layers, decoder_layers (`int`): layers of each stack.
        max_position_embeddings (`int`): tokens of the longest text; the tables have two spare rows more, as stored.
        text_bucket_size (`int`): b of the relative text positions; each layer's table has 2b - 1 rows.
        text_bucket_distance (`int`): token distance that is in the last bucket, whatever the table's length.
        grid_size (`int`): side G of the grid of image, video and audio positions. Position tables have G^2 + 1 rows,
            relative ones (2G - 1)^2 + 3. A feature map may be at most G x G.
        attention_scale_factor (`float`): f in 1 / sqrt(f * head size), the factor of all dot products.
        code_image_size (`int`): side in pixels of generated images; a code stands for 8 x 8 pixels.
        hidden_dropout_prob (`float`): dropout after embeddings, attention and FFN.
        drop_path_rate (`float`): stochastic depth of the last layer of each stack; layer i of N has rate * i / (N - 1).
        towers (`list[str]`): which convolutional encoders exist, of "image", "video" and "audio".
        image_widths, image_depths (`list[int]`): inner width and blocks of each stage of the ResNet; a stage gives
            4 times its width.
        video_widths, video_depths (`list[int]`): the same of the 3-D ResNeXt; a stage gives twice its width.
        video_cardinality (`int`): groups of its 3 x 3 x 3 convolutions.
        image_stem_width, video_stem_width (`int`): channels of the first convolution.
        audio_widths (`list[int]`): channels of each block of the audio network.
        audio_sample_rate, audio_window, audio_hop, audio_mel_bins, audio_min_frequency, audio_max_frequency: the
            log-mel front end; Hz and samples. The released audio models have a hop of 200.
        audio_dropout (`float`): dropout after every audio block but the last.
        audio_time_stripe, audio_mel_stripe (`int`): longest stripe of frames and of mel bins that is blanked in
            training; there are two of each kind.

    Example:

    ```python
    >>> from hf_vlmerge import UnivalConfig, UnivalForConditionalGeneration

    >>> config = UnivalConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_attention_heads=4, towers=[])
    >>> model = UnivalForConditionalGeneration(config)
    ```
    """

    model_type = "unival"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # its name before transformers 5.24, and since
    attribute_map = {
        "num_hidden_layers": "encoder_layers",
        "encoder_attention_heads": "num_attention_heads",
        "decoder_attention_heads": "num_attention_heads",
    }

    vocab_size: int = 59457
    hidden_size: int = 768
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 1024
    text_bucket_size: int = 256
    text_bucket_distance: int = 1024
    grid_size: int = 42
    attention_scale_factor: float | int = 2.0
    code_image_size: int = 256
    hidden_dropout_prob: float | int = 0.1
    drop_path_rate: float | int = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True

    towers: list[str] | tuple[str, ...] = TOWERS
    image_stem_width: int = 64
    image_widths: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    image_depths: list[int] | tuple[int, ...] = (3, 4, 23, 3)
    video_stem_width: int = 64
    video_widths: list[int] | tuple[int, ...] = (128, 256, 512, 1024)
    video_depths: list[int] | tuple[int, ...] = (3, 4, 23, 3)
    video_cardinality: int = 32
    audio_widths: list[int] | tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    audio_sample_rate: int = 48000
    audio_window: int = 1024
    audio_hop: int = 200
    audio_mel_bins: int = 64
    audio_min_frequency: float | int = 50
    audio_max_frequency: float | int = 14000
    audio_dropout: float | int = 0.2
    audio_time_stripe: int = 64
    audio_mel_stripe: int = 8

    is_encoder_decoder: bool = True
    bos_token_id: int | None = 0
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        for name in ("towers", "image_widths", "image_depths", "video_widths", "video_depths", "audio_widths"):
            setattr(self, name, list(getattr(self, name)))
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As for every configuration, with all of `AUTO_MAP`: the library alone names one Auto class, or the code of
        the repository that the model was loaded from."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def code_grid_size(self) -> int:
        """Codes along one side of a generated image."""
        return self.code_image_size // 8

    def validate_towers(self):
        unknown = [name for name in self.towers if name not in TOWERS]
        if unknown:
            raise ValueError(f"towers has {unknown[0]!r}; expected a subset of {list(TOWERS)}.")

    def validate_sizes(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )
        if self.text_bucket_size % 2:
            raise ValueError(f"text_bucket_size is {self.text_bucket_size}; expected an even number.")
        if self.text_bucket_distance <= self.text_bucket_size // 2 + 1:
            raise ValueError(
                f"text_bucket_distance is {self.text_bucket_distance}; expected more than half of text_bucket_size "
                f"{self.text_bucket_size} and 1."
            )
        if self.code_image_size % 8 or self.code_grid_size > self.grid_size:
            raise ValueError(
                f"code_image_size is {self.code_image_size}; expected a multiple of 8, at most 8 * grid_size = "
                f"{8 * self.grid_size}."
            )
        for tower in ("image", "video"):
            widths, depths = getattr(self, f"{tower}_widths"), getattr(self, f"{tower}_depths")
            if len(widths) != len(depths):
                raise ValueError(f"{tower}_widths has {len(widths)} stages, {tower}_depths has {len(depths)}.")
        if "video" in self.towers and any(width % 32 for width in self.video_widths):
            raise ValueError(f"video_widths are {self.video_widths}; expected multiples of 32.")


UnivalConfig.register_for_auto_class()  # the source files go along with whatever is saved

__all__ = ["UnivalConfig"]
