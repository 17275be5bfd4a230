"""Retrieval of a model whose embeddings are known."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_vlmerge.evaluation.retrieval import evaluate_retrieval


class Lookup(nn.Module):
    """Embeds an image as its first pixel's number, one-hot, and a text as its first token, one-hot."""

    def __init__(self):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(()))
        self.calls = 0

    def forward(self, pixel_values=None, input_ids=None, attention_mask=None):
        assert not self.training
        self.calls += 1
        one_hot = nn.functional.one_hot
        if pixel_values is not None:
            return {"image_embeds": one_hot(pixel_values[:, 0, 0, 0].long(), 20).float()}
        return {"text_embeds": one_hot(input_ids[:, 0], 20).float()}


def images(numbers):
    return torch.tensor(numbers, dtype=torch.float)[:, None, None, None].expand(-1, 3, 2, 2)


def texts(numbers):
    ids = torch.tensor(numbers)[:, None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_perfect_and_wrong():
    model = Lookup().train()
    scores = evaluate_retrieval(model, images(range(12)), texts(list(range(12))), batch_size=5)
    assert scores["mean"] == 1
    assert model.calls == 6
    assert model.training
    swapped = evaluate_retrieval(model, images(range(12)), texts([1, 0, *range(2, 12)]))
    assert swapped["tr_r1"] == swapped["ir_r1"] == pytest.approx(10 / 12)


def test_images_with_several_texts():
    scores = evaluate_retrieval(Lookup(), images([3, 4]), texts([3, 9, 4]), [0, 0, 1])
    assert scores["tr_r1"] == 1
    assert scores["ir_r1"] == pytest.approx((1 + 0.5 + 1) / 3)  # text 9 ties between both images


def test_a_processor_makes_tensors():
    processor = SimpleNamespace(seen=[])

    def process(images=None, text=None, return_tensors="pt"):
        processor.seen.append(images or text)
        return texts([int(t) for t in text]) if text else {"pixel_values": images_tensor(images)}

    def images_tensor(numbers):
        return images(numbers)

    scores = evaluate_retrieval(Lookup(), [1, 2, 3], ["1", "2", "3"], processor=process, batch_size=2)
    assert scores["mean"] == 1
    assert processor.seen == [[1, 2], [3], ["1", "2"], ["3"]]


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match="expected image_of_text"):
        evaluate_retrieval(Lookup(), images([1, 2]), texts([1]))
    with pytest.raises(ValueError, match="a processor is needed"):
        evaluate_retrieval(Lookup(), images([1]), ["one"])
