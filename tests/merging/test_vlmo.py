"""Merging VLMo checkpoints: what is written loads without a missing key and computes what it should."""

import pytest
import torch
from safetensors.torch import load_file

from hf_vlmerge import VlmoConfig, VlmoForPreTraining
from hf_vlmerge.conversion.convert_vlmo_to_hf import convert_to_hf
from hf_vlmerge.conversion.specialise import specialise
from hf_vlmerge.merging import MergeError, get_merge_method, list_merge_methods, merge, open_source

VARIANTS = {
    "modality_specific": ["attention", "ffn", "layer_norm"],
    "custom_attention": ["attention"],
    "custom_ffn": ["ffn"],
    "custom_layer_norm": ["layer_norm"],
    "modality_agnostic": [],
}
TINY = {
    "vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 16, "patch_size": 8, "max_text_length": 6, "num_text_positions": 8, "num_fusion_layers": 1,
}  # fmt: skip
OUTPUTS = ("logits_per_image", "itm_logits", "mlm_logits", "image_embeds", "text_embeds")


def load(folder):
    """Load what was merged; nothing may be missing, unexpected or of another shape."""
    model, info = VlmoForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
def outputs(model, batch):
    batch = {**batch, "mlm_input_ids": batch["input_ids"]}
    pairs = torch.arange(len(batch["input_ids"]))
    negatives = {"negative_image_index": pairs.roll(1), "negative_text_index": pairs.roll(1)}
    result = model(**batch, **negatives)
    return [getattr(result, name) for name in OUTPUTS]


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(3)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    return {
        "input_ids": torch.randint(1, 31, (2, 6)),
        "attention_mask": mask,
        "pixel_values": torch.randn(2, 3, 16, 16),
    }


def noisy(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """A seed, and the models of all variants whose experts are copies of it."""
    folder = tmp_path_factory.mktemp("vlmo")
    torch.manual_seed(0)
    noisy(VlmoForPreTraining(VlmoConfig(**TINY, expert_modules=[]))).save_pretrained(folder / "seed")
    state = open_source(folder / "seed")
    for name, modules in VARIANTS.items():
        model = VlmoForPreTraining(VlmoConfig(**TINY, expert_modules=modules))
        model.load_state_dict(specialise(dict(state), modules, TINY["num_fusion_layers"]) if modules else dict(state))
        model.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("method", list_merge_methods())
@pytest.mark.parametrize("variant", VARIANTS)
def test_experts_that_are_copies_merge_into_the_model_they_were_copied_from(seeds, variant, method, batch, tmp_path):
    recipe = {"merge_method": method, "experts_of": str(seeds / variant), "base_model": str(seeds / "seed")}
    known = get_merge_method(method)
    if not VARIANTS[variant]:  # no experts to merge: two checkpoints take their place
        models = [
            {"alias": alias, "model": recipe["experts_of"]} for alias in ("vision", "language")[: known.members[1]]
        ]
        recipe = {"merge_method": method, "models": models, "base_model": recipe["base_model"]}
    elif known.members[1] < 3:
        recipe["rules"] = [{"members": ["vision", "language"][: known.members[1]]}]
    given = {}
    if known.statistics:
        weights = open_source(seeds / variant)
        matrices = [k for k in weights if len(weights.shape(k)) == 2]
        given["statistics"] = {f"gram.{k}": torch.eye(weights.shape(k)[1]) for k in matrices}
        given["statistics"] |= {f"fisher.{k}": torch.ones(weights.shape(k)) for k in weights}
        recipe["statistics"] = "statistics"
    merge(recipe, tmp_path / "merged", sources=given, progress=False, fsync=False)
    seed, merged = open_source(seeds / "seed"), open_source(tmp_path / "merged")
    assert merged.keys() == seed.keys() and all(merged[key].equal(seed[key]) for key in seed)
    expected = outputs(load(seeds / variant), batch)
    for ours, theirs in zip(outputs(load(tmp_path / "merged"), batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_model_without_experts_says_so(seeds, tmp_path):
    with pytest.raises(MergeError, match="modality_agnostic has no experts: no key has a component vision, language"):
        merge({"merge_method": "linear", "experts_of": str(seeds / "modality_agnostic")}, tmp_path / "merged")


@pytest.mark.parametrize(
    ("method", "parameters", "golden"),
    [
        ("interpolation", {"ratio": 0.75}, "interpolation.alpha_0.75"),
        ("modality_arithmetic", {"scale": 0.5}, "arithmetic.lambda_0.5.paper_formula"),
        ("modality_arithmetic", {"scale": 0.5, "sequential": True}, "arithmetic.lambda_0.5.as_released_code"),
    ],
)
def test_the_merged_folder_computes_what_the_original_merge_computes(shared, tmp_path, method, parameters, golden):
    """The logits of our merged folder against those of a model built from the original's merged tensors."""
    folder = shared / "goldens" / "vlmo"
    convert_to_hf(folder / "msa.state_dict.safetensors", tmp_path / "msa")
    convert_to_hf(folder / "maa.state_dict.safetensors", tmp_path / "maa")
    recipe = {"experts_of": str(tmp_path / "msa"), "base_model": str(tmp_path / "maa")}
    merge({"merge_method": method, "parameters": parameters, **recipe}, tmp_path / "merged", progress=False)

    blocks = load_file(folder / f"merge.msa.{golden}.safetensors")
    source = load_file(folder / "msa.state_dict.safetensors")
    rest = {key: value for key, value in source.items() if not key.startswith("transformer.blocks.")}
    torch.save({"state_dict": {**rest, **blocks}}, tmp_path / "original.ckpt")
    convert_to_hf(tmp_path / "original.ckpt", tmp_path / "original")

    inputs = load_file(folder / "inputs.safetensors")
    names = {"input_ids": "text_ids", "attention_mask": "text_masks", "pixel_values": "pixel_values"}
    batch = {ours: inputs[theirs] for ours, theirs in names.items()}
    expected = outputs(load(tmp_path / "original"), batch)
    for ours, theirs in zip(outputs(load(tmp_path / "merged"), batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
