"""Exact match by hand."""

import pytest

from hf_vlmerge.metrics import exact_match


def test_any_reference_counts_and_case_and_space_do_not():
    scores = exact_match([" Red", "two", "a cat"], [["red"], ["three", "two"], ["a dog"]], per_item=True)
    assert scores["items"] == [1.0, 1.0, 0.0] and scores["exact_match"] == pytest.approx(2 / 3)


def test_numbers_of_items_must_fit():
    with pytest.raises(ValueError, match="got 1 predictions, 0 lists"):
        exact_match(["a"], [])
    with pytest.raises(ValueError, match="got 0 predictions"):
        exact_match([], [])
