"""Batches of UnIVAL from examples with any columns."""

import io
import re
import zipfile

import pytest
import torch
from PIL import Image

from hf_vlmerge.data.media_text import Columns, MediaTextCollator, cut_targets, media_arguments
from hf_vlmerge.data.streaming import NUMBER
from tests.models.unival.tiny_processor import tiny_processor

PICTURE = Image.new("RGB", (40, 20), "red")
EXAMPLE = {"picture": PICTURE, "question": "what colour?", "answer": ["red", "scarlet"], NUMBER: 3}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def said(processor, batch) -> list[str]:
    rows = [row[row >= 0] for row in batch["labels"]]
    return [text.strip() for text in processor.batch_decode(rows, skip_special_tokens=True)]


def test_a_question_is_what_the_processor_makes_of_it(processor):
    columns = Columns({"image": "picture"}, {"question": "question"}, "answer")
    batch = MediaTextCollator(processor, columns, "question_answering")([EXAMPLE])
    expected = processor(images=[PICTURE], text=["what colour?"], task="question_answering", targets=["red"])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_one_of_several_targets_is_drawn_in_training_alone(processor):
    columns = Columns({"image": "picture"}, {"question": "question"}, "answer")
    torch.manual_seed(0)
    drawn = said(processor, MediaTextCollator(processor, columns, "question_answering", random=True)([EXAMPLE] * 16))
    assert set(drawn) == {"red", "scarlet"}
    assert set(said(processor, MediaTextCollator(processor, columns, "question_answering")([EXAMPLE] * 4))) == {"red"}


def test_a_template_names_its_columns(processor):
    columns = Columns({}, {"question": "question"}, "answer", None)
    batch = MediaTextCollator(processor, columns, template="answer this: {question} now")([EXAMPLE])
    assert processor.batch_decode(batch["input_ids"], skip_special_tokens=True) == [" answer this: what colour? now"]
    assert "pixel_values" not in batch


def test_a_template_takes_columns_of_any_name(processor):
    columns = Columns({}, {"meta.q 1": "meta.q 1"}, "answer", None)
    batch = MediaTextCollator(processor, columns, template="{meta.q 1} {x}")([EXAMPLE | {"meta.q 1": "why?"}])
    assert processor.batch_decode(batch["input_ids"], skip_special_tokens=True) == [" why? {x}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "column 'answer' has None; expected a text."),
        ({"answer": [{"answer": "yes"}]}, "column 'answer' has {'answer': 'yes'}; expected a text."),
        ({"question": None}, "column 'question' has None; expected a text."),
    ],
)
def test_what_is_no_text_is_not_learnt(processor, change, message):
    columns = Columns({"image": "picture"}, {"question": "question"}, "answer")
    collator = MediaTextCollator(processor, columns, "question_answering")
    for make in (collator, collator.without_targets):
        with pytest.raises(ValueError, match=re.escape(message)):
            make([EXAMPLE | change])


def test_pictures_in_an_archive_are_opened(processor, tmp_path):
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("a.png", buffer.getvalue())
    there = {"bytes": None, "path": f"zip://a.png::{tmp_path / 'train.zip'}"}
    collator = MediaTextCollator(
        processor, Columns({"image": "picture"}, {"question": "question"}, "answer"), "question_answering"
    )
    expected, found = (collator([EXAMPLE | {"picture": picture}])["pixel_values"] for picture in (PICTURE, there))
    assert torch.equal(found, expected) and collator.without_targets([EXAMPLE | {"picture": there}])["sizes"] == [
        (20, 40)
    ]


def test_boxes_are_said_or_asked_about(processor):
    example = {"picture": PICTURE, "text": "the half", "box": [20.0, 0.0, 40.0, 20.0], "caption": "red", NUMBER: 0}
    grounding = MediaTextCollator(
        processor, Columns({"image": "picture"}, {"text": "text"}, None, "box"), "visual_grounding"
    )
    boxes = processor.post_process_grounding(grounding([example])["labels"], [(20, 40)])
    torch.testing.assert_close(boxes, torch.tensor([example["box"]]), atol=0.5, rtol=0)
    asked = grounding.without_targets([example])
    assert "labels" not in asked["inputs"] and asked["sizes"] == [(20, 40)] and asked["references"] == [example["box"]]

    about = MediaTextCollator(processor, Columns({"image": "picture"}, {}, "caption", "box"), "grounded_captioning")
    batch, asked = about([example]), about.without_targets([example])
    assert said(processor, batch) == ["red"] and asked["references"] == ["red"] and asked["numbers"] == [0]
    assert torch.equal(batch["input_ids"], asked["inputs"]["input_ids"])
    assert "<bin_" in processor.batch_decode(batch["input_ids"])[0]


def test_rows_may_have_different_media(processor):
    sound = torch.zeros(100)
    assert media_arguments([{"image": PICTURE, "audio": None}, {"image": None, "audio": sound}]) == {
        "images": [PICTURE, None],
        "audio": [None, sound],
    }
    columns = Columns({"image": "picture", "audio": "sound"}, {"question": "question"}, "answer")
    rows = [{**EXAMPLE, "sound": None}, {**EXAMPLE, "picture": None, "sound": sound}]
    collator = MediaTextCollator(processor, columns, "question_answering")
    assert collator(rows)["media_types"].tolist() == [0, 2]
    assert collator.without_targets(rows)["sizes"] == [(20, 40), None]


def test_image_codes_are_said_as_they_are(processor):
    columns = Columns({}, {"caption": "question"}, "codes")
    batch = MediaTextCollator(processor, columns, "text_to_image")([{"question": "a cat", "codes": [3, 1, 2, 0]}])
    codes = processor.post_process_image_codes(batch["labels"])
    assert codes.tolist() == [[[3, 1], [2, 0]]] and batch["decoder_code_mask"].tolist() == [True]


def test_long_targets_end_with_the_end_token():
    labels = torch.tensor([[5, 6, 7, 2], [5, 2, -100, -100], [-100, 5, 6, 2]])
    inputs = torch.tensor([[0, 5, 6, 7], [0, 5, 1, 1], [0, 9, 5, 6]])
    cut = cut_targets({"labels": labels, "decoder_input_ids": inputs}, 2, end_token_id=2, pad_token_id=1)
    assert cut["labels"].tolist() == [[5, 2, -100], [5, 2, -100], [-100, 5, 2]]
    assert cut["decoder_input_ids"].tolist() == [[0, 5, 1], [0, 5, 1], [0, 9, 5]]
    whole = cut_targets({"labels": labels, "decoder_input_ids": inputs}, 4, end_token_id=2, pad_token_id=1)
    assert torch.equal(whole["labels"], labels) and torch.equal(whole["decoder_input_ids"], inputs)


def test_lengths_are_cut(processor):
    columns = Columns({}, {"question": "question"}, "answer")
    limits = {"max_source_length": 6, "max_target_length": 3}
    batch = MediaTextCollator(processor, columns, "question_answering", **limits)([EXAMPLE])
    assert batch["input_ids"].shape == (1, 6) and batch["labels"].shape == (1, 3)
    assert batch["labels"][0, -1] == processor.tokenizer.eos_token_id
