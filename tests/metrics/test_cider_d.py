import numpy as np
import pytest

from hf_vlmerge.metrics import cider_d

REFERENCES = [["a red box on a table", "one red box"], ["a man walks to the left"], ["two dogs bark"]]


def test_a_perfect_caption_has_ten_and_one_without_common_words_has_nothing():
    scores = cider_d(
        ["two dogs bark", "a man walks to the left", "zebra"], [*REFERENCES[:0:-1], ["one red box"]], per_item=True
    )
    assert scores["items"][0] == pytest.approx(10 * 3 / 4)  # three words have no run of four
    assert scores["items"][1] == pytest.approx(10)
    assert scores["items"][2] == 0
    assert scores["cider_d"] == pytest.approx(np.mean(scores["items"]))


def test_the_formula_on_one_word_by_hand():
    # idf: "b" is in one of two documents, "a" in both (weight 0). Runs of one word only; equal lengths.
    (score, _) = cider_d(["b b"], [["b"]]), None
    assert score["cider_d"] == 0  # with a single item every weight is log 1
    items = cider_d(["b c", "a"], [["b"], ["c"]], per_item=True)["items"]
    # prediction (b: log 2, c: log 2), reference (b: log 2): cosine 1 / sqrt 2 for n = 1, one pair of words against none
    assert items[0] == pytest.approx(10 / 4 / np.sqrt(2) * np.exp(-1 / 72))


def test_repetition_is_clipped():
    once, twice = (
        cider_d([text, "x"], [["red box"], ["x"]], per_item=True)["items"][0] for text in ("red box", "red red box")
    )
    assert twice < once


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="2 predictions, 1 lists"):
        cider_d(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="item 1 has no reference"):
        cider_d(["a", "b"], [["a"], []])
