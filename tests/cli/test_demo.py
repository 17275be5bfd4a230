"""The demo end to end at a size that says nothing about merging, but touches every part."""

import json

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from hf_vlmerge.cli import demo, main

SMALL = {
    "training": {
        "steps": 6, "seed_steps": 3, "warmup_steps": 2, "new_expert_warmup_steps": 1, "batch_size": 8,
    },
    "fine_tuning": {"steps": 2, "warmup_steps": 1},
    "model": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "data": {"retrieval_images": 16},
}  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    original = demo.load_settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            demo, "load_settings", lambda quick: {k: v | SMALL.get(k, {}) for k, v in original(quick).items()}
        )
        demo.run(out=folder, quick=False, seeds=[3])
    return folder


def test_results_and_plot(out):
    results = json.loads((out / "results.json").read_text())
    (run,) = results["runs"]
    assert run["seed"] == 3
    assert set(run["arms"]) == {"agnostic", "specific", "naive_merge", "seeded", "seeded_merge"}
    for arm in run["arms"].values():
        assert all(0 <= value <= 1 for when in ("before", "after") for value in arm[when].values())
    sizes = {name: arm["parameters"] for name, arm in run["arms"].items()}
    assert sizes["agnostic"] == sizes["naive_merge"] == sizes["seeded_merge"] < sizes["specific"] == sizes["seeded"]
    assert run["distances"]["seeded_merge"]["L2"] < run["distances"]["naive_merge"]["L2"]  # fewer steps apart
    table = (out / "table.md").read_text()
    assert "seeded merge" in table
    assert table.count("\n| ") == 1 + 5 + 1 + 2
    with Image.open(out / "plot.png") as plot:
        assert plot.width > 500


def test_what_was_written_is_the_seeded_merge(out):
    from hf_vlmerge import VlmoForPreTraining

    card = (out / "README.md").read_text()
    assert "interpolation" in card
    assert "naive merge" in card
    (run,) = json.loads((out / "results.json").read_text())["runs"]
    recalls = run["arms"]["seeded_merge"]["before"]
    measured = [result.metric_value for result in ModelCard(card).data.eval_results]
    assert measured == [recalls[name] for name in ("tr_mean", "ir_mean", "mean")]
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["merge_method"] == "interpolation"
    merged = VlmoForPreTraining.from_pretrained(out).state_dict()
    seeded = VlmoForPreTraining.from_pretrained(out / "runs/seed_3/seeded").state_dict()
    name = "vlmo.encoder.layers.0.ffn.{}.fc1.weight"
    ratio = recipe["parameters"]["ratio"]
    expected = ratio * seeded[name.format("vision")] + (1 - ratio) * seeded[name.format("language")]
    assert torch.allclose(merged[name.format("shared")], expected, atol=1e-7)
    assert (out / "modeling_vlmo.py").is_file()


def test_the_arms_share_their_start(out):
    from hf_vlmerge import VlmoForPreTraining

    runs = out / "runs/seed_3"
    initial = VlmoForPreTraining.from_pretrained(runs / "initial").state_dict()
    seed = VlmoForPreTraining.from_pretrained(runs / "seed").state_dict()
    agnostic = VlmoForPreTraining.from_pretrained(runs / "agnostic").state_dict()
    name = "vlmo.encoder.layers.0.ffn.shared.fc1.weight"
    to_seed, to_end = (seed[name] - initial[name]).norm(), (agnostic[name] - initial[name]).norm()
    assert 0 < to_seed < to_end


def test_quick_only_shortens():
    full, quick = demo.load_settings(False), demo.load_settings(True)
    assert full["model"] == quick["model"]
    assert quick["training"]["steps"] < full["training"]["steps"]
    assert {k: v for k, v in full["training"].items() if "steps" not in k} == {
        k: v for k, v in quick["training"].items() if "steps" not in k
    }


def test_a_folder_of_the_users_is_not_replaced(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("all of it")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "is not an earlier demo's output" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


def test_table_of_several_seeds_has_deviations():
    assert demo.percent([0.5]) == "50.0"
    assert demo.percent([0.5, 0.6, 0.7]) == "60.0 ± 10.0"
    assert demo.chance(512) == pytest.approx((1 + 5 + 10) / 3 / 512)
