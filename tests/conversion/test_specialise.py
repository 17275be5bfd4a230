"""A seed becomes a modality-specific model: all experts start as its shared modules."""

import pytest
import torch

from hf_vlmerge.conversion.specialise import specialise


@pytest.fixture
def tiny():
    from hf_vlmerge import VlmoConfig

    return VlmoConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12, image_size=16,
        patch_size=8, max_text_length=5, num_text_positions=6, num_fusion_layers=1, expert_modules=[],
    )  # fmt: skip


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(1, 11, (2, 5), generator=generator),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
    }


@pytest.mark.parametrize("expert_modules", [["attention", "ffn", "layer_norm"], ["attention"], ["ffn"], ["layer_norm"]])
def test_a_specialised_model_computes_what_its_seed_does(tiny, expert_modules):
    from hf_vlmerge import VlmoForPreTraining

    torch.manual_seed(0)
    seed = VlmoForPreTraining(tiny).eval()
    with torch.no_grad():
        for parameter in seed.parameters():
            parameter.normal_(std=0.3)
    config = type(tiny)(**{**tiny.to_dict(), "expert_modules": expert_modules})
    model = VlmoForPreTraining(config).eval()
    model.load_state_dict(specialise(seed.state_dict(), expert_modules, tiny.num_fusion_layers))
    with torch.no_grad():
        ours, theirs = model(**inputs()), seed(**inputs())
    for name in ("itm_logits", "mlm_logits", "logits_per_image"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-6, rtol=0)


def test_copies_are_separate_and_the_rest_is_untouched():
    shared, scale = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    seed = {"encoder.layers.0.norm1.shared.weight": shared, "encoder.layers.1.norm1.shared.weight": shared + 1}
    seed["encoder.layers.0.layer_scale_1"] = scale
    new = specialise(seed, ["attention"], num_fusion_layers=1)
    assert sorted(new) == [
        "encoder.layers.0.layer_scale_1",
        "encoder.layers.0.norm1.language.weight",
        "encoder.layers.0.norm1.vision.weight",
        "encoder.layers.1.norm1.language.weight",
        "encoder.layers.1.norm1.vision.weight",
        "encoder.layers.1.norm1.vision_language.weight",
    ]
    assert new["encoder.layers.0.layer_scale_1"] is scale
    new["encoder.layers.0.norm1.vision.weight"].zero_()
    assert torch.equal(new["encoder.layers.0.norm1.language.weight"], shared)
    assert torch.equal(shared, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    ("keys", "expert_modules", "message"),
    [
        (["encoder.layers.0.ffn.vision.fc1.weight"], ["ffn"], "must be modality-agnostic.*ffn.vision.fc1.weight"),
        (["encoder.layers.0.ffn.shared.fc1.weight"], ["mlp"], "'mlp'.*expected a subset of attention, ffn, layer_norm"),
        (["transformer.blocks.0.mlp.fc1.weight"], ["ffn"], "has no tensors named"),
    ],
)
def test_a_wrong_seed_is_refused(keys, expert_modules, message):
    with pytest.raises(ValueError, match=message):
        specialise({key: torch.zeros(1) for key in keys}, expert_modules, num_fusion_layers=1)
