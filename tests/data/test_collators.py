"""Collators and the tiny tokenizer."""

import pytest
import torch

from hf_vlmerge.data.collators import (
    VlmoCollator,
    VlmoPreTrainingCollator,
    VlmoQuestionAnsweringCollator,
    VlmoRetrievalCollator,
)
from hf_vlmerge.data.shapes import ShapesDataset
from hf_vlmerge.data.tokenizer import train_wordpiece
from hf_vlmerge.models.vlmo.image_processing_vlmo import VlmoImageProcessor


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(ShapesDataset(300).texts(), 200)


@pytest.fixture(scope="module")
def image_processor():
    return VlmoImageProcessor(size={"height": 16, "width": 16})


def test_tiny_tokenizer(tokenizer, tmp_path):
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert tokenizer.tokenize("A large RED circle") == ["a", "large", "red", "circle"]
    assert tokenizer.decode(tokenizer("two objects")["input_ids"]) == "[CLS] two objects [SEP]"
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again("a small gray cross")["input_ids"] == tokenizer("a small gray cross")["input_ids"]
    with pytest.raises(ValueError, match="none with a word"):
        train_wordpiece([])


def test_pre_training_batch(tokenizer, image_processor):
    examples = [ShapesDataset(8)[i] for i in range(8)]
    batch = VlmoPreTrainingCollator(tokenizer, image_processor, seed=3)(examples)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "mlm_input_ids", "labels"}
    assert batch["pixel_values"].shape == (8, 3, 16, 16)
    assert batch["input_ids"].shape == batch["mlm_input_ids"].shape == batch["labels"].shape
    hidden = batch["labels"] != -100
    assert hidden.any(1).all()
    assert torch.equal(batch["labels"][hidden], batch["input_ids"][hidden])
    again = VlmoPreTrainingCollator(tokenizer, image_processor, seed=3)(examples)
    assert torch.equal(batch["labels"], again["labels"])


def test_ready_tensors_pass_through(tokenizer):
    pixels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    ready = {"input_ids": torch.full((4, 5), 7), "attention_mask": torch.ones(4, 5), "pixel_values": pixels}
    batch = VlmoRetrievalCollator(tokenizer)(ready)
    assert torch.allclose(batch["pixel_values"], (pixels / 255 - 0.5) / 0.5, atol=1e-6)
    assert batch["return_loss"] is True
    rows = [{"input_ids": [2, 5, 3], "pixel_values": p} for p in pixels]
    assert torch.equal(VlmoCollator(tokenizer)(rows)["pixel_values"], batch["pixel_values"])


def test_padding_and_truncation(tokenizer):
    rows = [{"text": text, "pixel_values": torch.zeros(3, 8, 8)} for text in ("a red circle", "a " * 50)]
    assert VlmoCollator(tokenizer, max_length=12)(rows)["input_ids"].shape == (2, 12)
    assert VlmoCollator(tokenizer)(rows[:1])["input_ids"].shape == (1, 5)
    assert VlmoCollator(tokenizer, max_length=12, padding="max_length")(rows[:1])["input_ids"].shape == (1, 12)


def test_one_of_several_captions_is_drawn(tokenizer):
    row = {"captions": ["a red circle", "a small blue square at the top"], "pixel_values": torch.zeros(3, 8, 8)}
    collate = VlmoCollator(tokenizer, text_column="captions", seed=0)
    lengths = {collate([row])["input_ids"].shape[1] for _ in range(20)}
    assert lengths == {5, 9}


def test_answers(tokenizer, image_processor):
    examples = [ShapesDataset(4, task="questions")[i] for i in range(4)]
    batch = VlmoQuestionAnsweringCollator(tokenizer, image_processor)(examples)
    assert batch["labels"].tolist() == [example["label"] for example in examples]
    soft = [{**example, "label": [0.0, 0.3, 1.0]} for example in examples]
    assert VlmoQuestionAnsweringCollator(tokenizer, image_processor)(soft)["labels"].shape == (4, 3)


def test_errors_are_sentences(tokenizer):
    with pytest.raises(ValueError, match="needs an image_processor"):
        VlmoCollator(tokenizer)([ShapesDataset(1)[0]])
    with pytest.raises(ValueError, match="no column 'caption'; it has: image, text"):
        VlmoCollator(tokenizer, text_column="caption")([ShapesDataset(1)[0]])
    with pytest.raises(ValueError, match="padding is 'long'"):
        VlmoCollator(tokenizer, padding="long")
