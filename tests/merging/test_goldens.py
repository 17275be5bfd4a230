"""Merged weights against the numbers of the original code (tiny VLMo, four layers of which two are fusion layers)."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hf_vlmerge import VlmoForPreTraining
from hf_vlmerge.conversion.convert_vlmo_to_hf import convert_to_hf, convert_to_original
from hf_vlmerge.merging import collect_grams, merge, open_source

# The original names experts v, l, vl and leaves the component out of the merged name.
LAYOUT = {"experts": [{"vision": "v"}, {"language": "l"}, {"vision_language": "vl"}], "merged": ""}
VQA = {"has": "vision_language", "members": ["vision_language"]}


@pytest.fixture
def folder(shared):
    return shared / "goldens" / "vlmo"


def merged(tmp_path, folder, **recipe):
    """Merge the golden checkpoint through a recipe file and return the written blocks."""
    source = folder / "msa.state_dict.safetensors"
    recipe = {"experts_of": str(source), "experts": LAYOUT, **recipe}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merge(tmp_path / "recipe.yaml", tmp_path / "out", progress=False)
    return open_source(tmp_path / "out"), open_source(source)


def compare(written, source, expected):
    golden = load_file(expected)
    assert golden.keys() == {key for key in written if key.startswith("transformer.blocks.")}
    assert max(float((written[key].double() - value).abs().max()) for key, value in golden.items()) < 1e-6
    untouched = [key for key in written if not key.startswith("transformer.blocks.") or "gamma_" in key]
    assert untouched and all(written[key].equal(source[key]) for key in untouched)


def test_interpolation(tmp_path, folder):
    written, source = merged(tmp_path, folder, merge_method="interpolation", parameters={"ratio": 0.75})
    compare(written, source, folder / "merge.msa.interpolation.alpha_0.75.safetensors")


@pytest.mark.parametrize("form", ["paper_formula", "as_released_code"])
def test_modality_arithmetic(tmp_path, folder, form):
    written, source = merged(
        tmp_path,
        folder,
        merge_method="modality_arithmetic",
        base_model=str(folder / "maa.state_dict.safetensors"),
        parameters={"lambda": 0.5, "sequential": form == "as_released_code"},
    )
    compare(written, source, folder / f"merge.msa.arithmetic.lambda_0.5.{form}.safetensors")


def test_regmean_with_the_choice_of_members_for_vqa(tmp_path, folder):
    grams = {}
    for name, gram in load_file(folder / "regmean.grams_msa_vqa.safetensors").items():
        of_attention = name.rpartition(".")[2] in (
            "v",
            "l",
            "vl",
        )  # the input of an attention module is that of its qkv
        grams[f"gram.{name}.qkv.weight" if of_attention else f"gram.{name}.weight"] = gram
    save_file(grams, tmp_path / "grams.safetensors", {"kind": json.dumps("sum")})
    written, source = merged(
        tmp_path,
        folder,
        merge_method="regmean",
        statistics=str(tmp_path / "grams.safetensors"),
        parameters={"gamma": 0.25},
        rules=[VQA],
    )
    compare(written, source, folder / "merge.msa.regmean.gamma_0.25.vqa_grams.vqa_task.safetensors")


def test_the_choice_of_members_for_vqa_takes_the_cross_modal_expert_of_fusion_layers(tmp_path, folder):
    written, source = merged(tmp_path, folder, merge_method="interpolation", rules=[VQA])
    for layer, expert in ((2, "vl"), (3, "vl")):
        name = f"transformer.blocks.{layer}.mlp.{{}}fc1.weight"
        assert written[name.format("")].equal(source[name.format(f"{expert}.")])


def test_regmean_from_grams_that_our_own_hooks_collect(tmp_path, folder):
    convert_to_hf(folder / "msa.state_dict.safetensors", tmp_path / "msa")
    model = VlmoForPreTraining.from_pretrained(tmp_path / "msa")
    inputs = load_file(folder / "regmean.gram_inputs.safetensors")
    names = {"input_ids": "text_ids", "attention_mask": "text_masks", "pixel_values": "pixel_values"}
    batch = {ours: inputs[theirs] for ours, theirs in names.items()}
    joint_pass = lambda model, batch: model.vlmo(**batch)  # noqa: E731
    grams = collect_grams(model, [batch], forward=joint_pass, modules="*.encoder.*", progress=False)

    stored = load_file(folder / "regmean.grams_msa_vqa.safetensors")
    for name, gram in stored.items():
        _, _, layer, module, expert, *leaf = name.split(".")
        module = {"attn": "attention", "mlp": "ffn"}[module]
        expert = {"v": "vision", "l": "language", "vl": "vision_language"}[expert]
        ours = f"vlmo.encoder.layers.{layer}.{module}.{expert}.{leaf[0] if leaf else 'qkv'}.weight"
        torch.testing.assert_close(grams.sums.pop(ours), gram, rtol=1e-4, atol=1e-5)
    assert not grams.sums or all(not gram.any() for gram in grams.sums.values())

    grams = collect_grams(model, [batch], forward=joint_pass, modules="*.encoder.*", progress=False)
    grams.save(tmp_path / "grams.safetensors", dtype=torch.float64)
    recipe = {
        "merge_method": "regmean",
        "experts_of": str(tmp_path / "msa"),
        "statistics": str(tmp_path / "grams.safetensors"),
        "parameters": {"gamma": 0.25},
        "rules": [VQA],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merge(tmp_path / "recipe.yaml", tmp_path / "merged", progress=False)
    convert_to_original(tmp_path / "merged", tmp_path / "merged.ckpt")
    written = open_source(tmp_path / "merged.ckpt")
    golden = load_file(folder / "merge.msa.regmean.gamma_0.25.vqa_grams.vqa_task.safetensors")
    assert max(float((written[key].double() - value).abs().max()) for key, value in golden.items()) < 1e-6
