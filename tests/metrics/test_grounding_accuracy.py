import numpy as np
import pytest

from hf_vlmerge.metrics import grounding_accuracy

BOX = [0.0, 0.0, 2.0, 2.0]


def test_a_box_counts_from_an_overlap_of_one_half_on():
    said = [BOX, [0, 0, 1, 2], [0, 0, 0.9, 2], [3, 3, 4, 4], [2, 2, 0, 0], [np.nan] * 4]
    scores = grounding_accuracy(said, [BOX] * 6, per_item=True)
    assert scores["items"] == [1, 1, 0, 0, 0, 0]
    assert scores["grounding_accuracy"] == pytest.approx(1 / 3)
    assert grounding_accuracy(said, [BOX] * 6, threshold=0.45)["grounding_accuracy"] == 0.5


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"expected two arrays \(items, 4\)"):
        grounding_accuracy([BOX], [BOX, BOX])
