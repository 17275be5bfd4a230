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
"""
Pictures, clips and sounds from whatever they come in: decoded with Pillow, PyAV and soundfile.

A medium may be given as a path, a link, bytes, a file object, an array or tensor, or the `{"bytes": ..., "path": ...}`
of a column of the `datasets` library; pictures also as Pillow images and base64, clips also as lists of pictures,
sounds also as `{"array": ..., "sampling_rate": ...}`.
"""

import io
import os
from collections.abc import Mapping
from typing import Any
from urllib.request import urlopen

import torch
from torch import Tensor
from transformers.image_utils import load_image as load_image_from_text
from transformers.image_utils import to_numpy_array

INTEGER_SCALES = {torch.int8: 2.0**7, torch.int16: 2.0**15, torch.int32: 2.0**31}  # signed samples -> [-1, 1)
FILTER_REACH = 64  # samples of the lower rate that the resampler looks ahead, and more
LOUDEST = 16.0  # floats beyond it are no samples in [-1, 1], somewhat too loud
LINKS = ("http://", "https://")
SECONDS = 60  # without an answer to a link
MAX_CHANNELS = 32  # a sound in two dimensions with more than this on both sides is not a sound


def generator_of(seed: "torch.Generator | int | None") -> torch.Generator | None:
    """A generator of random numbers from a seed; a generator and None are returned as they are."""
    return torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed


def is_pil(value: Any) -> bool:
    """Whether the value is a Pillow image (without importing Pillow)."""
    return type(value).__module__.startswith("PIL.") and hasattr(value, "convert")


def is_array(value: Any) -> bool:
    """Whether the value is a tensor or a NumPy array."""
    if isinstance(value, (str, bytes)):  # NumPy has its own
        return False
    return isinstance(value, Tensor) or (hasattr(value, "__array__") and hasattr(value, "shape"))


def tensor_of(array: Any) -> Tensor:
    """The numbers of a tensor or a NumPy array, on the CPU; of one that PyTorch cannot share, a copy."""
    if isinstance(array, Tensor):
        return array.detach().cpu()
    dtype, flags = getattr(array, "dtype", None), getattr(array, "flags", None)
    if getattr(dtype, "isnative", True) is False:  # the other order of bytes
        array = array.astype(dtype.newbyteorder("="))
    elif flags is not None and (not flags.writeable or any(stride < 0 for stride in array.strides)):
        array = array.copy()  # such as BGR turned around
    return torch.as_tensor(array)


def is_file(value: Any) -> bool:
    """Whether the value is encoded: a path, bytes, a file object or a row of a media column of `datasets`."""
    if isinstance(value, Mapping):
        return "bytes" in value or "path" in value
    return isinstance(value, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(value, "read")


def open_file(source: Any) -> tuple[Any, str]:
    """
    What a decoder can open (a path as a string, or bytes in memory) and the words that name it in an error.

    Raises:
        FileNotFoundError: there is no file of that name.
        ValueError: the source has no bytes, or a link gives none.
    """
    if isinstance(source, Mapping):
        if source.get("bytes") is None and source.get("path") is None:
            raise ValueError("expected bytes or a path in the column's row; both are empty.")
        named = f" of {source['path']!r}" if source.get("path") else ""
        if source.get("bytes") is None:
            return open_file(source["path"])
        content = bytes(source["bytes"])
        name = f"{len(content)} bytes{named}"
    elif isinstance(source, (bytes, bytearray, memoryview)):
        content = bytes(source)
        name = f"{len(content)} bytes"
    elif hasattr(source, "read"):
        content = source.read()
        name = f"file object {getattr(source, 'name', '')!r}".replace(" ''", "")
        if isinstance(content, str):
            raise ValueError(f"{name} is open as text; open it in binary mode ('rb').")
    elif isinstance(source, str) and source.startswith(LINKS):
        name = repr(source)
        try:
            with urlopen(source, timeout=SECONDS) as answer:
                content = answer.read()
        except OSError as error:
            raise ValueError(f"cannot load {name}: {error}") from error
    else:
        path = os.path.expanduser(os.fspath(source))
        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no file {path!r}.")
        return path, repr(path)
    if not content:
        raise ValueError(f"{name} is empty: there is nothing to decode.")
    return io.BytesIO(content), name


# ------------------------------------------------------------------------------------------------------- pictures


def load_image(source: Any) -> Any:
    """
    A picture as a Pillow image in RGB, upright (an EXIF orientation is applied).

    Args:
        source: as the module says. Arrays are (H, W), (H, W, C) or (C, H, W) with C = 1, 3 or 4, of uint8 or of floats
            in [0, 1].

    Raises:
        ValueError: the bytes are no picture or are damaged, or the array has another shape or range.
    """
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ImportError("decoding pictures needs Pillow: pip install pillow") from error
    name = "the image"
    if is_array(source):
        source = PIL.Image.fromarray(to_numpy_array(_pixels(source)))
    try:
        if isinstance(source, str) and not os.path.isfile(source):
            if "." in source and not source.startswith((*LINKS, "data:")):  # base64 has no dots
                raise FileNotFoundError(f"there is no file {source!r}.")
            name = f"{source[:60]!r}"
            source = load_image_from_text(source)  # a link or base64, else an error that says so
        elif is_file(source):
            file, name = open_file(source)
            source = PIL.Image.open(file)
        if not is_pil(source):
            raise TypeError(f"expected a picture (Pillow, array, path, bytes or file object); got {_kind(source)}.")
        image = PIL.ImageOps.exif_transpose(source)
        if image.mode.startswith(("I", "F")):  # Pillow would cut what is above 255 rather than scale it
            image = PIL.Image.fromarray(to_numpy_array(_pixels(_deep_grey(image))))
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        if isinstance(error, FileNotFoundError) or "nothing to decode" in str(error):
            raise
        raise ValueError(f"cannot decode {name} as a picture: {error}") from error


def _deep_grey(image: Any) -> Tensor:
    """A grey picture of more than 8 bits: one of 16 bits as 8 bits, others as they are."""
    array = tensor_of(to_numpy_array(image))
    return array.long() >> 8 if image.mode.startswith("I;16") else array


def _pixels(array: Any) -> Tensor:
    """An array of one picture as uint8 (H, W, 3)."""
    shape = tuple(array.shape)
    array = tensor_of(array)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.permute(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"expected a picture of shape (H, W), (H, W, 3) or (3, H, W); got {shape}.")
    array = _bytes_of_pixels(array)[..., :3]
    return array.expand(-1, -1, 3).contiguous()


def _bytes_of_pixels(array: Tensor) -> Tensor:
    if array.is_floating_point():
        if not (array.isfinite().all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError("expected pixels as uint8 or as floats in [0, 1]; got floats outside that range.")
        return (array * 255).round().to(torch.uint8)
    if array.dtype == torch.bool:
        return array.to(torch.uint8) * 255
    if array.is_complex():
        raise ValueError("expected pixels from 0 to 255 or floats in [0, 1]; got complex numbers.")
    array = array if array.dtype == torch.uint8 else array.long()
    if array.numel() and (array.min() < 0 or array.max() > 255):
        raise ValueError("expected pixels from 0 to 255 or floats in [0, 1]; got integers outside that range.")
    return array.to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------- clips


def sample_frames(length: int, num_frames: int, generator: "torch.Generator | int | None" = None) -> list[int]:
    """
    Which frames of a clip to take: one from each of `num_frames` equal intervals, the last one repeated in short clips.

    Args:
        length: frames in the clip.
        num_frames: frames wanted.
        generator: draws a frame of each interval at random (a seed will do); without it the middle one is taken.

    Raises:
        ValueError: the clip has no frames, or none are wanted.
    """
    if length < 1 or num_frames < 1:
        raise ValueError(f"expected at least one frame to take and one to take it from; got {num_frames} of {length}.")
    generator = generator_of(generator)
    count = min(num_frames, length)
    edges = [int(i * (length / count)) for i in range(count)] + [length]
    indices = []
    for first, last in zip(edges[:-1], (edge - 1 for edge in edges[1:]), strict=True):
        if generator is None:
            indices.append((first + last) // 2)
        else:
            indices.append(int(torch.randint(first, last + 1, (), generator=generator)))
    return indices + indices[-1:] * (num_frames - count)


def load_video(source: Any, num_frames: int, generator: "torch.Generator | int | None" = None) -> Tensor:
    """
    The sampled frames of a clip.

    Args:
        source: as the module says; a list of pictures is a clip too. Arrays are (T, H, W, C) or (T, C, H, W) with
            C = 1, 3 or 4.
        num_frames, generator: as in `sample_frames`.

    Shapes:
        -> (num_frames, 3, H, W) uint8

    Raises:
        ValueError: there are no frames, they differ in size, or the file cannot be decoded.
    """
    generator = generator_of(generator)
    if is_array(source):
        return _frames_of_array(tensor_of(source), num_frames, generator)
    if isinstance(source, (list, tuple)):
        return _frames_of_pictures(list(source), num_frames, generator)
    if is_file(source):
        return _frames_of_file(source, num_frames, generator)
    raise TypeError(f"expected a clip (path, bytes, file object, array or list of pictures); got {_kind(source)}.")


def _frames_of_array(array: Tensor, num_frames: int, generator) -> Tensor:
    shape = tuple(array.shape)
    if array.ndim == 4 and array.shape[-1] not in (1, 3, 4) and array.shape[1] in (1, 3, 4):
        array = array.permute(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[-1] not in (1, 3, 4):
        raise ValueError(f"expected a clip of shape (T, H, W, 3) or (T, 3, H, W); got {shape}.")
    _check_not_empty(array.shape[0], "the clip")
    array = array[sample_frames(array.shape[0], num_frames, generator)]
    return _bytes_of_pixels(array[..., :3]).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)


def _frames_of_pictures(pictures: list, num_frames: int, generator) -> Tensor:
    _check_not_empty(len(pictures), "the clip")
    chosen = sample_frames(len(pictures), num_frames, generator)
    frames = {i: torch.from_numpy(to_numpy_array(load_image(pictures[i])).copy()) for i in set(chosen)}
    sizes = {tuple(frame.shape[:2]) for frame in frames.values()}
    if len(sizes) > 1:
        raise ValueError(f"expected frames of one size in a clip; got (height, width) {sorted(sizes)}.")
    return torch.stack([frames[i] for i in chosen]).permute(0, 3, 1, 2)


def _frames_of_file(source: Any, num_frames: int, generator) -> Tensor:
    """Two passes: packets are counted without decoding, then frames are decoded up to the last one that is wanted."""
    try:
        import av
    except ImportError as error:
        raise ImportError("decoding video needs PyAV: pip install av") from error
    file, name = open_file(source)
    state = None if generator is None else generator.get_state()
    try:
        length = _count_packets(av, file, name)
        while True:
            _check_not_empty(length, name)
            chosen = sample_frames(length, num_frames, generator)
            frames, decoded = _decode(av, file, name, set(chosen))
            if len(frames) == len(set(chosen)):
                return torch.stack([frames[i] for i in chosen]).permute(0, 3, 1, 2)
            length = decoded  # some packets were no frames: choose again from those that are
            if state is not None:
                generator.set_state(state)
    except EOFError as error:
        raise ValueError(f"{name} is an empty or cut video: it ends before its first frame.") from error
    except av.FFmpegError as error:
        raise ValueError(f"cannot decode {name} as a video: {error}") from error


def _count_packets(av, file: Any, name: str) -> int:
    with _container(av, file) as container:
        stream = _video_stream(container, name)
        return sum(packet.size > 0 for packet in container.demux(stream))


def _decode(av, file: Any, name: str, wanted: set[int]) -> tuple[dict[int, Tensor], int]:
    """Frames (H, W, 3) of the wanted indices, turned upright, and how many frames were decoded."""
    frames: dict[int, Tensor] = {}
    decoded = 0
    with _container(av, file) as container:
        stream = _video_stream(container, name)
        stream.thread_type = "AUTO"
        for decoded, frame in enumerate(container.decode(stream), start=1):
            if decoded - 1 in wanted:
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                turns = round(getattr(frame, "rotation", 0) / 90)
                frames[decoded - 1] = torch.rot90(pixels, turns) if turns else pixels
                if len(frames) == len(wanted):
                    break
    return frames, decoded


def _container(av, file: Any) -> Any:
    if hasattr(file, "seek"):
        file.seek(0)
    return av.open(file)


def _video_stream(container: Any, name: str) -> Any:
    if not container.streams.video:
        raise ValueError(f"{name} has no video stream.")
    return container.streams.video[0]


def _check_not_empty(length: int, name: str) -> None:
    if length < 1:
        raise ValueError(f"{name} is an empty video: it has no frames.")


# --------------------------------------------------------------------------------------------------------- sounds


def load_audio(source: Any, sampling_rate: int, source_rate: int | None = None) -> Tensor:
    """
    A sound in one channel (the mean of all) at the wanted rate.

    Args:
        source: as the module says. Arrays are (samples,), (samples, channels) or (channels, samples), of floats or of
            integers, which are scaled to [-1, 1) (unsigned 8-bit ones around 128, as in WAV files).
        sampling_rate: samples a second wanted.
        source_rate: samples a second of an array; None means that it already has the wanted rate. Files say theirs.

    Shapes:
        -> (samples,) float32

    Raises:
        ValueError: there are no samples, some are not finite, or the file cannot be decoded.
    """
    name = "the sound"
    if isinstance(source, Mapping) and "array" in source:
        source, source_rate = source["array"], source.get("sampling_rate", source_rate)
    if isinstance(source, (list, tuple)):
        source = torch.tensor(source)
    if is_array(source):
        wave = _samples(tensor_of(source))
    elif is_file(source):
        wave, source_rate, name = _samples_of_file(source)
    else:
        raise TypeError(f"expected a sound (path, bytes, file object or array); got {_kind(source)}.")
    if not wave.numel():
        raise ValueError(f"{name} is empty: it has no samples.")
    if not wave.isfinite().all():
        raise ValueError(f"{name} has samples that are not finite numbers.")
    return wave if source_rate in (None, sampling_rate) else resample(wave, int(source_rate), sampling_rate)


def resample(wave: Tensor, source_rate: int, rate: int) -> Tensor:
    """
    A waveform at another rate, by the band-limited resampler of FFmpeg; silence is taken to follow the end.

    Shapes:
        wave (samples,) -> (samples · rate / source_rate, rounded up,)
    """
    if source_rate < 1 or rate < 1:
        raise ValueError(f"expected sampling rates of at least 1 Hz; got {source_rate} and {rate}.")
    try:
        import av
    except ImportError as error:
        raise ImportError("changing the sampling rate needs PyAV: pip install av") from error
    silence = FILTER_REACH * -(-max(source_rate, rate) // rate)
    padded = torch.nn.functional.pad(wave.float(), (0, silence))
    frame = av.AudioFrame.from_ndarray(padded[None].numpy(), format="flt", layout="mono")
    frame.sample_rate = source_rate
    resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
    parts = [*resampler.resample(frame), *resampler.resample(None)]
    length = -(-wave.numel() * rate // source_rate)
    return torch.cat([torch.from_numpy(part.to_ndarray()[0]) for part in parts])[:length]


def _samples(array: Tensor) -> Tensor:
    """An array of samples as float32 (samples,)."""
    if array.ndim == 2 and 0 < min(array.shape) <= MAX_CHANNELS:
        array = array if array.shape[1] <= array.shape[0] else array.T  # the shorter side is the channels
    elif array.ndim != 1:
        raise ValueError(f"expected a sound of shape (samples,) or (samples, channels); got {tuple(array.shape)}.")
    if array.dtype == torch.uint8:
        array = (array.float() - 128) / 128
    elif array.dtype in INTEGER_SCALES:
        array = (array.double() / INTEGER_SCALES[array.dtype]).float()
    elif not array.is_floating_point():
        raise ValueError(f"expected samples as floats or as 8, 16 or 32-bit integers; got {array.dtype}.")
    elif array.numel() and LOUDEST < array.abs().max() < torch.inf:
        raise ValueError(f"expected floats in [-1, 1]; the sound has samples up to {array.abs().max():g}.")
    array = array.float()
    return array.mean(dim=1) if array.ndim == 2 else array


def _samples_of_file(source: Any) -> tuple[Tensor, int, str]:
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("decoding sound needs soundfile: pip install soundfile") from error
    file, name = open_file(source)
    try:
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"cannot decode {name} as a sound: {error}") from error
    return torch.from_numpy(samples).mean(dim=1), rate, name


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


__all__ = ["load_audio", "load_image", "load_video", "resample", "sample_frames"]
