"""The recipes that come with the project: each says what it gives, costs and how it is run, and each merges."""

from pathlib import Path

import pytest
import torch

from hf_vlmerge.merging import Recipe, merge_tensors
from hf_vlmerge.merging.planning import references
from tests.merging.test_engine import LAYOUT, as_shared, expert_model, statistics_for

FOLDER = Path(__file__).parents[2] / "hub_configs" / "recipes"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe(path):
    lines = path.read_text().splitlines()
    heading = "\n".join(line for line in lines if line.startswith("#"))
    assert lines[0].startswith("# Gives: ") and "# Costs: " in heading
    assert f"hf-vlmerge merge hub_configs/recipes/{path.name} " in heading
    recipe = Recipe.load(path)
    if recipe.adapters or recipe.align or recipe.base_rename:
        return  # they need other inputs: merged in test_adapters, test_alignment and test_renaming
    specific = expert_model()
    given = {ref: expert_model(seed=i) for i, ref in enumerate(references(recipe).values())}
    if recipe.experts_of:
        given[recipe.experts_of] = specific
        given |= {ref: as_shared(expert_model(seed=9)) for ref in filter(None, [recipe.base_model])}
        given |= {ref: statistics_for(specific) for ref in filter(None, [recipe.statistics])}
        recipe = Recipe.load({**recipe.to_dict(), "experts": LAYOUT})
    merged = merge_tensors(recipe, given)
    assert merged.keys() == (as_shared(specific) if recipe.experts_of else specific).keys()
    assert all(torch.isfinite(value).all() for value in merged.values())


def test_there_is_a_recipe_for_every_method():
    from hf_vlmerge.merging import list_merge_methods

    used = {Recipe.load(path).merge_method for path in FOLDER.glob("*.yaml")}
    assert used >= {"linear", "interpolation", "task_arithmetic", "modality_arithmetic", "regmean", "slerp"}
    assert used <= set(list_merge_methods())
