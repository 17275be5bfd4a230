"""Layer positions, gradients, filters and values by member."""

import pytest

from hf_vlmerge.merging import MergeError
from hf_vlmerge.merging.weights import ABSENT, Layer, at_position, layer_counts, layer_of, of_member, position, settle


def test_the_layer_is_the_first_number_in_a_name_counted_by_prefix():
    assert layer_of("encoder.layers.11.experts.2.w") == Layer("encoder.layers", 11)
    assert layer_of("embeddings.weight") is None
    counts = layer_counts(["enc.0.w", "enc.2.w", "dec.0.w", "norm.w"])
    assert counts == {"enc": 3, "dec": 1}
    assert [position(n, counts) for n in ("enc.0.w", "enc.1.w", "enc.2.w", "dec.0.w", "norm.w")] == [0, 0.5, 1, 1, 0]


def test_gradients_are_piecewise_linear():
    assert [at_position([0, 1, 0], t) for t in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.5, 0]
    assert at_position([0.3], 0.8) == 0.3 and at_position([2, 4], 0.5) == 3


def test_the_first_filter_that_is_part_of_the_name_wins():
    value = [{"filter": "attn", "value": [0, 1]}, {"filter": "mlp", "value": 0.3}, {"filter": "*", "value": 7}]
    assert settle(value, "layers.1.attn.w", 0.25) == 0.25
    assert settle(value, "layers.1.mlp.w", 0.25) == 0.3 and settle(value, "norm", 0.0) == 7
    assert settle(value[:2], "norm", 0.0) is ABSENT
    assert settle(True, "x", 0.0) is True and settle("sum", "x", 0.0) == "sum"
    for wrong in ([{"filter": "x"}], [{"value": 1, "filtr": "x"}], ["a", "b"]):
        with pytest.raises(MergeError, match="a list is a gradient of numbers or has entries"):
            settle(wrong, "x", 0.0)


def test_values_by_member():
    order = ("vision", "language")
    assert of_member({"vision": 1, "language": [0, 1]}, "language", order, "p") == [0, 1]
    assert of_member([3, 4], "language", order, "p") == 4 and of_member(5, "language", order, "p") == 5
    with pytest.raises(MergeError, match="p: no member is called 'visoin'; did you mean 'vision'"):
        of_member({"visoin": 1}, "vision", order, "p")
    with pytest.raises(MergeError, match="p: the mapping gives no value for member 'language'"):
        of_member({"vision": 1}, "language", order, "p")
