"""Recall by hand, with ties, and as the original computed it."""

import json

import numpy as np
import pytest

import hf_vlmerge.metrics
from hf_vlmerge.metrics import recall_at_k


def test_by_hand():
    similarity = np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1], [0.1, 0.2, 0.7]])
    scores = recall_at_k(similarity, [0, 1, 2], ks=(1, 2))
    assert scores["tr_r1"] == pytest.approx(2 / 3)  # image 1 prefers text 0
    assert scores["tr_r2"] == 1
    assert scores["ir_r1"] == 1
    assert scores["mean"] == pytest.approx((5 / 6 + 1) / 2)


def test_several_texts_an_image():
    similarity = np.array([[0.1, 0.9, 0.5], [0.2, 0.3, 0.4]])
    scores = recall_at_k(similarity, [0, 0, 1], ks=(1,), per_item=True)
    assert scores["tr_items"] == [1, 1]
    assert scores["ir_items"] == [0, 1, 0]  # text 0 prefers image 1, text 2 image 0


def test_ties_count_as_a_random_order_would():
    scores = recall_at_k(np.zeros((10, 10)), np.arange(10), ks=(1, 5))
    assert [scores["tr_r1"], scores["ir_r1"]] == pytest.approx([0.1, 0.1])
    assert [scores["tr_r5"], scores["ir_r5"]] == pytest.approx([0.5, 0.5])
    two_own = recall_at_k(np.zeros((2, 4)), [0, 0, 1, 1], ks=(1, 2))
    assert two_own["tr_r1"] == pytest.approx(0.5)
    assert two_own["tr_r2"] == pytest.approx(1 - 2 / 4 * 1 / 3)
    one_ahead = recall_at_k(np.array([[3.0, 2.0, 2.0], [0.0, 0.0, 0.0]]), [1, 0, 1], ks=(2,))
    assert one_ahead["tr_r2"] == pytest.approx((1 / 2 + 1) / 2)  # one place for two that tie; any of two own texts


def test_as_the_original(shared):
    from safetensors.numpy import load_file

    stored = load_file(shared / "goldens/vlmo/recall.safetensors")
    golden = json.loads((shared / "goldens/vlmo/goldens.json").read_text())["optimizer_and_metrics"]["recall"]
    rows = {int(image): row for row, image in enumerate(stored["image_id"])}
    image_of_text = [rows[int(image)] for image in stored["image_id_of_text"]]
    scores = recall_at_k(stored["image_embeds"] @ stored["text_embeds"].T, image_of_text)
    assert {name: scores[name] for name in golden} == pytest.approx(golden, abs=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="expected similarity"):
        recall_at_k(np.zeros((2, 3)), [0, 1])
    with pytest.raises(ValueError, match="outside the 2 images"):
        recall_at_k(np.zeros((2, 2)), [0, 2])
    with pytest.raises(ValueError, match="NaN"):
        recall_at_k(np.full((2, 2), np.nan), [0, 1])


def test_every_file_is_a_metric():
    assert "recall_at_k" in hf_vlmerge.metrics.__all__
    assert all(callable(getattr(hf_vlmerge.metrics, name)) for name in hf_vlmerge.metrics.__all__)
