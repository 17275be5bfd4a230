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
CHECKPOINTS = ("a", "b", "base", "tuned_a", "tuned_b", "tuned_c", "seed")
# mergekit draws from one generator in the order of its work, we from the seed, the name and the index of an entry: the
# bits cannot agree, so the entries that were kept are read off the result, and what was done to them is compared.
RANDOM = [path for path in RECIPES if path.stem.endswith("_random")]
EXACT = [path for path in RECIPES if path not in RANDOM]


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, torch.Tensor]]:
    """Checkpoint or recipe -> its tensors."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(RECORDED).items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups


def merged(path, recorded, **changes):
    recipe = Recipe.load(yaml.safe_load(path.read_text()) | {"compat": "mergekit"} | changes)
    return merge_tensors(recipe, sources={name: recorded[name] for name in CHECKPOINTS})


@pytest.mark.parametrize("path", EXACT, ids=lambda path: path.stem)
def test_a_recipe_in_mergekits_form_gives_mergekits_tensors(path, recorded):
    ours, expected = merged(path, recorded), recorded[path.stem]
    assert set(ours) == set(expected)
    for key, tensor in expected.items():
        assert ours[key].dtype == tensor.dtype
        if tensor.dtype == torch.float32:
            torch.testing.assert_close(
                ours[key], tensor, atol=1e-6, rtol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.mark.parametrize("path", [p for p in EXACT if p.stem.endswith("bfloat16")], ids=lambda path: path.stem)
def test_in_bfloat16_it_gives_mergekits_tensors_to_one_rounding(path, recorded):
    """One step of bfloat16 between results that were computed in float32 (`out_dtype`). Where mergekit also computes in
    bfloat16 (`dtype`), each of its sums is rounded: one step of what is summed, which is more than a step of the result
    where terms cancel; and an election whose sum is zero but for that rounding may go either way."""
    recipe = yaml.safe_load(path.read_text())
    ours, expected = merged(path, recorded), recorded[path.stem]
    entries = apart = tied = undecided = 0
    for key, tensor in expected.items():
        size, skip = torch.maximum(ours[key].abs(), tensor.abs()).float(), torch.zeros(tensor.shape, dtype=torch.bool)
        if recipe.get("base_model") == "seed":
            base = recorded["seed"][key].float()
            tau = torch.stack([recorded[m["model"]][key].float() - base for m in recipe["models"]])
            skip = at_threshold(tau, [m["parameters"].get("density", 1.0) for m in recipe["models"]])
            tied += int(skip.sum())
            if recipe["dtype"] == "bfloat16":
                size = torch.maximum(size, base.abs() + tau.abs().sum(0))
                for vector, m in zip(tau, recipe["models"], strict=True):
                    vector *= m["parameters"]["weight"]
                close = tau.sum(0).abs() < tau.abs().sum(0) / 128
                undecided, skip = undecided + int((close & ~skip).sum()), skip | close
        difference = (ours[key].float() - tensor.float()).abs()
        assert (difference <= step(size))[~skip].all(), key
        entries, apart = entries + skip.numel(), apart + int((difference > 0)[~skip].sum())
    shares = {"one rounding apart": apart, "at the threshold": tied, "elections undecided": undecided}
    print(path.stem, ", ".join(f"{count / entries:.2%} {what}" for what, count in shares.items()))
    assert apart < 0.2 * entries and tied < 0.1 * entries and undecided < 0.02 * entries


def step(values):
    """The distance of a bfloat16 number to the next one."""
    return torch.exp2(values.clamp(min=2.0**-126).log2().floor() - 7)


def at_threshold(tau, densities):
    """Entries whose magnitude equals their member's trim threshold: which of these mergekit keeps is chance."""
    found = torch.zeros(tau.shape[1:], dtype=torch.bool)
    for magnitude, density in zip(tau.abs(), densities, strict=True):
        if density < 1:
            ordered = magnitude.flatten().sort(descending=True).values
            found |= magnitude == ordered[max(1, int(density * len(ordered))) - 1]
    return found


@pytest.mark.parametrize("path", RANDOM, ids=lambda path: path.stem)
def test_random_dropping_keeps_mergekits_share_and_its_norm(path, recorded):
    """Of one member with weight 1: what differs from the base was kept, all of it times one factor a tensor, so that
    the L1 norm of the task vector stays what it was."""
    kept, larger = [], []
    for tensors in (merged(path, recorded), recorded[path.stem]):
        count = total = 0
        ranks = torch.zeros(2)
        for key, tensor in tensors.items():
            base = recorded["base"][key]
            tau, change = recorded["a"][key] - base, tensor - base
            mask = change.abs() > 1e-7
            factors = (change / tau)[mask]
            torch.testing.assert_close(factors, factors.mean().expand_as(factors), rtol=2e-4, atol=0)
            torch.testing.assert_close(change.abs().sum(), tau.abs().sum(), rtol=1e-5, atol=0)
            count, total = count + int(mask.sum()), total + mask.numel()
            upper = tau.abs() > tau.abs().median(-1, keepdim=True).values
            ranks += torch.tensor([float(mask[upper].sum() / upper.sum()), float(mask[~upper].float().mean())])
        kept.append(count / total)
        larger.append(float((ranks[0] - ranks[1]) / len(tensors)))
    assert all(abs(share - 0.5) < 0.05 for share in kept)  # some 2,000 entries: three standard deviations are 0.034
    by_magnitude = "della" in path.stem  # epsilon 0.3: the upper half of a row is kept with 0.65, the lower with 0.35
    assert all((0.2 < gap < 0.42) if by_magnitude else abs(gap) < 0.1 for gap in larger)


def test_every_recipe_is_recorded_and_by_the_stated_version(recorded):
    assert set(recorded) == {*CHECKPOINTS, *(path.stem for path in RECIPES)}
    with safe_open(RECORDED, "pt") as file:
        assert file.metadata()["made_with"].startswith("mergekit 0.1.5, ")
