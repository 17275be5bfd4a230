"""The processor against recorded numbers of the original, its laws, and what it says of bad input."""

import base64
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import soundfile
import torch

from hf_vlmerge.models.unival.feature_extraction_unival import UnivalFeatureExtractor
from hf_vlmerge.models.unival.grounding_unival import bins_of_boxes, boxes_of_bins
from hf_vlmerge.models.unival.image_processing_unival import UnivalImageProcessor
from hf_vlmerge.models.unival.media_unival import sample_frames
from hf_vlmerge.models.unival.processing_unival import CHAT_TEMPLATE, UnivalProcessor, fit_frames
from hf_vlmerge.models.unival.prompts_unival import PROMPTS, clean_caption_target, clean_text, make_prompt, make_target
from hf_vlmerge.models.unival.tokenization_unival import build_tokenizer
from tests.models.unival.tiny import tiny_model
from tests.models.unival.tiny_processor import tiny_processor, tiny_vocabulary

FIRST_CODE, FIRST_BIN = 264, 280  # of the tiny vocabulary


@pytest.fixture(scope="session")
def golden(shared) -> dict:
    return json.loads((shared / "goldens" / "unival" / "components.json").read_text())


@pytest.fixture(scope="session")
def bart(shared) -> Path:
    return shared / "data" / "tokenizers" / "gpt2_bart_bpe"


@pytest.fixture(scope="session")
def tokenizer(bart):
    return build_tokenizer(bart)


@pytest.fixture(scope="module")
def processor() -> UnivalProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def picture() -> PIL.Image.Image:
    y, x = np.mgrid[:60, :100]
    return PIL.Image.fromarray(np.stack([x * 2, y * 4, x + y], axis=-1).astype(np.uint8))


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return np.stack([np.full((16, 24, 3), 10 * i, np.uint8) for i in range(12)])


@pytest.fixture(scope="module")
def sound() -> np.ndarray:
    return (0.5 * np.sin(np.arange(60) / 3)).astype(np.float32)


# ------------------------------------------------------------------------------------------ numbers of the original


def test_the_vocabulary_has_the_original_order(tokenizer, golden):
    facts = golden["bpe"]
    assert len(tokenizer) == facts["vocab_size"] == 59457
    names = ["<mask>", "<code_0>", "<code_8191>", "<bin_0>", "<bin_999>"]
    expected = [facts[name] for name in ("mask_id", "code_0", "code_8191", "bin_0", "bin_999")]
    assert tokenizer.convert_tokens_to_ids(names) == expected


def test_every_prompt_has_the_original_ids(tokenizer, golden):
    examples = golden["bpe"]["examples"]
    assert len(examples) == 19
    for example in examples:
        assert tokenizer(example["text"], add_special_tokens=False).input_ids == example["ids"], example["text"]
    region = golden["bpe"]["region_example"]
    assert tokenizer(region["text"], add_special_tokens=False).input_ids == region["ids"]


def test_the_table_of_prompts_gives_the_recorded_texts(golden):
    recorded = {example["text"] for example in golden["bpe"]["examples"]}
    made = {
        make_prompt("image_captioning"),
        make_prompt("video_captioning"),
        make_prompt("audio_captioning_pretraining"),
        make_prompt("visual_grounding", text="The red car on the left"),
        make_prompt("grounded_captioning").removesuffix("{box}"),
        make_prompt("image_text_matching", caption="A man riding a horse"),
        make_prompt("video_text_matching", caption="A man riding a horse"),
        make_prompt("audio_text_matching", caption="A dog barks"),
        make_prompt("visual_entailment", hypothesis="a man riding a horse"),
        make_prompt("visual_entailment_with_premise", premise="a man riding a horse", hypothesis="a person is outside"),
        make_prompt("text_to_image", caption="a red bus in the street"),
        make_prompt("answer_matching", question="what color is the bus", answer="red"),
        make_prompt("question_answering", question="What color is the bus"),
        make_prompt("question_answering_pretraining", question="what color is the bus?"),
    }
    assert made <= recorded
    assert len(made) == 12  # two pairs of tasks have one text
    assert make_prompt("audio_captioning") == " what does the video describe?"  # sic


def test_texts_are_cleaned_as_in_the_original(golden):
    for row in golden["text_cleaning"]["pre_question"] + golden["text_cleaning"]["pre_caption"]:
        assert clean_text(row["in"], row["max_words"]) == row["out"]


def test_frames_are_sampled_as_in_the_original(golden):
    assert len(golden["frame_sampling"]) == 5
    for row in golden["frame_sampling"]:
        assert sample_frames(row["video_len"], row["num_frames"]) == row["indices"]


def test_boxes_become_the_original_bins(golden):
    for row in golden["grounding_transform"]:
        side, (width, height) = row["patch_image_size"], row["image_wh"]
        processor = tiny_processor(grounding_size=side)
        image = PIL.Image.new("RGB", (width, height))
        batch = processor(images=image, task="visual_grounding", text="a thing", boxes=row["box_xyxy"])
        assert tuple(batch["pixel_values"].shape[1:]) == tuple(row["out_tensor_shape"])
        assert (batch["labels"][0, :4] - FIRST_BIN).tolist() == row["bins"]
        back = processor.post_process_grounding(batch["labels"], [(height, width)])
        step = torch.tensor([width, height, width, height]) * 512 / side / 999
        assert ((back - torch.tensor(row["box_xyxy"])).abs() <= step / 2 + 1e-4).all()


def test_generated_bins_become_the_original_boxes(golden):
    row = golden["grounding_eval"]
    sizes = [(512 / h, 512 / w) for w, h in zip(row["w_resize_ratios"], row["h_resize_ratios"], strict=True)]
    boxes = boxes_of_bins(torch.tensor(row["bins"]), torch.tensor(sizes), 512)
    torch.testing.assert_close(boxes, torch.tensor(row["boxes"]), rtol=1e-6, atol=1e-4)


def test_the_tokenizer_is_loaded_unchanged(tokenizer, golden, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path / "unival")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "unival")
    assert len(loaded) == len(tokenizer)
    assert loaded.model_max_length == 1024
    for example in golden["bpe"]["examples"]:
        assert loaded(example["text"], add_special_tokens=False).input_ids == example["ids"]


# ------------------------------------------------------------------------------------------------------- vocabulary


def test_a_tokenizer_is_made_from_every_form_of_the_tables(tmp_path):
    vocab, merges = tiny_vocabulary()
    expected = build_tokenizer(vocab, merges, num_codes=16)
    assert len(expected) == 264 + 16 + 1000
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)))
    expected.save_pretrained(tmp_path / "saved")
    forms = {
        "folder of tables": (tmp_path,),
        "files": (tmp_path / "vocab.json", str(tmp_path / "merges.txt")),
        "saved folder": (tmp_path / "saved",),
        "tokenizer.json": (tmp_path / "saved" / "tokenizer.json",),
        "tokenizer": (expected,),
    }
    text = " the <bin_3> <bin_4>thé<mask>"
    ids = expected(text).input_ids
    assert ids[:4] == [0, vocab["Ġthe"], FIRST_BIN + 3, FIRST_BIN + 4]
    for name, form in forms.items():
        tokenizer = build_tokenizer(*form, num_codes=16)
        assert tokenizer(text).input_ids == ids, name
        assert tokenizer.decode(ids, skip_special_tokens=True) == " the<bin_3><bin_4>thé", name


def test_words_are_cut_and_merged_as_by_the_tokenizer_of_bart(bart, tokenizer):
    """Codes and bins are pieces of the vocabulary here, which takes other steps than BART's: same ids for any text."""
    from transformers import BartTokenizer

    plain = BartTokenizer(vocab=str(bart / "vocab.json"), merges=str(bart / "vocab.bpe"))
    texts = plain.batch_decode([[i] for i in range(4, 50260, 20)])
    generator = np.random.default_rng(0)
    ranges = [(32, 127), (9, 33), (128, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1F600)]
    for _ in range(2000):
        low, high = ranges[generator.integers(len(ranges))]
        mixed = np.concatenate([generator.integers(low, high, 8), generator.integers(32, 127, 8)])
        texts.append("".join(map(chr, generator.permutation(mixed))))
    assert plain(texts).input_ids == tokenizer(texts).input_ids


def test_a_tokenizer_is_not_changed_by_making_another_from_it():
    vocab, merges = tiny_vocabulary()
    first = build_tokenizer(vocab, merges, num_codes=2, num_bins=2)
    assert len(build_tokenizer(first, num_codes=4, num_bins=2)) == len(first) + 2
    assert len(first) == 268


def test_tables_that_are_not_those_of_bart(tmp_path):
    vocab, merges = tiny_vocabulary()
    turned = {piece: len(vocab) - 1 - i for piece, i in vocab.items()}
    with pytest.raises(ValueError, match=r"expected a BART vocabulary, with <s> <pad> </s> <unk> as ids 0 to 3"):
        build_tokenizer(turned, merges)
    with pytest.raises(ValueError, match=r"expected tokenizer.json, or vocab.json and merges.txt"):
        build_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match="pass the file of merges"):
        build_tokenizer(tmp_path / "vocab.json")


def test_a_text_never_becomes_a_special_token(processor):
    ids = processor(text="what does </s> <s> mean <mask>?")["input_ids"][0].tolist()
    assert [i for i in ids if i < 4 or i == FIRST_CODE - 1] == [0, 2]
    assert processor.decode(ids[1:-1]) == " what does </s> <s> mean <mask>?"


# ---------------------------------------------------------------------------------------------------------- prompts


def test_each_task_says_what_it_takes():
    with pytest.raises(ValueError, match="there is no task 'captioning'; there are image_captioning"):
        make_prompt("captioning")
    with pytest.raises(ValueError, match="'answer_matching' takes question, answer; got question"):
        make_prompt("answer_matching", question="why")
    with pytest.raises(ValueError, match="'image_captioning' takes no texts; got text"):
        make_prompt("image_captioning", text="why")


def test_what_is_put_in_is_cleaned_and_put_in_once():
    assert make_prompt("question_answering", question="Is it RED?") == " is it red?"
    assert make_prompt("question_answering", question="red", objects=["dog", "cat"]) == " red? object: dog cat"
    assert make_prompt("text_to_image", caption="A Red bus") == PROMPTS["text_to_image"].source.format(
        caption="A Red bus"
    )
    assert "{answer}" in make_prompt("answer_matching", question="{answer}", answer="red")
    assert len(make_prompt("question_answering_pretraining", question="a " * 200).split()) == 80


def test_targets():
    assert clean_caption_target("A man, riding a horse.") == "A man riding a horse"
    assert make_target("image_captioning", "word. " * 30) == " word" * 20
    assert make_target("question_answering", "it's 3.5") == " it's 3.5"
    assert make_target("visual_grounding", "") == "{box}"


# ------------------------------------------------------------------------------------------------------------ media


def test_images_are_resized_to_a_square_and_scaled(processor, picture):
    pixels = processor(images=picture, text="a")["pixel_values"]
    resized = np.asarray(picture.resize((32, 32), PIL.Image.Resampling.BICUBIC)).astype(np.float32)
    expected = torch.from_numpy((resized / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
    for size in (48, {"height": 48, "width": 48}):
        assert processor(images=picture, text="a", size=size)["pixel_values"].shape == (1, 3, 48, 48)
    assert processor(images=picture, task="visual_grounding", text="a")["pixel_values"].shape == (1, 3, 64, 64)
    assert UnivalImageProcessor()(picture, return_tensors="pt")["pixel_values"].shape == (1, 3, 480, 480)


def test_images_may_be_files_and_arrays(processor, picture):
    file = io.BytesIO()
    picture.save(file, format="PNG")
    expected = processor(images=picture, text="a")["pixel_values"]
    array = np.asarray(picture)  # which may not be written to
    for form in (
        file.getvalue(),
        {"bytes": file.getvalue(), "path": None},
        array,
        torch.from_numpy(array.copy()),
        [[picture]],
    ):
        assert torch.equal(processor(images=form, text="a")["pixel_values"], expected)
    batch = processor(images=np.stack([array, array]), text=["a", "b"])["pixel_values"]
    assert torch.equal(batch, expected.expand(2, -1, -1, -1))
    assert torch.equal(processor.image_processor([file.getvalue()], return_tensors="pt")["pixel_values"], expected)


def test_rows_may_be_columns_of_datasets(processor, picture, sound):
    file = io.BytesIO()
    picture.save(file, format="PNG")
    rows = {"image": [{"bytes": file.getvalue(), "path": None}] * 2, "text": ["a", "b"], "sound": [sound.tolist()] * 2}
    data = datasets.Dataset.from_dict(rows)
    column = data.cast_column("image", datasets.Image())["image"]
    assert not isinstance(column, list)
    found = processor(images=column, text=data["text"], targets=data["text"])
    expected = processor(images=[picture, picture], text=["a", "b"], targets=["a", "b"])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    sounds = processor(audio=data["sound"], text=data["text"])["input_values"]
    assert torch.equal(sounds, processor(audio=[sound, sound], text=["a", "b"])["input_values"])


def test_frames_are_sampled_in_the_middle_or_at_random(processor, clip):
    def levels(**options):
        pixels = processor(videos=clip, text="a", **options)["pixel_values_videos"]
        assert pixels.shape[2:] == (3, 16, 16)
        return ((pixels[0, :, 0, 8, 8] + 1) * 127.5).round().int().tolist()

    assert levels() == [10 * i for i in sample_frames(12, 4)]
    assert levels(num_frames=6) == [10 * i for i in sample_frames(12, 6)]
    assert levels(generator=5) == [10 * i for i in sample_frames(12, 4, 5)]
    assert levels(generator=5) == levels(generator=torch.Generator().manual_seed(5))
    assert len({tuple(levels(generator=seed)) for seed in range(8)}) > 1
    assert processor(videos=clip, text="a", frame_size=8)["pixel_values_videos"].shape == (1, 4, 3, 8, 8)


def test_a_list_of_pictures_is_a_clip_and_a_list_of_clips_a_batch(processor, clip):
    expected = processor(videos=clip, text="a")["pixel_values_videos"]
    pictures = [PIL.Image.fromarray(frame) for frame in clip]
    for form in (list(clip), pictures, [pictures], [clip], [[clip]], clip[None]):
        assert torch.equal(processor(videos=form, text="a")["pixel_values_videos"], expected)
    two = processor(videos=[pictures, clip], text=["a", "b"])["pixel_values_videos"]
    assert torch.equal(two, expected.expand(2, -1, -1, -1, -1))


def test_the_square_of_a_frame():
    frames = torch.arange(6 * 10, dtype=torch.uint8).view(1, 1, 6, 10).expand(1, 3, 6, 10)
    bytes_of = (fit_frames(frames, 6)[0, 0] + 1) * 127.5
    torch.testing.assert_close(bytes_of, frames[0, 0, :, 2:8].float())
    same = fit_frames(frames, 4, resize=False)
    assert torch.equal(same, fit_frames(frames[..., 1:5, 3:7], 4))
    larger = (fit_frames(frames, 12, resize=False)[0, 0] + 1) * 127.5
    torch.testing.assert_close(larger[3:9, 1:11], frames[0, 0].float())
    torch.testing.assert_close(larger.sum(), larger[3:9, 1:11].sum())
    assert fit_frames(frames, 3).shape == (1, 3, 3, 3)


def test_short_sounds_are_repeated_and_long_ones_cropped(processor, sound):
    rounded = (torch.from_numpy(sound) * 32767).to(torch.int16).float() / 32767
    short = processor(audio=sound[:45], text="a")["input_values"][0]
    assert torch.equal(short, torch.cat([rounded[:45], rounded[:45], torch.zeros(10)]))
    once = processor(audio=sound, text="a")["input_values"][0]
    assert torch.equal(once, torch.cat([rounded, torch.zeros(40)]))
    long = np.linspace(-1, 1, 301, dtype=np.float32)
    kept = (torch.from_numpy(long) * 32767).to(torch.int16).float() / 32767
    assert torch.equal(processor(audio=long, text="a")["input_values"][0], kept[100:200])
    drawn = {processor(audio=long, text="a", generator=seed)["input_values"][0, 0].item() for seed in range(9)}
    assert len(drawn) > 4
    assert drawn <= set(kept[:202].tolist())


def test_sounds_are_clipped_and_truncated_to_16_bits():
    values = UnivalFeatureExtractor(num_samples=4)([[1.7, -2.0, 0.5, -0.5]])["input_values"][0]
    assert torch.equal(values, torch.tensor([32767, -32767, 16383, -16383]) / 32767)


def test_sounds_in_stereo_in_bytes_and_at_another_rate(processor):
    rate, times = 2000, np.arange(400) / 2000
    left, right = np.sin(2 * np.pi * 40 * times), np.sin(2 * np.pi * 60 * times)
    both = np.stack([left, right], axis=1).astype(np.float32) / 2
    values = processor(audio=both, text="a", sampling_rate=rate)["input_values"][0]
    times = np.arange(50, 150) / 1000  # the middle 100 of 200 samples
    expected = (np.sin(2 * np.pi * 40 * times) + np.sin(2 * np.pi * 60 * times)) / 4
    assert np.abs(values.numpy() - expected)[10:-10].max() < 5e-3
    eight = np.round(both * 127 + 128).astype(np.uint8)
    assert (processor(audio=eight, text="a", sampling_rate=rate)["input_values"][0] - values).abs().max() < 2e-2
    row = {"array": both, "sampling_rate": rate}
    assert torch.equal(processor(audio=row, text="a")["input_values"][0], values)


# ---------------------------------------------------------------------------------------------------------- batches


def test_a_mixed_batch_is_its_rows(processor, picture, clip, sound):
    texts = ["a bus", "what", "the sound of it", "only text", "b", "c"]
    images, videos = [picture, None, None, None, None, picture], [None, clip, None, None, clip, None]
    audio = [None, None, sound, None, None, None]
    batch = processor(images=images, videos=videos, audio=audio, text=texts)
    assert batch["media_types"].tolist() == [0, 1, 2, -1, 1, 0]
    assert batch["media_types"].dtype == torch.int64
    seen = {"pixel_values": 0, "pixel_values_videos": 0, "input_values": 0}
    for row, text in enumerate(texts):
        given = {"images": images[row], "videos": videos[row], "audio": audio[row]}
        single = processor(text=text, **{name: value for name, value in given.items() if value is not None})
        length = single["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, :length], single["input_ids"][0])
        assert (batch["input_ids"][row, length:] == 1).all()
        assert batch["attention_mask"][row].sum() == length
        for name in set(seen) & set(single):
            assert torch.equal(batch[name][seen[name]], single[name][0])
            seen[name] += 1
    assert seen == {name: len(batch[name]) for name in seen}


def test_media_without_text_and_text_without_media(processor, picture):
    batch = processor(images=picture)
    assert sorted(batch) == ["media_types", "pixel_values"]
    batch = processor(text=["a", "the b"])
    assert sorted(batch) == ["attention_mask", "input_ids", "media_types"]
    assert batch["media_types"].tolist() == [-1, -1]
    assert sorted(processor(images=picture, task="image_captioning")) == [
        "attention_mask", "input_ids", "media_types", "pixel_values",
    ]  # fmt: skip


def test_texts_get_their_leading_space(processor):
    assert torch.equal(processor(text="the bus")["input_ids"], processor(text=" the bus")["input_ids"])
    assert processor(text="  the")["input_ids"].shape[1] == processor(text=" the")["input_ids"].shape[1] + 1
    assert processor(text="")["input_ids"].tolist() == [[0, 2]]


def test_padding_truncation_and_kinds_of_tensors(processor):
    texts = ["the", "the bus"]
    padded = processor(text=texts, padding="max_length", max_length=20)
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (2, 20)
    cut = processor(text=texts, truncation=True, max_length=4)["input_ids"]
    assert cut.shape == (2, 4)
    assert cut[1, -1] == 2
    with pytest.raises(ValueError, match="make no batch without padding"):
        processor(text=texts, padding=False)
    assert isinstance(processor(text=texts, return_tensors="np")["input_ids"], np.ndarray)
    with pytest.raises(ValueError, match="expected return_tensors to be 'pt' or 'np'; got 'tf'"):
        processor(text=texts, return_tensors="tf")


# ---------------------------------------------------------------------------------------------- targets of the model


def test_targets_become_labels_and_what_the_decoder_sees(processor):
    encode = processor.tokenizer
    batch = processor(text=["a", "b"], targets=["the", "the bus"])
    rows = [encode(" the").input_ids, encode(" the bus").input_ids]
    length = len(rows[1]) - 1
    for row, ids in enumerate(rows):
        used = len(ids) - 1
        assert batch["labels"][row].tolist() == ids[1:] + [-100] * (length - used)
        assert batch["decoder_input_ids"][row].tolist() == ids[:-1] + [1] * (length - used)


@pytest.mark.parametrize(("prompt_type", "with_end"), [("prev_output", False), ("src", True)])
def test_a_question_may_start_the_decoder(processor, picture, prompt_type, with_end):
    given = {"images": [picture, picture], "task": "question_answering", "text": ["is it the bus", "why?"]}
    sources = [processor.tokenizer(text).input_ids for text in (" is it the bus?", " why?")]
    starts = [ids if with_end else ids[:-1] for ids in sources]
    answers = [processor.tokenizer(text).input_ids[1:] for text in (" yes", " no one")]
    batch = processor(**given, targets=["yes", "no one"], prompt_type=prompt_type)
    for row, (start, answer) in enumerate(zip(starts, answers, strict=True)):
        used = len(start) + len(answer) - 1
        assert batch["decoder_input_ids"][row, :used].tolist() == start + answer[:-1]
        assert batch["labels"][row, :used].tolist() == [-100] * (len(start) - 1) + answer
        assert (batch["labels"][row, used:] == -100).all()
    prefix = processor(**given, prompt_type=prompt_type)
    assert "labels" not in prefix
    for row, start in enumerate(starts):
        assert prefix["decoder_input_ids"][row].tolist() == start + [1] * (max(map(len, starts)) - len(start))


def test_image_codes_are_targets(processor):
    codes = torch.tensor([[3, 0, 15, 7], [1, 1, 2, 2]])
    batch = processor(task="text_to_image", text=["the bus", "a"], targets=codes)
    assert batch["labels"].tolist() == [[FIRST_CODE + i for i in row] + [2] for row in codes.tolist()]
    assert batch["decoder_code_mask"].tolist() == [True, True]
    assert "decoder_code_mask" in processor(task="text_to_image", text="the bus")
    assert "decoder_code_mask" not in processor(text="the bus", targets="a")
    assert torch.equal(processor.post_process_image_codes(batch["labels"]), codes.view(2, 2, 2))
    many = torch.zeros(1, 1024, dtype=torch.long)  # more than the text positions of this model
    for truncation in (False, True):
        batch = processor(task="text_to_image", text="a", targets=many, truncation=truncation)
        assert batch["labels"].shape == (1, 1025)


def test_codes_that_make_no_image(processor):
    with pytest.raises(ValueError, match="row 0 has 3 tokens, of which 0 are no codes"):
        processor.post_process_image_codes(torch.tensor([[0, FIRST_CODE, FIRST_CODE, FIRST_CODE, 2]]))
    with pytest.raises(ValueError, match="row 1 has 1 tokens, of which 1 are no codes"):
        processor.post_process_image_codes(torch.tensor([[0, FIRST_CODE, 2], [0, FIRST_BIN, 2]]))
    with pytest.raises(ValueError, match="row 0 has 0 tokens"):
        processor.post_process_image_codes(torch.tensor([[0, 2]]))


# ------------------------------------------------------------------------------------------------------------ boxes


def test_boxes_are_tokens_of_a_text_or_a_target(processor, picture):
    boxes = torch.tensor([[0.0, 0.0, 100.0, 60.0], [25.0, 15.0, 50.0, 30.0]])
    bins = [[0, 0, 125, 125], [31, 31, 62, 62]]  # 64 of 512 pixels are 125 of 999
    names = ["".join(f"<bin_{i}>" for i in row) for row in bins]
    captions = processor(images=[picture] * 2, task="grounded_captioning", boxes=boxes, targets=["the bus", "a"])
    sources = [processor.tokenizer(f"  what does the region describe? region:{name}").input_ids for name in names]
    assert captions["input_ids"].tolist() == sources
    grounding = processor(images=[picture] * 2, task="visual_grounding", text=["the bus", "a"], boxes=boxes)
    assert (grounding["labels"][:, :4] - FIRST_BIN).tolist() == bins
    assert grounding["labels"][:, 4].tolist() == [2, 2]
    own = processor(images=[picture] * 2, text=["where {box}", "what"], boxes=[boxes[0], None])
    assert own["input_ids"][0, -5:].tolist() == [FIRST_BIN + i for i in bins[0]] + [2]


def test_boxes_and_back(processor, picture):
    boxes = torch.tensor([[3.2, 7.0, 55.5, 41.9], [0.0, 0.0, 100.0, 60.0]])
    batch = processor(images=[picture] * 2, task="visual_grounding", text=["a", "b"], boxes=boxes, size=512)
    generated = torch.cat([torch.zeros(2, 1, dtype=torch.long), batch["labels"]], dim=1)
    back = processor.post_process_grounding(generated, [(60, 100)] * 2, size=512)
    assert (back - boxes).abs().max() < 100 / 999
    wrong = torch.tensor([[0, FIRST_BIN, 9, FIRST_BIN, FIRST_BIN, 2], [0, FIRST_BIN, FIRST_BIN, 2, 1, 1]])
    assert processor.post_process_grounding(wrong, [(60, 100)] * 2).isnan().all()
    with pytest.raises(ValueError, match=r"expected 2 pairs of height and width; got \(1, 2\)"):
        processor.post_process_grounding(wrong, [(60, 100)])


@pytest.mark.parametrize(
    "box", [[-5, 0, 10, 10], [0, 0, 102, 10], [0, 0, 10, 70], [50, 10, 20, 30], [math.nan, 0, 10, 10]]
)
def test_a_box_outside_its_image(processor, picture, box):
    with pytest.raises(ValueError, match=r"inside its picture of 100 × 60 pixels .* row 1 has"):
        processor(images=[picture] * 2, task="visual_grounding", text=["a", "b"], boxes=[[0, 0, 9, 9], box])


def test_a_box_that_is_rounded_over_the_edge_is_clipped():
    bins = bins_of_boxes(torch.tensor([[-0.4, 0.0, 100.6, 60.0]]), torch.tensor([[60, 100]]), 512)
    assert bins.tolist() == [[0, 0, 999, 999]]


def test_boxes_that_cannot_be(processor, picture):
    with pytest.raises(ValueError, match=r"at most 512 pixels with boxes .* got 640"):
        processor(images=picture, task="visual_grounding", text="a", boxes=[0, 0, 9, 9], size=640)
    with pytest.raises(ValueError, match="row 0 has a box and no image"):
        processor(task="grounded_captioning", boxes=[[0, 0, 9, 9]])
    with pytest.raises(ValueError, match="row 0 has 3"):
        processor(images=picture, task="grounded_captioning", boxes=[[0, 0, 9]])
    with pytest.raises(ValueError, match=r"row 0 has {box} in its text and no box"):
        processor(images=picture, task="grounded_captioning")


# -------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_says_what_is_wrong(processor, picture, clip, sound):
    corrupt = io.BytesIO()
    picture.resize((300, 300)).save(corrupt, format="JPEG")
    corrupt = corrupt.getvalue()[:700]
    cases = [
        ({}, "expected text, images, videos or audio; got none"),
        ({"text": []}, "expected text, images, videos or audio; got none"),
        ({"images": corrupt, "text": "a"}, "cannot decode 700 bytes as a picture: .*truncated"),
        ({"videos": [[]], "text": "a"}, "the clip is an empty video: it has no frames"),
        ({"videos": b"", "text": "a"}, "is empty: there is nothing to decode"),
        ({"audio": np.zeros(0), "text": "a"}, "the sound is empty: it has no samples"),
        ({"audio": [], "text": []}, "got none"),
        ({"images": [picture] * 2, "text": "a"}, "expected one entry a row .* got 2 in images, 1 in text"),
        ({"images": [[picture, picture]], "text": "a"}, "row 0 has 2 images; a row takes one"),
        ({"images": [picture], "audio": [sound], "text": "a"}, "row 0 has entries in images and audio"),
        ({"text": "the bus " * 80}, r"text of row 0 has \d+ tokens and the model has 96 text positions"),
        ({"text": ["a", "b"], "targets": ["c", "why " * 90]}, "target of row 1 has .* 96 text positions"),
        (
            {"text": "is it" * 14, "targets": "why " * 10, "prompt_type": "src"},
            "target of row 0 has .* 96 text positions",
        ),
        ({"text": ["a", 5]}, "expected a string for every row; row 1 has int"),
        ({"text": 5, "task": "question_answering"}, "expected a string, or one for every row; got int"),
        ({"text": "a", "images": picture, "size": {"height": 32, "width": 64}}, "expected size to be a square, .*64"),
        ({"text": "a", "images": picture, "size": {"shortest_edge": 32}}, "expected size to be a square, .*'shortest"),
        ({"text": "a", "images": picture, "size": 0}, "expected a size of at least 1 pixel; got 0"),
        ({"text": "a", "videos": clip, "num_frames": 0}, "expected at least one frame to take"),
        ({"text": "a", "task": "text_to_image", "targets": [[3, 16, 0, 1]]}, "codes from 0 to 15 .* row 0 has others"),
        ({"text": ["a", "b"], "targets": [[3, 2, 0, 1], "c"]}, "codes from 0 to 15 .* row 1 has others"),
        ({"text": "a", "task": "text_to_image", "targets": ["3 2 0 1"]}, "codes from 0 to 15 .* row 0 has others"),
        ({"text": "a", "task": "text_to_image", "targets": [None]}, "codes from 0 to 15 .* row 0 has others"),
        ({"text": "a", "task": "question_answering", "targets": [3]}, "string for every row; row 0 has list"),
        (
            {"text": ["a", "b"], "task": "question_answering", "targets": ["yes", None]},
            "expected a string for every row; row 1 has NoneType",
        ),
        (
            {"images": picture, "task": "image_captioning", "targets": [None]},
            "string for every row; row 0 has NoneType",
        ),
        ({"images": picture, "task": "question_answering"}, "'question_answering' takes question; pass it as text"),
        ({"images": picture, "task": "image_captioning", "text": "a"}, "takes no text; its instruction is ' what does"),
        ({"images": picture, "task": "captions"}, "there is no task 'captions'"),
        ({"text": "a", "prompt_type": "answer"}, "expected prompt_type to be one of .* got 'answer'"),
        ({"images": picture, "prompt_type": "src"}, "starts the decoder with the text; there is none"),
    ]
    for given, words in cases:
        with pytest.raises(ValueError, match=words):
            processor(**given)


def test_a_tokenizer_without_codes_and_bins(picture):
    from transformers import BartTokenizer

    vocab, merges = tiny_vocabulary()
    plain = UnivalProcessor(UnivalImageProcessor(), UnivalFeatureExtractor(), BartTokenizer(vocab=vocab, merges=merges))
    with pytest.raises(ValueError, match="the tokenizer has no <bin_0>: make it with build_tokenizer"):
        plain(images=picture, task="visual_grounding", text="a", boxes=[0, 0, 9, 9])


# ------------------------------------------------------------------------------------------------ saving, chats


@pytest.mark.usefixtures("auto_image_processor")
def test_saved_and_loaded(processor, picture, clip, sound, tmp_path):
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor

    processor = tiny_processor(resize_frames=False)
    processor.save_pretrained(tmp_path)
    given = {"images": [picture, None, None], "videos": [None, clip, None], "audio": [None, None, sound]}
    first = processor(**given, text=["a", "b", "the c"])
    for auto in (UnivalProcessor, AutoProcessor):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is UnivalProcessor
        assert loaded.num_frames == 4
        assert loaded.resize_frames is False
        assert loaded.chat_template == CHAT_TEMPLATE
        second = loaded(**given, text=["a", "b", "the c"])
        assert set(first) == set(second)
        for name in first:
            assert torch.equal(first[name], second[name]), name
    assert AutoImageProcessor.from_pretrained(tmp_path).size["height"] == 32
    assert AutoFeatureExtractor.from_pretrained(tmp_path).num_samples == 100


REMOTE = """
import sys
sys.modules["hf_vlmerge"] = None
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
USE = """
import numpy
clip = numpy.arange(6 * 16 * 16 * 3).reshape(6, 16, 16, 3) % 256
given = {"images": [clip[0], None, None], "videos": [None, clip, None], "audio": [None, None, numpy.ones(9)]}
batch = processor(**given, text=["a", "b", "c <bin_7>"], sampling_rate=500)
print({name: (tuple(value.shape), value.double().sum().item()) for name, value in sorted(batch.items())})
"""


def test_without_the_package_the_code_in_the_folder_does_the_same(processor, tmp_path, capsys):
    from hf_vlmerge.auto import add_remote_code
    from hf_vlmerge.models.unival.configuration_unival import UnivalConfig

    processor.save_pretrained(tmp_path / "model")
    UnivalConfig(towers=[]).save_pretrained(tmp_path / "model")
    add_remote_code(tmp_path / "model")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", "-c", REMOTE + USE, str(tmp_path / "model")]
    remote = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert remote.returncode == 0, remote.stderr
    exec(USE, {"processor": processor})
    assert remote.stdout == capsys.readouterr().out


def test_a_chat_is_the_text_of_its_messages(processor, picture, clip):
    def chat(*parts):
        return [{"role": "user", "content": list(parts)}]

    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    image, words = {"type": "image", "image": picture}, {"type": "text", "text": "the bus?"}
    batch = processor.apply_chat_template(chat(image, words), **options)
    expected = processor(images=picture, text=" the bus?")
    assert set(batch) == set(expected)
    for name in expected:
        assert torch.equal(batch[name], expected[name]), name
    alone = processor.apply_chat_template(chat(image), **options)
    assert torch.equal(alone["input_ids"], processor(task="image_captioning", images=picture)["input_ids"])
    rows = [chat(image, words), chat({"type": "text", "text": "a"}), chat({"type": "video", "video": clip}, words)]
    assert processor.apply_chat_template(rows, **options)["media_types"].tolist() == [0, -1, 1]


def chat(*parts) -> list[dict]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "the bus?"}]}]


@pytest.mark.parametrize("key", ["own", "url", "path"])
def test_media_of_chats_may_be_files(processor, picture, clip, sound, key, tmp_path):
    """All kinds in one batch; one chat has none."""
    files = {kind: tmp_path / f"a.{ending}" for kind, ending in (("image", "png"), ("video", "gif"), ("audio", "wav"))}
    picture.save(files["image"])
    frames = [PIL.Image.fromarray(frame) for frame in clip]
    frames[0].save(files["video"], save_all=True, append_images=frames[1:])
    soundfile.write(files["audio"], sound, 1000, subtype="FLOAT")
    rows = [chat({"type": kind, kind if key == "own" else key: str(file)}) for kind, file in files.items()]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    found = processor.apply_chat_template([*rows, chat()], **options)
    assert found["media_types"].tolist() == [0, 1, 2, -1]
    named = {"images": "image", "videos": "video", "audio": "audio"}
    places = {name: [None] * 4 for name in named}
    for row, (name, kind) in enumerate(named.items()):
        places[name][row] = files[kind]
    expected = processor(text=[" the bus?"] * 4, **places)
    assert set(found) == set(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_options_and_forms_of_chats(processor, picture, clip, sound):
    options = {"tokenize": True, "return_dict": True}
    found = processor.apply_chat_template(chat({"type": "video", "video": clip}), num_frames=6, **options)
    assert found["pixel_values_videos"].shape[1] == 6
    named = processor.apply_chat_template(
        chat({"type": "video", "video": clip}), processor_kwargs={"num_frames": 6, "frame_size": 8}, **options
    )
    assert named["pixel_values_videos"].shape == (1, 6, 3, 8, 8)
    row = {"array": np.repeat(sound, 2), "sampling_rate": 2000}
    found = processor.apply_chat_template(chat({"type": "audio", "audio": row}), **options)
    assert torch.equal(found["input_values"], processor(audio=row, text="a")["input_values"])
    file = io.BytesIO()
    picture.save(file, format="PNG")
    link = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    for part in ({"type": "image_url", "image_url": {"url": link}}, {"type": "image", "base64": link}):
        pixels = processor.apply_chat_template(chat(part), **options)["pixel_values"]
        assert torch.equal(pixels, processor(images=picture, text="a")["pixel_values"])
    ids = processor.apply_chat_template(chat(), tokenize=True)
    assert torch.equal(ids, processor(text=" the bus?")["input_ids"])
    assert processor.apply_chat_template([chat(), chat({"type": "image"})]) == [" the bus?"] * 2
    with pytest.raises(ValueError, match="chat 1 has 2 media; a row takes one"):
        two = chat({"type": "audio", "audio": sound}, {"type": "image", "image": picture})
        processor.apply_chat_template([chat(), two], **options)


def test_generated_text_is_decoded(processor):
    ids = processor.tokenizer([" the bus", " a"], padding=True, return_tensors="pt").input_ids
    assert processor.post_process_image_text_to_text(ids) == [" the bus", " a"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == [" the bus", " a"]


# ------------------------------------------------------------------------------------------------------ with a model


@pytest.fixture(scope="module")
def model():
    from hf_vlmerge.models.unival.modeling_unival import UnivalForConditionalGeneration

    sizes = {
        "vocab_size": 1280,
        "audio_window": 32,
        "audio_hop": 2,
        "audio_sample_rate": 1000,
        "audio_max_frequency": 500,
    }
    return tiny_model(UnivalForConditionalGeneration, max_position_embeddings=96, **sizes)


def test_the_model_takes_what_the_processor_gives(processor, model, picture, clip, sound):
    texts, answers = ["a bus", "what", "the sound", "only text"], ["yes", "the", "no", "b c"]
    media = {
        "images": [picture, None, None, None],
        "videos": [None, clip, None, None],
        "audio": [None, None, sound, None],
    }
    batch = processor(text=texts, targets=answers, **media)
    with torch.no_grad():
        mixed = model(**batch)
        assert mixed.loss.isfinite()
        for row in range(4):
            given = {name: value[row] for name, value in media.items() if value[row] is not None}
            single = processor(text=texts[row], targets=answers[row], **given)
            logits = model(**single).logits[0]
            torch.testing.assert_close(mixed.logits[row, : len(logits)], logits, rtol=0, atol=2e-5)
        generated = model.generate(**processor(text=texts, **media), max_new_tokens=3, do_sample=False)
    assert generated.shape[0] == 4


def test_the_pipeline_for_images_and_text(processor, model, picture):
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"max_new_tokens": 3, "return_full_text": False}
    plain = pipe(picture, text=" what does the image describe?", **options)[0]["generated_text"]
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}]}]
    assert pipe(text=chat, **options)[0]["generated_text"] == plain
    pair = pipe([picture, picture], text=[" what does the image describe?", " a"], batch_size=2, **options)
    assert pair[0]["generated_text"] == plain


# --------------------------------------------------------------------------------------------------------- real data


def test_rows_of_real_datasets(shared, tokenizer):
    from pyarrow import parquet

    def rows(name):
        return parquet.read_table(shared / "data" / name / "validation.parquet").slice(0, 4).to_pylist()

    processor = tiny_processor(frame_size=64, num_frames=8)
    sprites, sounds, pictures, cells = (rows(n) for n in ("sprite_video", "audio_esc10", "nlvr", "bccd_cells"))
    batch = processor(videos=[row["frames"] for row in sprites], task="video_captioning", targets=["a"] * 4)
    assert batch["pixel_values_videos"].shape == (4, 8, 3, 64, 64)
    first = np.asarray(PIL.Image.open(io.BytesIO(sprites[0]["frames"][0]["bytes"])).convert("RGB")).copy()
    assert torch.equal(batch["pixel_values_videos"][0, 0], (torch.from_numpy(first).permute(2, 0, 1) / 255 - 0.5) / 0.5)
    batch = UnivalFeatureExtractor(sampling_rate=48000)([row["audio"] for row in sounds])
    assert batch["input_values"].shape == (4, 480000)
    assert torch.equal(batch["input_values"][:, :240000], batch["input_values"][:, 240000:])  # 5 s, twice
    batch = processor(images=[row["image"] for row in pictures], text=[row["questions"][0] for row in pictures])
    assert batch["pixel_values"].shape == (4, 3, 32, 32)
    boxes = [row["boxes"][0] for row in cells]
    batch = processor(
        images=[row["image"] for row in cells], task="visual_grounding", text=["a cell"] * 4, boxes=boxes, size=512
    )
    back = processor.post_process_grounding(batch["labels"], [(192, 256)] * 4, size=512)
    assert (back - torch.tensor(boxes)).abs().max() < 256 / 999
