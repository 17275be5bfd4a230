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
"""Text and images for VLMo-style models in one call."""

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin


class VlmoProcessor(ProcessorMixin):
    """
    A `VlmoImageProcessor` and a BERT WordPiece tokenizer (`bert-base-uncased` for the published models).

    Args:
        image_processor: resizes and normalises.
        tokenizer: lower-cases, splits and adds [CLS] and [SEP].
        max_text_length (`int`): tokens that a text is cut to, and padded to with `padding="max_length"`.
    """

    def __init__(self, image_processor=None, tokenizer=None, max_text_length: int = 40, **kwargs):
        self.max_text_length = max_text_length
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(
        self, images=None, text=None, padding=True, truncation=True, max_length=None, return_tensors="pt", **kwargs
    ):
        """
        Args:
            images: one image or a list (Pillow, NumPy, torch); may be absent.
            text: a string or a list of strings; may be absent.
            padding, truncation, max_length, return_tensors: as for tokenizers. Other keywords go to the image
                processor.

        Shapes:
            -> input_ids, attention_mask (B, T); pixel_values (B, 3, H, W)

        Raises:
            ValueError: neither images nor text were given.
        """
        if images is None and text is None:
            raise ValueError("expected images, text or both; got neither.")
        data = {}
        if text is not None:
            encoded = self.tokenizer(
                text,
                padding=padding,
                truncation=truncation,
                max_length=max_length or self.max_text_length,
                return_tensors=return_tensors,
                return_token_type_ids=False,
            )
            data.update(encoded)
        if images is not None:
            data.update(self.image_processor(images, return_tensors=return_tensors, **kwargs))
        return BatchFeature(data)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


VlmoProcessor.register_for_auto_class()

__all__ = ["VlmoProcessor"]
