"""What the scripts of VLMo share: images reach the model as the saved processor will make them."""

import importlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_vlmerge.data.collators import VlmoRetrievalCollator

SCRIPTS = Path(__file__).resolve().parents[2] / "training_scripts"


@pytest.mark.parametrize("own", [{}, {"image_mean": 1.0}])
def test_pixels_are_those_of_the_processor(monkeypatch, own):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    settings = {"model": {"image_size": 8, "max_text_length": 4}, "vocabulary": {"columns": ["text"], "size": 40}}
    experiment = importlib.import_module("pretrain_vlmo").Experiment(settings | own, "nowhere")
    experiment.train = [{"text": "a red square"}]
    red = Image.new("RGB", (8, 8), (255, 0, 51))
    expected = experiment.processor(images=red)["pixel_values"]
    image = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(-1, -1, 8, 8)
    torch.testing.assert_close(experiment.pixels(image), expected)
    assert expected.max() == (0 if own else 1)


def test_the_augmentation_of_a_stage_changes_its_batches_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    settings = {"model": {"image_size": 8, "max_text_length": 4}, "vocabulary": {"columns": ["text"], "size": 40}}
    experiment = importlib.import_module("pretrain_vlmo").Experiment(settings, "nowhere")
    experiment.train = [{"text": "black", "pixel_values": torch.zeros(3, 8, 8, dtype=torch.uint8)}] * 64
    plain = experiment.collator(VlmoRetrievalCollator, "text")(experiment.train)["pixel_values"]
    hidden = experiment.collator(VlmoRetrievalCollator, "text", {"strength": 0.0, "hidden": 1.0})(experiment.train)
    assert (plain == -1).all()
    assert set(hidden["pixel_values"].unique().tolist()) == {-1.0, 1.0}
