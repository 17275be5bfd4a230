"""Recipes: what is read, what is refused and how, the round trip, and mergekit's form."""

import pytest
import torch

from hf_vlmerge.merging import ExpertLayout, MergeError, Recipe, merge_tensors

MODELS = [{"model": "org/left"}, {"model": "org/right@v2", "alias": "other"}]


def test_native_form():
    recipe = Recipe.load(
        """
        merge_method: interpolation
        experts_of: org/vlmo-base-msa
        parameters: {t: 0.75, fusion_share: 0.25}
        rules:
          - {match: "*bias", parameters: {ratio: 0.5}}
          - {has: vision_language, members: [vision, language]}
          - {match: [a.*, b.*], keep: first}
        """
    )
    assert recipe.parameters == {"ratio": 0.75, "fusion_share": 0.25} and recipe.experts_of == "org/vlmo-base-msa"
    assert [r.match for r in recipe.rules] == [("*bias",), ("*",), ("a.*", "b.*")]
    assert recipe.rules[1].members == ("vision", "language") and recipe.rules[2].keep == "first"
    with pytest.raises(AttributeError):
        recipe.seed = 3


def test_aliases_are_the_last_part_of_a_reference_and_never_clash():
    recipe = Recipe.load({"merge_method": "linear", "models": [*MODELS, "else/right", "/tmp/x/left", "runs/base"]})
    assert recipe.aliases == ("left", "other", "right", "left-4", "base-5")


def test_a_recipe_goes_to_yaml_and_back():
    recipe = Recipe.load(
        {
            "merge_method": "linear",
            "models": [{"model": "a", "parameters": {"weight": [0.1, 0.9]}}, {"model": "b", "statistics": "s"}],
            "rules": [{"match": "x*", "keep": "a"}, {"has": "b", "method": "slerp", "members": "a"}],
            "experts": {"experts": [{"vision": "v"}, "language"], "merged": "", "config": {"k": []}},
            "dtype": "bf16",
            "seed": 3,
        }
    )
    assert Recipe.load(recipe.to_yaml()) == recipe
    assert recipe.experts == ExpertLayout({"vision": "v", "language": "language"}, "", {"k": []})
    assert "notes" not in recipe.to_dict() and "base_model" not in recipe.to_dict()


LINEAR = {"merge_method": "linear", "models": MODELS}
SLICE = {"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 2]}]}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({**LINEAR, "model": 1}, "the recipe: unknown key 'model'; did you mean 'models'?"),
        ({**LINEAR, "merge_method": "liner"}, "unknown merge method 'liner'; did you mean 'linear'?"),
        ({"models": MODELS}, "the recipe names no merge_method"),
        ({"merge_method": "linear"}, "either 'experts_of' (experts inside one checkpoint) or 'models'"),
        ({**LINEAR, "experts_of": "x"}, "either 'experts_of'"),
        (
            {**LINEAR, "parameters": {"normalise": True}},
            "linear has no parameter 'normalise'; did you mean 'normalize'?",
        ),
        ({**LINEAR, "parameters": {"weight": 1, "weights": 1}}, "'weights' is given twice"),
        ({**LINEAR, "parameters": [1]}, "parameters must be a mapping, not [1]"),
        ({**LINEAR, "models": [{"modle": "x"}]}, "model 1: unknown key 'modle'; did you mean 'model'?"),
        ({**LINEAR, "models": [{"alias": "x"}]}, "model 1 needs 'model'"),
        ({**LINEAR, "models": "org/a"}, "models must be a list"),
        ({**LINEAR, "models": [{"model": "a", "alias": "base"}]}, "the alias 'base' is reserved"),
        ({**LINEAR, "models": [{"model": "a", "alias": "x"}, {"model": "b", "alias": "x"}]}, "'x' is used twice"),
        ({**LINEAR, "merge_method": "task_arithmetic"}, "task_arithmetic needs a base: give 'base_model'"),
        ({**LINEAR, "merge_method": "regmean"}, "regmean needs statistics (gram): give 'statistics'"),
        ({**LINEAR, "rules": [{"mach": "*", "keep": "first"}]}, "rule 1: unknown key 'mach'; did you mean 'match'?"),
        ({**LINEAR, "rules": [{"match": "*"}]}, "rule 1 says what it matches but not what to do"),
        ({**LINEAR, "rules": [{"keep": "lef"}]}, "a rule names the member 'lef'; did you mean 'left'?"),
        ({**LINEAR, "rules": [{"members": ["left", "rihgt"]}]}, "a rule names the member 'rihgt'"),
        ({**LINEAR, "rules": [{"members": []}]}, "rule 1: members is empty"),
        ({**LINEAR, "rules": [{"method": "lerp"}]}, "unknown merge method 'lerp'; did you mean 'slerp'?"),
        ({**LINEAR, "rules": [{"match": "*", "parameters": {"ratio": 1}}]}, "rule 1: linear has no parameter 'ratio'"),
        ({**LINEAR, "dtype": "bfloat61"}, "unknown dtype 'bfloat61'; did you mean 'bfloat16'?"),
        ({**LINEAR, "compat": "mergekti"}, "compat can be 'mergekit', not 'mergekti'"),
        ({**LINEAR, "experts": {"expert": []}}, "experts: unknown key 'expert'; did you mean 'experts'?"),
        ({**LINEAR, "experts": {"experts": []}}, "experts: 'experts' must list the experts"),
        ({**LINEAR, "experts": {"experts": [[]]}}, "experts: an expert must be a name, not []"),
        ({**LINEAR, "experts": {"experts": ["v"], "config": 1}}, "experts: config must be a mapping, not 1"),
        ({**LINEAR, "models": ["", "b"]}, "model 1 needs 'model'"),
        ({**LINEAR, "rules": [{"has": ["a"], "keep": "a"}]}, "rule 1: has must be a name, not ['a']"),
        ({**LINEAR, "rules": [{"method": 1}]}, "rule 1: method must be a name, not 1"),
        ({"merge_method": "slerp", "slices": [[]]}, "slices: layer stacking is not understood"),
        ({"merge_method": "slerp", "slices": [{"sources": "ab"}]}, "slices: layer stacking is not understood"),
        ({"merge_method": "slerp", "slices": [{"sources": [{"layer_range": 4}]}]}, "slices: layer stacking is not"),
        ({"merge_method": "slerp", "slices": [SLICE], "parameters": 1}, "slices: parameters must be a mapping"),
        (["linear"], "the recipe must be a mapping"),
        ("merge_method: [", "the recipe is not valid YAML"),
        ("nowhere.yaml", "there is no recipe file 'nowhere.yaml'"),
    ],
)
def test_what_a_recipe_must_not_say(recipe, message):
    with pytest.raises(MergeError) as error:
        Recipe.load(recipe if not isinstance(recipe, str) or "." in recipe else f"{recipe}\n")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_file_that_is_no_text(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MergeError, match=r"the recipe file '.*recipe\.yaml' is not a text in UTF-8"):
        Recipe.load(tmp_path / "recipe.yaml")


def tensors(value, layers=3):
    return {f"model.layers.{i}.{part}.w": torch.full((2,), value) for i in range(layers) for part in ("mlp", "attn")}


def test_mergekits_models_form():
    recipe = Recipe.load(
        """
        merge_method: linear
        dtype: float32
        tokenizer_source: base
        base_model: {x}
        models:
          - model: {model: {path: org/a, revision: v1}}
            parameters:
              weight:
                - {filter: mlp, value: [0, 1]}
                - value: 0.5
          - model: org/b
            parameters: {weight: 0.5}
        parameters: {normalize: false, int8_mask: true}
        """.replace("{x}", "org/b")
        .replace("{model: {path", "{path")
        .replace("v1}}", "v1}")
    )
    assert [m.model for m in recipe.models] == ["org/a@v1", "org/b"]
    assert recipe.notes[0] == "int8_mask: has no meaning here and is ignored" and len(recipe.notes) == 2
    merged = merge_tensors(recipe, {"org/a@v1": tensors(1.0), "org/b": tensors(10.0)})
    # weight of a is 0, .5, 1 over the layers of mlp and .5 elsewhere
    assert [merged[f"model.layers.{i}.mlp.w"][0].item() for i in range(3)] == [5.0, 5.5, 6.0]
    assert [merged[f"model.layers.{i}.attn.w"][0].item() for i in range(3)] == [5.5] * 3


def test_folders_named_like_roles_get_other_aliases():
    recipe = Recipe.load({"merge_method": "linear", "models": ["x/experts", "x/statistics", "x/base"]})
    assert recipe.aliases == ("experts-1", "statistics-2", "base-3")
    with pytest.raises(MergeError, match="'experts' is reserved"):
        Recipe.load({"merge_method": "linear", "models": [{"model": "a", "alias": "experts"}, "b"]})


def test_a_base_listed_among_the_models_is_the_first_where_no_weights_say_whose_is_whose():
    models = {"base_model": "b", "models": ["a", "b"]}
    assert Recipe.load({"merge_method": "slerp", **models}).aliases == ("b", "a")
    weighted = {"merge_method": "linear", **models, "parameters": {"weights": [0.9, 0.1]}}
    assert merge_tensors(weighted, {"a": {"w": torch.zeros(1)}, "b": {"w": torch.ones(1)}})[
        "w"
    ].item() == pytest.approx(0.1)


def test_a_base_listed_among_the_models_is_no_member_of_a_delta_method():
    models = [{"model": "seed"}, {"model": "a", "parameters": {"weight": 0.5}}]
    recipe = Recipe.load({"merge_method": "task_arithmetic", "base_model": "seed", "models": models})
    assert recipe.aliases == ("a",)
    merged = merge_tensors(recipe, {"seed": tensors(1.0), "a": tensors(3.0)})
    assert merged["model.layers.0.mlp.w"][0] == 2.0


SLERP = """
merge_method: slerp
base_model: a
slices:
  - sources:
      - {model: b, layer_range: [0, 3]}
      - {model: a, layer_range: [0, 3]}
parameters:
  t:
    - {filter: attn, value: [0, 0.5, 1]}
    - {value: 0.25}
"""


def test_the_usual_slerp_form_with_slices():
    models = {"a": tensors(1.0), "b": tensors(3.0)}  # parallel, so slerp is linear
    merged = merge_tensors(SLERP, models)
    assert [merged[f"model.layers.{i}.attn.w"][0].item() for i in range(3)] == [1.0, 2.0, 3.0]
    assert merged["model.layers.0.mlp.w"][0] == 1.5
    with pytest.raises(MergeError, match="slices span 3 layers of 4: layer stacking is not understood"):
        merge_tensors(SLERP, {"a": tensors(1.0, 4), "b": tensors(3.0, 4)})


@pytest.mark.parametrize("change", [("[0, 3]}\n      - {model: a", "[0, 2]}\n      - {model: a"), ("[0, 3]", "[1, 3]")])
def test_layer_stacking_is_refused(change):
    with pytest.raises(MergeError, match="layer stacking is not understood"):
        Recipe.load(SLERP.replace(*change))


def test_tokenizer_sources_that_cannot_be_carried():
    with pytest.raises(MergeError, match="tokenizer_source: 'union' is not understood"):
        Recipe.load({**LINEAR, "tokenizer_source": "union"})


def test_lists_at_the_top_are_members_here_and_gradients_in_mergekit():
    recipe = {"merge_method": "linear", "models": ["a", "b"], "parameters": {"weight": [1, 3]}}
    models = {"a": tensors(0.0), "b": tensors(4.0)}
    assert merge_tensors(recipe, models)["model.layers.1.mlp.w"][0] == 3.0
    assert merge_tensors({**recipe, "compat": "mergekit"}, models)["model.layers.1.mlp.w"][0] == 2.0
    with pytest.raises(MergeError, match=r"weights: 3 values for 2 members \(a, b\); a layer gradient"):
        merge_tensors({**recipe, "parameters": {"weight": [1, 2, 3]}}, models)
