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
"""The three convolutional towers of UnIVAL (section 3): ResNet-101 for images, 3-D ResNeXt-101 for clips, and Cnn14
(PANN) with its log-mel front end for sounds. Each gives a feature map; no pooling over it and no classifier.

B = batch, C = channels of the last stage, F = frames of a clip, T = frames of a spectrogram, M = mel bins,
t, h, w, f = sides of a feature map.
"""

import torch
from torch import nn

from .configuration_unival import UnivalConfig


class UnivalBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions (or their 3-D forms) around a shortcut; the middle one carries the stride."""

    def __init__(self, conv: type, norm: type, inputs: int, inner: int, outputs: int, stride: int, groups: int):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, inner, 1, bias=False), norm(inner)
        self.conv2 = conv(inner, inner, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = norm(inner)
        self.conv3, self.bn3 = conv(inner, outputs, 1, bias=False), norm(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.ModuleList([conv(inputs, outputs, 1, stride=stride, bias=False), norm(outputs)])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        shortcut = features
        features = nn.functional.relu(self.bn1(self.conv1(features)))
        features = nn.functional.relu(self.bn2(self.conv2(features)))
        features = self.bn3(self.conv3(features))
        if self.downsample is not None:
            conv, norm = self.downsample
            shortcut = norm(conv(shortcut))
        return nn.functional.relu(features + shortcut)


def stage(conv: type, norm: type, inputs: int, inner: int, outputs: int, blocks: int, stride: int, groups: int = 1):
    """The bottlenecks of one stage; the first one changes the shape."""
    return nn.ModuleList(
        UnivalBottleneck(conv, norm, outputs if i else inputs, inner, outputs, 1 if i else stride, groups)
        for i in range(blocks)
    )


class UnivalImageTower(nn.Module):
    """ResNet "v1.5" with all four stages: stride 32 (He et al. 2016)."""

    expansion = 4

    def __init__(self, config: UnivalConfig):
        super().__init__()
        width = config.image_stem_width
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.num_stages = len(config.image_widths)
        for i, (inner, blocks) in enumerate(zip(config.image_widths, config.image_depths, strict=True)):
            outputs = inner * self.expansion
            layer = stage(nn.Conv2d, nn.BatchNorm2d, width, inner, outputs, blocks, 2 if i else 1)
            self.add_module(f"layer{i + 1}", layer)
            width = outputs
        self.out_channels = width

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Shapes:
            pixel_values (B, 3, H, W) -> (B, C, ceil(H / 32), ceil(W / 32))
        """
        features = nn.functional.relu(self.bn1(self.conv1(pixel_values.to(self.conv1.weight.dtype))))
        features = nn.functional.max_pool2d(features, 3, stride=2, padding=1)
        for i in range(self.num_stages):
            for block in self.get_submodule(f"layer{i + 1}"):
                features = block(features)
        return features


class UnivalVideoTower(nn.Module):
    """3-D ResNeXt: stride 32 in space, 16 in time (Hara et al. 2018)."""

    expansion = 2

    def __init__(self, config: UnivalConfig):
        super().__init__()
        width, groups = config.video_stem_width, config.video_cardinality
        self.conv1 = nn.Conv3d(3, width, 7, stride=(1, 2, 2), padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.num_stages = len(config.video_widths)
        for i, (planes, blocks) in enumerate(zip(config.video_widths, config.video_depths, strict=True)):
            inner, outputs = groups * (planes // 32), planes * self.expansion
            layer = stage(nn.Conv3d, nn.BatchNorm3d, width, inner, outputs, blocks, 2 if i else 1, groups)
            self.add_module(f"layer{i + 1}", layer)
            width = outputs
        self.out_channels = width

    def forward(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """
        Shapes:
            pixel_values_videos (B, F, 3, H, W) -> (B, C, ceil(F / 16), ceil(H / 32), ceil(W / 32))
        """
        clips = pixel_values_videos.transpose(1, 2).to(self.conv1.weight.dtype)
        features = nn.functional.relu(self.bn1(self.conv1(clips)))
        features = nn.functional.max_pool3d(features, 3, stride=2, padding=1)
        for i in range(self.num_stages):
            for block in self.get_submodule(f"layer{i + 1}"):
                features = block(features)
        return features


def slaney_mel(hertz: torch.Tensor) -> torch.Tensor:
    """Frequency in mel on Slaney's scale: linear below 1000 Hz, logarithmic above."""
    octave = torch.log(hertz.clamp(min=1000.0) / 1000.0) * (27 / torch.log(hertz.new_tensor(6.4)))
    return torch.where(hertz < 1000.0, hertz * 3 / 200, 15 + octave)


def slaney_hertz(mel: torch.Tensor) -> torch.Tensor:
    """The inverse of `slaney_mel`."""
    above = 1000.0 * torch.exp((mel.clamp(min=15.0) - 15) * (torch.log(mel.new_tensor(6.4)) / 27))
    return torch.where(mel < 15.0, mel * 200 / 3, above)


def mel_matrix(config: UnivalConfig) -> torch.Tensor:
    """Triangular filters of equal area on Slaney's mel scale: (window / 2 + 1, M), float32."""
    ends = torch.tensor([config.audio_min_frequency, config.audio_max_frequency], dtype=torch.float64)
    first, last = slaney_mel(ends)
    steps = torch.arange(config.audio_mel_bins + 2, dtype=torch.float64) / (config.audio_mel_bins + 1)
    corners = slaney_hertz(first + (last - first) * steps)
    bins = config.audio_window // 2 + 1
    frequency = torch.arange(bins, dtype=torch.float64)[:, None] * (config.audio_sample_rate / config.audio_window)
    left, middle, right = corners[:-2], corners[1:-1], corners[2:]
    triangles = torch.minimum((frequency - left) / (middle - left), (right - frequency) / (right - middle))
    # rounded before and after the division by the area, as in the matrices that the released models were trained with
    return (triangles.clamp(min=0).float() * (2 / (right - left))).float()


def fourier_kernels(window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and imaginary part of the Fourier basis under a periodic Hann window: two of (window / 2 + 1, 1, window)."""
    sample, frequency = torch.arange(window), torch.arange(window // 2 + 1)
    # reduced as an integer: the sine of a large phase would not be exact
    phase = (frequency[:, None] * sample % window).double() * (2 * torch.pi / window)
    hann = 0.5 - 0.5 * torch.cos(sample.double() * (2 * torch.pi / window))
    return (torch.cos(phase) * hann)[:, None].float(), (-torch.sin(phase) * hann)[:, None].float()


class UnivalFourier(nn.Conv1d):
    """The real (0) or imaginary (1) part of a short-time Fourier transform. Its kernels are part of a checkpoint, but
    never get a gradient (`requires_grad` would not survive `from_pretrained`)."""

    def __init__(self, window: int, hop: int, part: int):
        super().__init__(1, window // 2 + 1, window, stride=hop, bias=False)
        self.part = part

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        """(B, 1, samples) float32 -> (B, window / 2 + 1, T)"""
        return nn.functional.conv1d(waveform, self.weight.detach().float(), stride=self.stride)


class UnivalSpectrogram(nn.Module):
    """Power of each frequency in each frame, mirrored at the ends of the sound."""

    def __init__(self, config: UnivalConfig):
        super().__init__()
        self.margin = config.audio_window // 2
        self.conv_real = UnivalFourier(config.audio_window, config.audio_hop, 0)
        self.conv_imag = UnivalFourier(config.audio_window, config.audio_hop, 1)

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        """(B, samples) float32 -> (B, T, window / 2 + 1) with T = samples // hop + 1"""
        padded = nn.functional.pad(waveform[:, None], (self.margin, self.margin), mode="reflect")
        return (self.conv_real(padded).square() + self.conv_imag(padded).square()).transpose(1, 2)


class UnivalAudioBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and ReLU, then average pooling by 2."""

    def __init__(self, inputs: int, outputs: int, pooling: int, dropout: float):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, c, t, f) -> (B, c', t // pooling, f // pooling)"""
        features = nn.functional.relu(self.bn1(self.conv1(features)))
        features = nn.functional.relu(self.bn2(self.conv2(features)))
        return self.dropout(nn.functional.avg_pool2d(features, self.pooling))


def blank_stripes(spectrogram: torch.Tensor, dim: int, longest: int, stripes: int = 2) -> torch.Tensor:
    """Zeroes random stripes of up to `longest` - 1 places along `dim`, drawn for each row (SpecAugment)."""
    rows, size = spectrogram.shape[0], spectrogram.shape[dim]
    longest = min(longest, size)
    if longest < 1:
        return spectrogram
    device, shape = spectrogram.device, [rows] + [1] * (spectrogram.dim() - 1)
    shape[dim] = size
    place = torch.arange(size, device=device)
    for _ in range(stripes):
        length = torch.randint(longest, (rows, 1), device=device)
        start = (torch.rand(rows, 1, device=device) * (size - length)).long()
        blank = (place >= start) & (place < start + length)  # (B, size)
        spectrogram = spectrogram.masked_fill(blank.view(shape), 0.0)
    return spectrogram


class UnivalAudioTower(nn.Module):
    """Cnn14 on log-mel spectrograms, from the raw waveform on (Kong et al. 2020): stride 32 in time and mel."""

    def __init__(self, config: UnivalConfig):
        super().__init__()
        self.config = config
        self.stft = UnivalSpectrogram(config)
        self.mel = nn.Buffer(mel_matrix(config), persistent=False)
        self.bn0 = nn.BatchNorm2d(config.audio_mel_bins)
        self.num_blocks = len(config.audio_widths)
        for i, (inputs, outputs) in enumerate(zip([1, *config.audio_widths], config.audio_widths, strict=False)):
            last = i + 1 == self.num_blocks
            block = UnivalAudioBlock(inputs, outputs, 1 if last else 2, 0.0 if last else config.audio_dropout)
            self.add_module(f"conv_block{i + 1}", block)
        self.out_channels = config.audio_widths[-1]

    def log_mel(self, waveform: torch.Tensor) -> torch.Tensor:
        """10 log10 of the power in each mel bin, at least -100; always in float32: (B, samples) -> (B, 1, T, M)"""
        with torch.autocast(waveform.device.type, enabled=False):
            power = self.stft(waveform.float()) @ self.mel.float()
            return 10 * torch.log10(power.clamp(min=1e-10))[:, None]

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        """
        Shapes:
            input_values (B, samples) -> (B, C, T // 32, M // 32)
        """
        frames, least = input_values.shape[-1] // self.config.audio_hop + 1, 2 ** (self.num_blocks - 1)
        if frames < least or input_values.shape[-1] <= self.config.audio_window // 2:
            raise ValueError(
                f"the sound has {input_values.shape[-1]} samples; expected at least "
                f"{max((least - 1) * self.config.audio_hop, self.config.audio_window // 2 + 1)}."
            )
        features = self.log_mel(input_values).to(self.bn0.weight.dtype)
        features = self.bn0(features.transpose(1, 3)).transpose(1, 3)
        if self.training:
            features = blank_stripes(features, 2, self.config.audio_time_stripe)
            features = blank_stripes(features, 3, self.config.audio_mel_stripe)
        for i in range(self.num_blocks):
            features = self.get_submodule(f"conv_block{i + 1}")(features)
        return features


__all__ = ["UnivalAudioTower", "UnivalImageTower", "UnivalVideoTower"]
