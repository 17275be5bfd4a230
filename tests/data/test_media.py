"""Decoding: every form of every medium gives the same numbers, and what cannot be decoded says why."""

import io
import math
import threading
from fractions import Fraction
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import PIL.Image
import pytest
import soundfile
import torch

from hf_vlmerge.data.media import load_audio, load_image, load_video, resample, sample_frames

RATE = 8000


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    y, x = np.mgrid[:24, :40]
    return np.stack([x * 6, y * 10, (x + y) * 4], axis=-1).astype(np.uint8)


def png(picture: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(picture).save(file, format="PNG", **options)
    return file.getvalue()


def video(frames: int, codec: str = "mpeg4", container: str = "mp4") -> bytes:
    """Frame i is a plain grey of 10 · i."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.time_base = Fraction(1, 10)
        output.start_encoding()
        for i in range(frames):
            pixels = np.full((16, 32, 3), 10 * i, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


def tone(rate: int, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def wav(samples: np.ndarray, rate: int = RATE, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", **options)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------- pictures


def test_a_picture_is_the_same_in_every_form(picture, tmp_path):
    content = png(picture)
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    tensor = torch.from_numpy(picture)
    forms = {
        "pillow": PIL.Image.fromarray(picture),
        "path": path,
        "string": str(path),
        "bytes": content,
        "file object": io.BytesIO(content),
        "column": {"bytes": content, "path": None},
        "column of paths": {"bytes": None, "path": str(path)},
        "array": picture,
        "tensor": tensor,
        "channels first": tensor.permute(2, 0, 1),
        "floats": tensor / 255,
        "wide integers": picture.astype(np.uint16),
        "with opacity": np.concatenate([picture, np.full((24, 40, 1), 255, np.uint8)], axis=-1),
    }
    for name, form in forms.items():
        image = load_image(form)
        assert image.mode == "RGB", name
        assert np.array_equal(np.asarray(image), picture), name


def test_grey_palette_and_turned_pictures(picture):
    grey = load_image(picture[..., 0])
    assert np.array_equal(np.asarray(grey), picture[..., :1].repeat(3, axis=-1))
    palette = PIL.Image.fromarray(np.full((4, 4, 3), (255, 0, 0), np.uint8)).quantize(2)
    assert load_image(palette).getpixel((0, 0)) == (255, 0, 0)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown turned by 90 degrees clockwise
    assert load_image(png(picture, exif=exif)).size == (24, 40)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"no picture at all", "cannot decode 17 bytes as a picture"),
        (b"", "0 bytes is empty"),
        ({"bytes": None, "path": None}, "both are empty"),
        (np.zeros((2, 3, 4, 5)), r"expected a picture of shape .* got \(2, 3, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), "expected a picture of shape"),
        (np.full((4, 4, 3), 2.0), r"floats in \[0, 1\]; got floats outside"),
        (np.full((4, 4, 3), 300), "integers outside that range"),
        (np.full((4, 4, 3), 1j), "got complex numbers"),
        (PIL.Image.fromarray(np.full((4, 4), 70000, np.int32)), "cannot decode the image .* integers outside"),
        (PIL.Image.fromarray(np.full((4, 4), 7.0, np.float32)), "cannot decode the image .* floats outside"),
        (7, "expected a picture .* got int"),
    ],
)
def test_what_is_no_picture(source, words):
    with pytest.raises((ValueError, TypeError), match=words):
        load_image(source)


def test_a_corrupt_jpeg(picture):
    file = io.BytesIO()
    PIL.Image.fromarray(picture).resize((200, 200)).save(file, format="JPEG")
    with pytest.raises(ValueError, match=r"cannot decode \d+ bytes of 'cat.jpg' as a picture: .*truncated"):
        load_image({"bytes": file.getvalue()[:900], "path": "cat.jpg"})


def test_a_missing_file(tmp_path):
    for load in (load_image, lambda path: load_video(path, 2), lambda path: load_audio(path, RATE)):
        with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere"):
            load(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.file"):
            load(str(tmp_path / "nowhere.file"))


def test_deep_grey_pictures_are_scaled():
    """Pillow's own conversion cuts what is above 255, so that most of a picture of 16 bits would be white."""
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    expected = torch.from_numpy((ramp >> 8).astype(np.uint8))
    picture = PIL.Image.fromarray(ramp)
    file = io.BytesIO()
    picture.save(file, format="PNG")
    for form in (picture, file.getvalue(), PIL.Image.fromarray((ramp >> 8).astype(np.int32))):
        found = load_image(form)
        assert found.mode == "RGB" and all(torch.equal(torch.from_numpy(np.array(c)), expected) for c in found.split())
    half = load_image(PIL.Image.fromarray(np.full((2, 2), 0.5, np.float32)))
    assert half.getpixel((0, 0)) == (128, 128, 128)


def test_arrays_that_pytorch_cannot_share(picture):
    """BGR turned around, frames or samples backwards, numbers in the other order of bytes, strings of NumPy."""
    bgr = picture[..., ::-1]
    assert np.array_equal(np.asarray(load_image(bgr[..., ::-1])), picture)
    assert np.array_equal(np.asarray(load_image(bgr)), bgr)
    clip = np.stack([picture, picture // 2])
    assert torch.equal(load_video(clip[::-1], 2), load_video(clip, 2).flip(0))
    samples = np.array([1, -2, 16384], dtype=np.int16)
    for form in (samples[::-1][::-1], samples.astype(">i2")):
        assert torch.equal(load_audio(form, RATE), load_audio(samples, RATE))
    deep = PIL.Image.frombytes("I;16B", (2, 2), np.full((2, 2), 40000, ">u2").tobytes())
    assert load_image(deep).getpixel((1, 1)) == (156, 156, 156)


def test_a_path_as_a_string_of_numpy(picture, tmp_path):
    (tmp_path / "a.png").write_bytes(png(picture))
    assert np.array_equal(np.asarray(load_image(np.str_(tmp_path / "a.png"))), picture)


def test_colours_without_their_alpha_and_in_cmyk():
    assert load_image(PIL.Image.new("RGBA", (2, 2), (10, 20, 30, 0))).getpixel((0, 0)) == (10, 20, 30)
    assert load_image(PIL.Image.new("LA", (2, 2), (7, 0))).getpixel((0, 0)) == (7, 7, 7)
    assert load_image(PIL.Image.new("CMYK", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(np.full((2, 2, 4), 9, np.uint8)).getpixel((0, 0)) == (9, 9, 9)


@pytest.fixture
def site(tmp_path):
    """A folder and the address that it is served at."""

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_links(site, picture):
    folder, address = site
    for name, content in (("a.png", png(picture)), ("a.mp4", video(4)), ("a.wav", wav(tone(RATE)))):
        (folder / name).write_bytes(content)
    assert np.array_equal(np.asarray(load_image(f"{address}/a.png")), picture)
    assert torch.equal(load_video(f"{address}/a.mp4", 2), load_video(folder / "a.mp4", 2))
    assert torch.equal(load_audio(f"{address}/a.wav", RATE), load_audio(folder / "a.wav", RATE))
    for load in (lambda link: load_video(link, 2), lambda link: load_audio(link, RATE)):
        with pytest.raises(ValueError, match=r"cannot load 'http://127.0.0.1:\d+/b': HTTP Error 404"):
            load(f"{address}/b")


# ---------------------------------------------------------------------------------------------------------- clips


def test_sampled_frames_in_the_middle_and_at_random():
    assert sample_frames(100, 8) == [5, 18, 30, 43, 55, 68, 80, 93]
    assert sample_frames(5, 8) == [0, 1, 2, 3, 4, 4, 4, 4]
    drawn = [sample_frames(40, 4, seed) for seed in range(200)]
    assert sample_frames(40, 4, 3) == drawn[3]
    for i in range(4):
        assert {each[i] for each in drawn} == set(range(10 * i, 10 * i + 10))


@pytest.mark.parametrize(("codec", "container"), [("mpeg4", "mp4"), ("mpeg4", "matroska"), ("ffv1", "avi")])
def test_a_video_file_in_every_form(codec, container, tmp_path):
    content = video(10, codec, container)
    path = tmp_path / "clip"
    path.write_bytes(content)
    forms = [content, path, str(path), io.BytesIO(content), {"bytes": content, "path": None}]
    clips = [load_video(form, 5) for form in forms]
    assert clips[0].shape == (5, 3, 16, 32)
    assert clips[0].dtype == torch.uint8
    for clip in clips[1:]:
        assert torch.equal(clip, clips[0])
    levels = clips[0].float().mean(dim=(1, 2, 3))
    expected = torch.tensor([10.0 * i for i in sample_frames(10, 5)])
    assert (levels - expected).abs().max() < 3


def test_short_videos_repeat_the_last_frame_and_random_frames_repeat_by_seed():
    clip = load_video(video(3), 6)
    assert torch.equal(clip[2:], clip[2:3].expand(4, -1, -1, -1))
    content = video(20)
    assert torch.equal(load_video(content, 4, 1), load_video(content, 4, 1))
    assert not torch.equal(load_video(content, 4, 1), load_video(content, 4, 2))


def test_a_clip_of_pictures_and_of_an_array():
    frames = np.stack([np.full((6, 8, 3), 20 * i, np.uint8) for i in range(10)])
    expected = load_video(frames, 5)
    assert expected[:, 0, 0, 0].tolist() == [20 * i for i in sample_frames(10, 5)]
    forms = [torch.from_numpy(frames), torch.from_numpy(frames).permute(0, 3, 1, 2), torch.from_numpy(frames) / 255]
    forms += [list(frames), [PIL.Image.fromarray(frame) for frame in frames]]
    forms.append([{"bytes": png(frame), "path": None} for frame in frames])
    grey = torch.from_numpy(frames[..., :1])
    forms += [grey, grey.permute(0, 3, 1, 2), torch.cat([torch.from_numpy(frames), grey], dim=-1)]
    for form in forms:
        assert torch.equal(load_video(form, 5), expected)


def test_videos_that_are_none(picture):
    cases = [
        ([], "the clip is an empty video"),
        (np.zeros((0, 4, 4, 3), np.uint8), "the clip is an empty video"),
        (b"", "is empty: there is nothing to decode"),
        (b"no video", "cannot decode 8 bytes as a video"),
        (wav(tone(RATE)), "bytes has no video stream"),
        (np.zeros((4, 4, 3), np.uint8), r"expected a clip of shape \(T, H, W, 3\)"),
        (np.zeros((9, 8, 8, 2), np.uint8), r"expected a clip of shape .* got \(9, 8, 8, 2\)"),
        ([picture, picture[:10]], "expected frames of one size"),
        (3.5, "expected a clip .* got float"),
    ]
    for source, words in cases:
        with pytest.raises((ValueError, TypeError), match=words):
            load_video(source, 2)


@pytest.mark.parametrize(("container", "words"), [("mp4", "has no video stream"), ("matroska", "is an empty or cut")])
def test_a_video_without_frames(container, words):
    with pytest.raises(ValueError, match=rf"\d+ bytes {words}"):
        load_video(video(0, container=container), 4)


def test_a_cut_video():
    content = video(10)
    with pytest.raises(ValueError, match=r"^\d+ bytes (has no video stream|is an empty)|cannot decode \d+ bytes"):
        load_video(content[: len(content) // 2], 4)
    whole = video(25, container="matroska")
    levels = load_video(whole[: len(whole) // 2], 4).float().mean(dim=(1, 2, 3))  # of the frames that are there
    assert (levels.diff() > 10).all()
    assert levels[-1] < 100


# --------------------------------------------------------------------------------------------------------- sounds


def test_a_sound_in_every_form(tmp_path):
    samples = np.round(tone(RATE) * 32768) / 32768  # what 16 bits hold
    content = wav(samples, subtype="PCM_16")
    path = tmp_path / "tone.wav"
    path.write_bytes(content)
    shorts = (samples * 32768).astype(np.int16)
    forms = [
        content, path, str(path), io.BytesIO(content), {"bytes": content, "path": None}, samples,
        torch.from_numpy(samples), samples.tolist(), shorts, {"array": samples, "sampling_rate": RATE},
    ]  # fmt: skip
    for form in forms:
        sound = load_audio(form, RATE)
        assert sound.dtype == torch.float32
        assert torch.equal(sound, torch.from_numpy(samples).float())


def test_stereo_is_averaged():
    left, right = tone(RATE), tone(RATE, hertz=600)
    both, mean = np.stack([left, right], axis=1), torch.from_numpy((left + right) / 2)
    for form in (both, both.T, torch.from_numpy(both), wav(both, subtype="FLOAT")):
        assert torch.allclose(load_audio(form, RATE), mean, atol=1e-6)


def test_eight_bits():
    samples = tone(RATE)
    content = wav(samples, subtype="PCM_U8")
    assert (load_audio(content, RATE) - torch.from_numpy(samples)).abs().max() < 1 / 100
    raw = np.round(samples * 127 + 128).astype(np.uint8)
    assert (load_audio(raw, RATE) - torch.from_numpy(samples)).abs().max() < 1 / 100


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 96000])
def test_another_rate(rate):
    hertz, seconds = 440.0, 0.5
    sound = load_audio(wav(tone(rate, seconds, hertz), rate, subtype="FLOAT"), 48000)
    assert len(sound) == math.ceil(48000 * int(rate * seconds) / rate)
    expected = torch.from_numpy(tone(48000, seconds, hertz))[: len(sound)]
    inner = slice(480, -480)  # nothing is known beyond the ends
    assert (sound[: len(expected)] - expected)[inner].abs().max() < 1e-4
    assert torch.equal(load_audio(tone(rate), 48000, rate), resample(torch.from_numpy(tone(rate)), rate, 48000))


@pytest.mark.parametrize("rates", [(8000, 48000), (500, 1000), (44100, 48000), (48000, 8000), (96000, 500)])
def test_sounds_of_a_few_samples_keep_their_length(rates):
    for count in (1, 2, 9, 100):
        sound = resample(torch.ones(count), *rates)
        assert len(sound) == math.ceil(count * rates[1] / rates[0])
        assert sound.isfinite().all()


def test_what_the_lower_rate_cannot_hold_is_filtered_away():
    high = torch.from_numpy(tone(48000, hertz=9000))
    assert resample(high, 48000, 8000)[100:-100].abs().max() < 1e-2


def test_sounds_that_are_none():
    cases = [
        (np.zeros(0, np.float32), "the sound is empty: it has no samples"),
        (wav(np.zeros(0, np.float32)), "is empty: it has no samples"),
        (b"", "is empty: there is nothing to decode"),
        (b"no sound", "cannot decode 8 bytes as a sound"),
        ([0.0, math.nan], "not finite"),
        (np.zeros((50, 50), np.float32), "expected a sound of shape"),
        (np.zeros(4, np.int64), "expected samples as floats or as 8, 16 or 32-bit"),
        ([0, 1200, -300], "expected samples as floats or as 8, 16 or 32-bit"),
        (np.full(9, 1200.0), r"expected floats in \[-1, 1\]; the sound has samples up to 1200"),
        (object(), "expected a sound .* got object"),
    ]
    for source, words in cases:
        with pytest.raises((ValueError, TypeError), match=words):
            load_audio(source, RATE)
