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
"""Images for UnIVAL: resized straight to a square (the aspect ratio is not kept), scaled to [-1, 1]."""

from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN
from transformers.image_utils import IMAGENET_STANDARD_STD
from transformers.image_utils import PILImageResampling

from .media_unival import is_array
from .media_unival import load_image


class UnivalImageProcessor(PilBackend):
    """
    Bicubic resize with Pillow to `size`, then (x / 255 - 0.5) / 0.5; gives `pixel_values` (B, 3, height, width).

    The mean and deviation are 0.5, not those of ImageNet. 480 pixels is the side of the finetuned models (384 in the
    first stages of pre-training; 512 where boxes are read or written: `UnivalProcessor` chooses).
    Images may be whatever `media_unival.load_image` takes.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 480, "width": 480}
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def fetch_images(self, image_url_or_urls):
        """Decode one image, a batch as an array (B, H, W, 3) or (B, 3, H, W), or a list; lists keep their nesting."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(each) for each in image_url_or_urls]
        if is_array(image_url_or_urls) and image_url_or_urls.ndim == 4:
            return [self.fetch_images(each) for each in image_url_or_urls]
        return load_image(image_url_or_urls)


UnivalImageProcessor.register_for_auto_class()

__all__ = ["UnivalImageProcessor"]
