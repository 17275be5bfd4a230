"""Exact parameter counts at full size, built on the meta device.

The integers of the original count tensors that no output depends on: absolute text positions (40 x 768), the mask
token (768) and the temporal position table (2 x 144), together 31 776. The figures of the paper's table 4 (217, 151,
184, 118, 118 million) are about 1.9 million above its trainable parameters; they agree with parameters plus saved
index buffers of VQA at 384 px.
"""

import pytest
import torch

from hf_vlmerge.models.vlmo.configuration_vlmo import VlmoConfig
from hf_vlmerge.models.vlmo.modeling_vlmo import (
    VlmoForImageAndTextRetrieval,
    VlmoForPreTraining,
    VlmoForQuestionAnswering,
)
from tests.models.vlmo.tiny import ARCHITECTURES

UNUSED = 40 * 768 + 768 + 2 * 144
ORIGINAL = {  # modality_specific, custom_attention, custom_ffn, custom_layer_norm, modality_agnostic
    (VlmoForQuestionAnswering, 480): (215_495_865, 149_360_313, 182_411_961, 116_319_417, 116_276_409),
    (VlmoForQuestionAnswering, 384): (215_312_697, 149_177_145, 182_228_793, 116_136_249, 116_093_241),
    (VlmoForQuestionAnswering, 224): (215_099_577, 148_964_025, 182_015_673, 115_923_129, 115_880_121),
    (VlmoForPreTraining, 224): (235_530_430, 169_394_878, 202_446_526, 136_353_982, 136_310_974),
    (VlmoForImageAndTextRetrieval, 384): (210_498_817, 144_363_265, 177_414_913, 111_322_369, 111_279_361),
}


@pytest.mark.parametrize("position", range(5), ids=ARCHITECTURES)
@pytest.mark.parametrize(("model_class", "image_size"), ORIGINAL)
def test_parameters_are_the_originals_minus_the_unused_ones(model_class, image_size, position):
    expert_modules = list(ARCHITECTURES.values())[position]
    with torch.device("meta"):
        model = model_class(VlmoConfig(expert_modules=expert_modules, image_size=image_size, num_labels=3129))
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert UNUSED == 31_776
    assert counted == ORIGINAL[model_class, image_size][position] - UNUSED
    if (model_class, image_size) == (VlmoForQuestionAnswering, 480):
        assert counted == (215_464_089, 149_328_537, 182_380_185, 116_287_641, 116_244_633)[position]


def test_the_papers_figures_include_index_buffers():
    """Saved buffers at grid g with L = g^2 + 1 and T = 40: 4 L^2 + 2 (T + L)^2 + T^2 + T."""
    tokens = 24**2 + 1
    buffers = 4 * tokens**2 + 2 * (40 + tokens) ** 2 + 40**2 + 40
    totals = [parameters + buffers for parameters in ORIGINAL[VlmoForQuestionAnswering, 384]]
    assert [int(total / 1e6 + 0.5) for total in totals] == [217, 151, 184, 118, 118]
