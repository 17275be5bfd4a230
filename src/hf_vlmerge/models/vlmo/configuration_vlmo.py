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
"""Configuration of VLMo-style models: one class for the five architectures of Sung et al. 2023 (section 3)."""

import math

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

EXPERT_MODULES = ("attention", "ffn", "layer_norm")
AUTO_MAP = {  # Auto class -> our class, as config.json names it for those who do not have the package
    "AutoConfig": "configuration_vlmo.VlmoConfig",
    "AutoModel": "modeling_vlmo.VlmoModel",
    "AutoModelForPreTraining": "modeling_vlmo.VlmoForPreTraining",
    "AutoModelForVisualQuestionAnswering": "modeling_vlmo.VlmoForQuestionAnswering",
    "AutoModelForZeroShotImageClassification": "modeling_vlmo.VlmoForImageAndTextRetrieval",
}


@strict
class VlmoConfig(PreTrainedConfig):
    r"""
    Sizes and switches of a VLMo-style model; the defaults are the base size of the papers at 224 pixels.

    Args:
        expert_modules (`list[str]`): modules that have one copy a modality, of "attention", "ffn", "layer_norm". All
            three make the modality-specific architecture, one of them a custom one (attention brings its norm along,
            and so does the FFN), none the modality-agnostic one.
        num_fusion_layers (`int`): the top M layers, which have a `vision_language` expert and see both modalities.
        joint_attention_in_lower_layers (`bool`): in a joint pass the lower layers attend over both modalities
            (Microsoft's VLMo and the released custom-layer-norm form) in place of each modality on its own (the paper).
        num_text_positions (`int`): S of the table of relative positions, which has (2g-1)^2 + 5 + 2S rows for a grid of
            g x g patches. The longest text is S tokens.
        max_text_length (`int`): tokens that processors pad and truncate to.
        hidden_dropout_prob (`float`): dropout after the text embeddings.
        drop_path_rate (`float`): stochastic depth of the last layer; layer i of N has rate * i / (N - 1).
        num_modality_types (`int`): rows of the modality embedding: text, image (and second image, for NLVR2).
        itc_loss_weight, mlm_loss_weight (`float`): factors on the plain contrastive loss and on the MLM loss
            (0.25 in the paper); the image-text matching loss has weight 1.
        expert_layout (`dict`): what a merging tool has to know: the names of the experts as they stand in tensor
            names, the name that their merge gets, and the updates that the merged model's configuration needs.

    Example:

    ```python
    >>> from hf_vlmerge import VlmoConfig, VlmoModel

    >>> model = VlmoModel(VlmoConfig(expert_modules=[], hidden_size=64, num_attention_heads=4, num_hidden_layers=3))
    ```
    """

    model_type = "vlmo"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    max_text_length: int = 40
    num_text_positions: int = 196
    num_fusion_layers: int = 2
    expert_modules: list[str] | tuple[str, ...] = EXPERT_MODULES
    joint_attention_in_lower_layers: bool = False
    num_modality_types: int = 2
    hidden_dropout_prob: float | int = 0.1
    drop_path_rate: float | int = 0.1
    layer_norm_eps: float = 1e-6
    text_layer_norm_eps: float = 1e-12
    classifier_layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    layer_scale_init_value: float | int = 0.1
    logit_scale_init_value: float | int = math.log(1 / 0.07)
    itc_loss_weight: float | int = 1.0
    mlm_loss_weight: float | int = 0.25
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False
    expert_layout: dict | None = None

    def __post_init__(self, **kwargs):
        self.expert_modules = list(self.expert_modules)
        if self.expert_layout is None:
            self.expert_layout = {
                "experts": ["vision", "language", "vision_language"],
                "merged": "shared",
                "config": {"expert_modules": []},
            }
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As for every configuration, with all of `AUTO_MAP`: the library alone names one Auto class, or the code of
        the repository that the model was loaded from."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def grid_size(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.patch_size

    @property
    def num_lower_layers(self) -> int:
        """Layers below the fusion layers: they have a vision and a language expert only."""
        return self.num_hidden_layers - self.num_fusion_layers

    def validate_expert_modules(self):
        unknown = [name for name in self.expert_modules if name not in EXPERT_MODULES]
        if unknown:
            raise ValueError(f"expert_modules has {unknown[0]!r}; expected a subset of {list(EXPERT_MODULES)}.")

    def validate_sizes(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.")
        if not 0 <= self.num_fusion_layers <= self.num_hidden_layers:
            raise ValueError(
                f"num_fusion_layers is {self.num_fusion_layers}; expected 0 to {self.num_hidden_layers}, the layers."
            )


VlmoConfig.register_for_auto_class()  # the source files go along with whatever is saved

__all__ = ["VlmoConfig"]
