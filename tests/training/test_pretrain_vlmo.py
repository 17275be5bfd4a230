"""What the scripts of VLMo share: images reach the model as the saved processor will make them."""

import importlib
from pathlib import Path

import pytest
import torch
from PIL import Image

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
