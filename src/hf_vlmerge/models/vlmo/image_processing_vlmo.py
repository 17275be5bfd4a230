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
"""Images for VLMo-style models: resized straight to a square (the aspect ratio is not kept), scaled to [-1, 1]."""

from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN
from transformers.image_utils import IMAGENET_STANDARD_STD
from transformers.image_utils import PILImageResampling


class VlmoImageProcessor(PilBackend):
    """Bicubic resize with Pillow to `size`, then (x / 255 - 0.5) / 0.5; gives `pixel_values` (B, 3, height, width)."""

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 224, "width": 224}
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True


VlmoImageProcessor.register_for_auto_class()

__all__ = ["VlmoImageProcessor"]
