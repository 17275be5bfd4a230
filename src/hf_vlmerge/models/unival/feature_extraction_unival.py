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
"""Sounds for UnIVAL: waveforms of one length; the spectrogram is computed inside the network."""

import torch
from torch import Tensor
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature

from .media_unival import generator_of
from .media_unival import load_audio

INT16_SCALE = 32767.0


class UnivalFeatureExtractor(SequenceFeatureExtractor):
    """
    Mono, resampled, clipped to [-1, 1], rounded to 16 bits (truncating), and brought to `num_samples`: longer sounds
    are cropped, shorter ones repeated as often as they fit and padded with zeros.

    Args:
        feature_size (`int`): 1, a waveform.
        sampling_rate (`int`): samples a second.
        padding_value (`float`): fills what repetition does not.
        num_samples (`int`): the length; 10 s by default.
    """

    model_input_names = ["input_values"]

    def __init__(self, feature_size=1, sampling_rate=48000, padding_value=0.0, num_samples=480000, **kwargs):
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.num_samples = num_samples

    def __call__(self, raw_speech, sampling_rate=None, generator=None, return_tensors="pt") -> BatchFeature:
        """
        Args:
            raw_speech: one sound or a list of them, as `media_unival.load_audio` takes them. An array, and a list of
                numbers, is one sound.
            sampling_rate: of arrays; None means the extractor's own. Files say theirs.
            generator: where a longer sound is cropped at random (`torch.Generator` or a seed); without it the middle
                is kept.

        Shapes:
            -> input_values (B, num_samples)

        Raises:
            ValueError: a sound is empty, not finite or cannot be decoded.
        """
        generator = generator_of(generator)
        sounds = list(raw_speech) if isinstance(raw_speech, (list, tuple)) else [raw_speech]
        if sounds and isinstance(sounds[0], (float, int)):
            sounds = [sounds]
        if not sounds:
            raise ValueError("expected at least one sound; got an empty list.")
        rows = [self.fit(load_audio(sound, self.sampling_rate, sampling_rate), generator) for sound in sounds]
        return BatchFeature({"input_values": torch.stack(rows)}, tensor_type=return_tensors)

    def fit(self, wave: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Clip, round and bring to length: (samples,) -> (num_samples,)."""
        wave = (wave.clamp(-1.0, 1.0) * INT16_SCALE).to(torch.int16).float() / INT16_SCALE
        spare = wave.numel() - self.num_samples
        if spare > 0:
            start = spare // 2 if generator is None else int(torch.randint(spare + 1, (), generator=generator))
            return wave[start : start + self.num_samples]
        wave = wave.repeat(self.num_samples // wave.numel())
        return torch.nn.functional.pad(wave, (0, self.num_samples - wave.numel()), value=self.padding_value)


UnivalFeatureExtractor.register_for_auto_class()

__all__ = ["UnivalFeatureExtractor"]
