"""Pairs in memory give whole batches."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from hf_vlmerge.data.collators import VlmoPreTrainingCollator
from hf_vlmerge.data.memory import PairsInMemory
from hf_vlmerge.data.shapes import ShapesDataset
from hf_vlmerge.data.tokenizer import train_wordpiece


@pytest.fixture(scope="module")
def scenes():
    return ShapesDataset(12, image_size=16).arrays()


def test_batches_are_the_rows(scenes):
    images, columns = scenes
    tokenizer = train_wordpiece(columns["text"])
    pairs = PairsInMemory(images, columns["text"], tokenizer)
    loader = DataLoader(
        Subset(pairs, range(4, 12)), batch_size=4, collate_fn=VlmoPreTrainingCollator(tokenizer, seed=0)
    )
    first, second = loader
    assert torch.equal(second["input_ids"], pairs[8:12]["input_ids"])
    assert first["pixel_values"].shape == (4, 3, 16, 16)
    assert np.allclose(first["pixel_values"][1].permute(1, 2, 0), images[5] / 127.5 - 1, atol=1e-6)
    text = tokenizer.decode(pairs[7]["input_ids"], skip_special_tokens=True)
    assert text.replace(" ", "") == columns["text"][7].replace(" ", "")


def test_one_text_an_image(scenes):
    with pytest.raises(ValueError, match="12 images and 1 texts"):
        PairsInMemory(scenes[0], ["a circle"], train_wordpiece(["a circle"]))
