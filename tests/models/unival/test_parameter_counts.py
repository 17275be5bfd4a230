"""The full-size model on the meta device: its parameters, and the original name of every one of its tensors."""

import json
from math import prod

import pytest
import torch

from hf_vlmerge.conversion.unival_keys import DROPPED, PREFIX, RECOMPUTED, TIED, original_key, our_key
from hf_vlmerge.models.unival.configuration_unival import UnivalConfig
from hf_vlmerge.models.unival.modeling_unival import UnivalForConditionalGeneration

ORIGINAL, CLASSIFIER = 329_979_120, 2_049_000
MEL_MATRIX = 513 * 64  # a frozen parameter there, a buffer that the configuration determines here


def full_size(**changes) -> UnivalForConditionalGeneration:
    with torch.device("meta"):
        return UnivalForConditionalGeneration(UnivalConfig(**changes))


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameters_are_the_originals_minus_the_unused_classifier():
    model = full_size()
    assert model.model.encoder.audio_tower.mel.numel() == MEL_MATRIX
    assert count(model) + MEL_MATRIX == ORIGINAL - CLASSIFIER == 327_930_120


def test_the_papers_quarter_billion_is_image_and_video():
    """A tower takes its connector (768 x 2048 + 768) and its position table (1765 x 768) along."""
    assert count(full_size(towers=["image", "video"])) == 327_930_120 - 76_560_896 - 1_573_632 - 1_355_520
    assert count(full_size(towers=["image", "video"])) == 248_440_072
    assert count(full_size(towers=["image"])) == 248_440_072 - 47_521_216 - 1_573_632 - 1_355_520


@pytest.fixture(scope="module")
def original_shapes(shared) -> dict[str, list[int]]:
    path = shared / "goldens" / "unival" / "full_size_state_dict_keys.json"
    return {name: shape for name, (shape, _) in json.loads(path.read_text())["keys"].items()}


def test_every_original_key_is_mapped_recomputed_or_dropped(original_shapes):
    assert len(original_shapes) == 1739
    left_out = {name for name in original_shapes if our_key(name) is None}
    assert left_out == TIED.keys() | RECOMPUTED.keys() | DROPPED.keys()
    assert (len(TIED), len(RECOMPUTED), len(DROPPED)) == (2, 6, 4)
    mapped = {our_key(name): name for name in original_shapes.keys() - left_out}
    assert len(mapped) == 1739 - 12

    model = full_size()
    tied = model.all_tied_weights_keys
    ours = {name.removeprefix(PREFIX): tensor for name, tensor in model.state_dict().items() if name not in tied}
    assert ours.keys() == mapped.keys()
    for name, tensor in ours.items():
        assert list(tensor.shape) == original_shapes[mapped[name]], name
        assert original_key(name) == mapped[name]
    assert sum(prod(original_shapes[f"encoder.embed_images.fc.{name}"]) for name in ("weight", "bias")) == CLASSIFIER


@pytest.mark.parametrize("name", ["encoder.layers.0.residual_scale", "decoder.adapter.weight", "criterion.weight"])
def test_an_unknown_key_is_an_error(name):
    with pytest.raises(KeyError, match=name):
        our_key(name)
