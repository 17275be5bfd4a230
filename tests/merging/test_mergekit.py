"""Recipes in mergekit's form: its variants by compat, and a note for each that is not selected."""

import pytest
import torch

from hf_vlmerge.merging import MergeError, Recipe, merge_tensors
from hf_vlmerge.merging.planning import open_sources, plan

TIES = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "base"}, {"model": "a", "parameters": {"weight": 0.5, "density": 0.3}}, {"model": "b"}],
    "dtype": "float32",
}
MODELS = {name: {"w": torch.randn(4, 4)} for name in ("a", "b", "base")}


def parameters_of(recipe):
    recipe = Recipe.load(recipe)
    with open_sources(recipe, MODELS) as sources:
        return plan(recipe, sources)[0].parameters


def test_each_differing_parameter_is_named_in_a_note():
    notes = Recipe.load(TIES).notes
    assert "ties: scope is 'global' here and 'tensor' in mergekit; `compat: mergekit` selects that" in notes
    assert [note.split()[1] for note in notes] == ["scope", "elect", "mean", "zero_sign"]  # density is given
    given = Recipe.load(TIES | {"parameters": {"scope": "tensor", "elect": "weighted"}}).notes
    assert [note.split()[1] for note in given] == ["mean", "zero_sign"]


@pytest.mark.parametrize(
    "changes",
    [
        {"compat": "mergekit"},
        {"parameters": {"scale": 1.0}},  # a word of ours
        {"rules": [{"match": "norm", "keep": "base"}]},
        {"merge_method": "task_arithmetic", "models": ["a", "b"]},  # no variants
    ],
)
def test_there_is_nothing_to_note_with_compat_or_in_our_own_form(changes):
    assert Recipe.load(TIES | changes).notes == ()


def test_compat_selects_the_defaults_of_the_other_variant():
    ours, theirs = parameters_of(TIES), parameters_of(TIES | {"compat": "mergekit"})
    assert ours["density"] == (0.3, 0.2) and theirs["density"] == (0.3, 1.0)
    assert (ours["scope"], ours["elect"], ours["mean"], ours["zero_sign"]) == ("global", "unweighted", "counts", "none")
    assert theirs["scope"] == "tensor" and theirs["elect"] == "weighted"
    assert theirs["mean"] == "weights" and theirs["zero_sign"] == "positive"
    rules = [{"match": "w", "method": "dare_ties", "parameters": {"density": 0.5}}]
    ruled = parameters_of(TIES | {"compat": "mergekit", "rules": rules})
    assert ruled["rescale_by"] == "l1" and ruled["normalize"] is False and ruled["density"] == (0.5, 0.5)


@pytest.mark.parametrize(
    ("switches", "along"),
    [
        ({}, "tensor"),
        ({"nuslerp_flatten": True, "nuslerp_row_wise": True}, "tensor"),
        ({"nuslerp_flatten": False}, "row"),
        ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, "column"),
    ],
)
def test_the_switches_of_nuslerp(switches, along):
    recipe = {"merge_method": "nuslerp", "models": ["a", "b"], "parameters": switches}
    assert parameters_of(recipe)["along"] == along


def test_a_base_among_the_models_is_no_member_where_the_method_takes_one():
    recipe = {"merge_method": "nuslerp", "base_model": "base", "models": ["base", "a", "b"]}
    assert Recipe.load(recipe).aliases == ("a", "b")
    about = merge_tensors(recipe, MODELS)["w"]
    assert not about.allclose(merge_tensors({"merge_method": "nuslerp", "models": ["a", "b"]}, MODELS)["w"])
    linear = Recipe.load(recipe | {"merge_method": "linear"}).aliases
    assert len(linear) == 3 and linear[1:] == ("a", "b")


@pytest.mark.parametrize(("method", "models"), [("slerp", ["a"]), ("model_stock", ["a"]), ("nearswap", ["a", "b"])])
def test_a_method_of_another_number_of_members_is_refused(method, models):
    with pytest.raises(MergeError, match=f"w: {method} takes (exactly|at least) . members?, not {len(models)}"):
        merge_tensors({"merge_method": method, "base_model": "base", "models": models}, MODELS)
