"""Submodules of one model under the names of another: patterns, reports, and a VLM merged with a text model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_vlmerge.merging import MergeError, Recipe, merge, merge_tensors, open_source, save_checkpoint
from hf_vlmerge.merging.tensors.renamed import RenamedSource

TEXT = {
    "model.embed.weight": torch.arange(6.0).reshape(3, 2),
    "model.layers.0.w": torch.ones(2),
    "score": torch.ones(1),
}
WHOLE = {"language_model.model.embed.weight": torch.zeros(3, 2), "language_model.model.layers.0.w": torch.zeros(2),
         "vision.w": torch.full((2,), 7.0)}  # fmt: skip
RENAME = {"model.*": "language_model.model.*", "score": None}


def recipe(**more):
    models = [{"model": "vlm"}, {"model": "text", "rename": RENAME}]
    rules = [{"match": "vision.*", "keep": "vlm"}]
    return {"merge_method": "linear", "models": models, "rules": rules, **more}


def given():
    return {"vlm": WHOLE, "text": TEXT}


def test_a_submodule_is_merged_and_the_rest_kept_by_a_rule():
    merged = merge_tensors(recipe(), given())
    assert merged.keys() == WHOLE.keys()
    assert merged["language_model.model.embed.weight"].equal(TEXT["model.embed.weight"] / 2)
    assert merged["vision.w"].equal(WHOLE["vision.w"])


def test_the_report_says_what_mapped_to_what():
    source = RenamedSource(open_source({**TEXT, "other": torch.ones(1)}), RENAME)
    assert source.notes == (
        "memory: model.*: 2 tensors are renamed, such as model.embed.weight to language_model.model.embed.weight",
        "memory: score: 1 tensors are left out, such as score",
        "memory: 1 tensors match no pattern and keep their names, such as other",
    )
    report = merge(recipe(), None, sources=given(), dry_run=True)
    assert any(note.startswith("memory: model.*: 2 tensors are renamed") for note in report.notes)


def test_stars_keep_their_texts_and_the_first_pattern_wins():
    source = open_source({"a.0.x.1.y": torch.ones(1), "a.0.z": torch.ones(1), "b": torch.ones(1)})
    view = RenamedSource(source, {"a.*.x.*.y": "c.*.d.*", "a.*": "e.*"})
    assert list(view) == ["c.0.d.1", "e.0.z", "b"] and len(view) == 3
    assert view.read("c.0.d.1").tolist() == [1.0] and view.shape("e.0.z") == (1,) and "a.0.z" not in view
    with pytest.raises(MergeError, match=r"has no tensor a\.0\.z"):
        view.read("a.0.z")


def test_a_renamed_file_is_still_copied_as_it_lies(tmp_path):
    save_file({"model.w": torch.ones(3)}, tmp_path / "model.safetensors")
    source = open_source(tmp_path / "model.safetensors")
    assert RenamedSource(source, {"model.*": "x.*"}).extent("x.w") == source.extent("model.w")


def test_tied_tensors_stay_tied_under_their_new_names():
    weight = torch.ones(2, 2)
    source = open_source({"model.embed": weight, "head": weight, "copy": weight})
    view = RenamedSource(source, {"model.*": "lm.*", "copy": None})
    assert view.tied == (("lm.embed", "head"),)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"modle.*": "x.*"}, r"rename: 'modle\.\*' matches no tensor \(closest: model"),
        ({"model.*": "x.*", "model.layers.*": "y.*"}, r"'model\.layers\.\*' matches no tensor"),
        ({"model.*": "vision.*.*"}, "must have the same number of stars, found 1 and 2"),
        ({"model.*": "vision.w"}, "must have the same number of stars, found 1 and 0"),
        ({"model.layers.0.w": "model.embed.weight"}, "the same name model.embed.weight"),
        ({}, "rename is empty"),
        (["model.*"], "rename must be a mapping"),
        ({"model.*": 3}, "must be a name, not 3"),
    ],
)
def test_renamings_that_are_refused(rename, message):
    models = [{"model": "vlm"}, {"model": "text", "rename": rename}]
    with pytest.raises(MergeError, match=message):
        merge_tensors(recipe(models=models), given())


def test_a_base_may_be_renamed_too():
    base = {"model": "llm", "rename": RENAME}
    asked = recipe(merge_method="task_arithmetic", base_model=base, files_from="vlm")
    merged = merge_tensors(asked, {**given(), "llm": TEXT})
    assert merged["language_model.model.layers.0.w"].eq(0).all()  # base 1, task vectors -1 and 0
    loaded = Recipe.load(asked)
    assert Recipe.load(loaded.to_yaml()) == loaded and loaded.to_dict()["base_model"] == base
    with pytest.raises(
        MergeError, match=r"the base is renamed, so its config\.json does not fit the result: give 'files"
    ):
        merge_tensors({**asked, "files_from": None}, given())
    first = {"merge_method": "linear", "models": [{"model": "text", "rename": RENAME}, {"model": "vlm"}]}
    with pytest.raises(MergeError, match="the model 'text' is renamed"):
        merge_tensors(first, given())


def test_the_language_model_of_a_llava_is_merged_with_a_llama(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    text = transformers.LlamaConfig(**sizes, vocab_size=32)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    torch.manual_seed(0)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=31)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "llava")
    transformers.LlamaForCausalLM(text).save_pretrained(tmp_path / "llama")
    wanted = {
        "merge_method": "slerp",
        "models": [
            {"model": str(tmp_path / "llava")},
            {"model": str(tmp_path / "llama"), "rename": {"*": "language_model.*"}},
        ],
        "rules": [{"match": ["vision_tower.*", "multi_modal_projector.*"], "keep": "llava"}],
    }
    report = merge(wanted, tmp_path / "out", progress=False, fsync=False)
    llava, llama, merged = (open_source(tmp_path / name) for name in ("llava", "llama", "out"))
    assert merged.keys() == llava.keys() and report.counts["merged"] + report.counts["equal"] == len(llama)
    for key in merged:
        if key.startswith("language_model."):
            own = llama[key.removeprefix("language_model.")]
            assert own.equal(llava[key]) or not (merged[key].equal(llava[key]) or merged[key].equal(own))
        else:
            assert merged[key].equal(llava[key])
    cls = transformers.LlavaForConditionalGeneration
    _, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert Recipe.load(tmp_path / "out" / "recipe.yaml").models[1].rename == {"*": "language_model.*"}


def test_renamed_models_from_disk_give_what_models_in_memory_give(tmp_path):
    for name, tensors in given().items():
        save_checkpoint(tmp_path / name, tensors, max_shard_size=20, fsync=False)
    models = [{"model": str(tmp_path / "vlm")}, {"model": str(tmp_path / "text"), "rename": RENAME}]
    merge(recipe(models=models), tmp_path / "out", progress=False, fsync=False)
    expected, merged = merge_tensors(recipe(), given()), open_source(tmp_path / "out")
    assert merged.keys() == expected.keys() and all(merged[key].equal(expected[key]) for key in expected)


def test_the_shipped_recipe():
    asked = Recipe.load(Path(__file__).parents[2] / "hub_configs" / "recipes" / "language_model_of_a_vlm.yaml")
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight")
    text = {name: torch.randn(4, 4) for name in names}
    tuned = {name: value + 1 for name, value in text.items()}
    vlm = {f"language_model.{name}": value + 2 for name, value in text.items()}
    vlm |= {"vision_tower.w": torch.ones(2), "multi_modal_projector.linear_1.weight": torch.ones(2)}
    merged = merge_tensors(asked, {"runs/llama": text, "runs/llama-math": tuned, "runs/llava": vlm})
    assert merged.keys() == vlm.keys() and merged["vision_tower.w"].equal(vlm["vision_tower.w"])
    for name, value in text.items():
        torch.testing.assert_close(merged[f"language_model.{name}"], value + 1.5)
