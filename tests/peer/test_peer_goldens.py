"""Our merges of recipes in mergekit's form against what mergekit made of them (recorded by `make peer-goldens`)."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from hf_vlmerge.merging import Recipe, merge_tensors

RECORDED = Path(__file__).resolve().parents[1] / "golden" / "mergekit.safetensors"
RECIPES = sorted(Path(__file__).parent.glob("recipes/*.yaml"))
CHECKPOINTS = ("a", "b", "base")


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, torch.Tensor]]:
    """Checkpoint or recipe -> its tensors."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(RECORDED).items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_in_mergekits_form_gives_mergekits_tensors(path, recorded):
    recipe = Recipe.load(yaml.safe_load(path.read_text()) | {"compat": "mergekit"})
    merged = merge_tensors(recipe, sources={name: recorded[name] for name in CHECKPOINTS})
    expected = recorded[path.stem]
    assert set(merged) == set(expected)
    for key, tensor in expected.items():
        assert merged[key].dtype == tensor.dtype
        torch.testing.assert_close(
            merged[key], tensor, atol=1e-6, rtol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_every_recipe_is_recorded_and_by_the_stated_version(recorded):
    assert set(recorded) == {*CHECKPOINTS, *(path.stem for path in RECIPES)}
    with safe_open(RECORDED, "pt") as file:
        assert file.metadata()["made_with"].startswith("mergekit 0.1.5, ")
