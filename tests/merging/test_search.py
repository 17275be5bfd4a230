"""Search: grids, soups, optimisers; what scores a candidate; what becomes of one that fails; what is written."""

import json
import math
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_vlmerge.merging import MergeError, Recipe, merge_tensors
from hf_vlmerge.merging.objectives import Command, load_into
from hf_vlmerge.merging.search import InMemory, sweep
from hf_vlmerge.merging.tensors.sources import DictSource
from hf_vlmerge.merging.variation import changed
from tests.merging.architectures import ARCHITECTURES, build, moved, save, tensors_of

SEED = {"layers.0.w": torch.zeros(4, 3), "layers.1.w": torch.zeros(4, 3)}
VECTORS = {"a": torch.tensor([1.0, 0, 0]), "b": torch.tensor([0, 1.0, 0]), "c": torch.tensor([0, 0, 1.0])}
SOURCES = {"seed": SEED} | {name: {k: v + t for k, t in SEED.items()} for name, v in VECTORS.items()}
RECIPE = {"merge_method": "task_arithmetic", "base_model": "seed", "models": ["a", "b"]}
SOUP = {"merge_method": "linear", "models": ["a", "b", "c"]}


def nearness(*goal):
    """A score that is greatest, 0, where every row is the goal: minus the largest difference."""
    return lambda tensors: -max((t - torch.tensor(goal)).abs().max().item() for t in tensors.values())


def search(objective, recipe=RECIPE, **options):
    return sweep(recipe, objective, sources=SOURCES, progress=False, **options)


def test_a_grid_finds_its_best_point():
    report = search(nearness(0.5, 0.5, 0.0), grid={"parameters.scale": [0.0, 0.25, 0.5, 0.75]})
    assert [t.settings["parameters.scale"] for t in report.trials] == [0.0, 0.25, 0.5, 0.75]
    assert [t.score for t in report.trials] == [-0.5, -0.25, 0.0, -0.25]
    assert report.best.settings == {"parameters.scale": 0.5} and report.best.recipe.parameters == {"scale": 0.5}
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [row["best"] for row in content["candidates"]] == [True, False, False, False]
    assert content["candidates"][0]["score"] == 0.0 and content["recipe"]["parameters"] == {"scale": 0.5}
    assert report.table().splitlines()[1].startswith("*")
    assert report.table().splitlines()[2].split() == ["0.25", "-0.25"]


def test_several_values_are_combined_and_lower_may_be_better():
    grid = {"models.a.weight": [0.0, 1.0], "models.b.lambda": [2]}
    with pytest.raises(MergeError, match="linear has no parameter 'scale'"):
        search(nearness(0, 0, 0), {"merge_method": "linear", "models": ["a", "b"]}, grid=grid)
    grid = {"models.a.weight": [0.0, 1.0], "models.b.weight": [0.5, 1.0]}
    report = search(lambda t: t["layers.0.w"].sum().item(), grid=grid, minimise=True)
    assert [tuple(t.settings.values()) for t in report.ranked] == [(0.0, 0.5), (0.0, 1.0), (1.0, 0.5), (1.0, 1.0)]
    assert report.to_dict()["better"] == "lower"


def test_paths_reach_every_part_of_a_recipe():
    content = {**RECIPE, "rules": [{"match": "layers.1*", "parameters": {"scale": 1.0}}], "parameters": {"scale": 1}}
    recipe = Recipe.load(content)
    settings = {
        "parameters.lambda": 0.3, "models.b.parameters.weight": 0.2, "rules.1.parameters.scale": 0.7,
        "dtype": "bfloat16",
    }  # fmt: skip
    new = changed(recipe, settings)
    assert new.parameters == {"scale": 0.3} and new.models[1].parameters == {"weights": 0.2}
    assert new.rules[0].parameters == {"scale": 0.7} and new.dtype == "bfloat16"
    assert recipe == Recipe.load(content), "the recipe itself is left as it is"
    per_member = changed(
        Recipe.load({**RECIPE, "parameters": {"weight": {"a": 1, "b": 2}}}), {"parameters.weight.b": 5}
    )
    assert per_member.parameters == {"weights": {"a": 1, "b": 5}}
    listed = changed(Recipe.load({**RECIPE, "parameters": {"scale": [0, 1]}}), {"parameters.scale.1": 0.5})
    assert listed.parameters == {"scale": [0, 0.5]}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("parameters.scaling", "task_arithmetic has no parameter 'scaling'; did you mean 'scale'?"),
        ("models.aa.weight", "models.<alias>.<parameter>; did you mean 'a'?"),
        ("models.a", "models.<alias>.<parameter>"),
        ("rules.1.keep", "numbers from 1 to 0"),
        ("merge_methods", "unknown key 'merge_methods'; did you mean 'merge_method'?"),
        ("base_model.x", "base_model is 'seed', in which nothing can be set"),
    ],
)
def test_a_wrong_path_is_told_before_anything_is_scored(path, message):
    with pytest.raises(MergeError) as error:
        search(pytest.fail, grid={path: [1, 2]})
    assert message in str(error.value)


def test_the_ratio_between_the_experts_of_one_checkpoint():
    experts = {f"layers.0.ffn.{e}.w": SOURCES[m]["layers.0.w"] for e, m in (("vision", "a"), ("language", "b"))}
    recipe = {"merge_method": "interpolation", "experts_of": "specific", "experts": {"experts": ["vision", "language"]}}
    grid = {"parameters.ratio": [0.25, 0.5, 0.75]}
    score = nearness(0.75, 0.25, 0.0)
    report = sweep(recipe, score, grid=grid, sources={"specific": experts}, progress=False)
    assert report.best.settings == {"parameters.ratio": 0.75} and report.best.score == 0
    with pytest.raises(MergeError, match="a soup is the mean of several models"):
        sweep(recipe, score, greedy=True, sources={"specific": experts}, progress=False)


def test_soups():
    """a and b share the goal's half each, c leads away: uniform first, then each, then greedy from the best on."""
    report = search(nearness(0.6, 0.4, 0.0), SOUP, greedy=True)
    rows = [(t.note, t.settings["members"]) for t in report.trials]
    assert rows == [
        ("uniform soup", ["a", "b", "c"]),
        ("alone", ["a"]),
        ("alone", ["b"]),
        ("alone", ["c"]),
        ("greedy: with b", ["a", "b"]),
        ("greedy: with c", ["a", "b", "c"]),
    ]
    assert report.best.settings == {"members": ["a", "b"]} and report.best.score == pytest.approx(-0.1)
    assert report.trials[-1].score == report.trials[0].score, "the same soup is not scored twice"


def test_a_soup_keeps_what_does_not_make_it_worse():
    report = search(lambda tensors: 1.0, SOUP, greedy=True)
    assert [t.settings["members"] for t in report.trials[4:]] == [["a", "b"], ["a", "b", "c"]]
    worse = search(lambda tensors: -tensors["layers.0.w"].count_nonzero().item(), SOUP, greedy=True)
    assert [t.settings["members"] for t in worse.trials[4:]] == [["a", "b"], ["a", "c"]]


@pytest.mark.parametrize("name", ["nelder-mead", "differential-evolution"])
def test_optimisers_approach_the_best_coefficients(name):
    bounds = {"models.a.weight": (0.0, 1.0), "models.b.weight": (0.0, 2.0)}
    goal = torch.tensor([0.3, 1.4, 0.0])
    score = lambda tensors: -((tensors["layers.0.w"] - goal) ** 2).sum().item()  # noqa: E731
    report = search(score, optimiser=name, bounds=bounds, budget=80, seed=3)
    assert len(report.trials) <= 80 and report.best.score > -0.02
    assert all(low <= t.settings[path] <= high for t in report.trials for path, (low, high) in bounds.items())
    again = search(score, optimiser=name, bounds=bounds, budget=80, seed=3)
    assert [t.settings for t in again.trials] == [t.settings for t in report.trials]


def test_an_optimiser_starts_where_the_recipe_stands_and_keeps_its_budget():
    recipe = {**RECIPE, "parameters": {"scale": 0.8}}
    report = search(
        nearness(0.5, 0.5, 0), recipe, optimiser="nelder-mead", bounds={"parameters.scale": (0, 1)}, budget=5
    )
    assert report.trials[0].settings == {"parameters.scale": 0.8} and len(report.trials) == 5


def test_candidates_that_fail_have_no_score_and_say_why():
    def objective(tensors):
        value = tensors["layers.0.w"][0, 0].item()
        if value == 0.0:
            raise ZeroDivisionError("division\nby zero")
        return {1.0: math.nan, 2.0: "high", 3.0: torch.tensor(3.0)}[value]

    report = search(objective, grid={"parameters.scale": [0.0, 1.0, 2.0, 3.0]})
    assert [t.score for t in report.trials] == [None, None, None, 3.0] and report.best.settings["parameters.scale"] == 3
    assert report.trials[0].error == "ZeroDivisionError: division by zero"
    assert report.trials[1].error == "the objective returned nan"
    assert report.trials[2].error == "the objective returned 'high', not a number"
    assert "division by zero" in report.table()
    with pytest.raises(MergeError, match="no candidate has a score; the first: the objective returned nan"):
        search(lambda tensors: math.nan, grid={"parameters.scale": [1.0, 2.0]})
    failing = search(objective, optimiser="nelder-mead", bounds={"parameters.scale": (2.9, 3.1)}, budget=6)
    assert failing.trials[0].score == 3.0 and all(t.score is None for t in failing.trials[1:])


def test_weights_are_read_once_and_no_losing_candidate_is_written(tmp_path, monkeypatch):
    for name, tensors in SOURCES.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "toy"}')
    recipe = {**RECIPE, "base_model": str(tmp_path / "seed"), "models": [str(tmp_path / n) for n in "ab"]}
    reads = []
    monkeypatch.setattr(
        InMemory,
        "__init__",
        lambda self, source, init=InMemory.__init__: (reads.append(source.label), init(self, source))[1],
    )
    before = sorted(tmp_path.iterdir())

    def objective(tensors):
        assert sorted(tmp_path.iterdir()) == before
        return nearness(0.5, 0.5, 0)(tensors)

    out = tmp_path / "best"
    report = sweep(recipe, objective, grid={"parameters.scale": [0.25, 0.5, 1.0]}, output=out, progress=False)
    assert sorted(reads) == ["a", "b", "seed"]
    assert sorted(tmp_path.iterdir()) == sorted([*before, out])
    assert report.merged.output == out and "scale: 0.5" in (out / "recipe.yaml").read_text()
    expected = merge_tensors({**RECIPE, "parameters": {"scale": 0.5}}, SOURCES)
    found = load_file(out / "model.safetensors")
    assert all(found[name].equal(value) for name, value in expected.items())


def test_an_output_that_exists_is_refused_before_the_search(tmp_path):
    with pytest.raises(MergeError, match="exists; choose another name"):
        search(pytest.fail, grid={"parameters.scale": [1.0]}, output=tmp_path)


EVALUATE = """
import sys
from safetensors.numpy import load_file
weight = load_file(sys.argv[1] + "/model.safetensors")["layers.0.w"][0, 0].item()
if weight == 0.25:
    sys.exit("the model is broken")
print("step 7: loss 3e-2")
print("accuracy:", 1 - abs(weight - 0.5) if weight < 1 else "none", "in all")
"""


def test_a_command_scores_folders_that_are_gone_afterwards(tmp_path, monkeypatch):
    script, temporary = tmp_path / "eval.py", tmp_path / "temporary"
    script.write_text(EVALUATE)
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    command = Command(f"{sys.executable} {script} {{folder}}", timeout=60)
    report = search(command, grid={"parameters.scale": [0.25, 0.5]})
    assert report.best.score == 1.0 and report.best.settings == {"parameters.scale": 0.5}
    assert report.trials[0].error == "the command ended with status 1 and said: the model is broken"
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('nothing')", "the command printed no number"),
        ("print('loss: nan')", "the objective returned nan"),
        ("import time; time.sleep(9)", "the command still ran after 0.5 s"),
    ],
)
def test_commands_without_a_score(code, message, tmp_path):
    script = tmp_path / "eval.py"
    script.write_text(code)
    with pytest.raises(MergeError, match=message):
        search(Command(f"{sys.executable} {script} {{folder}}", timeout=0.5), grid={"parameters.scale": [1.0]})
    with pytest.raises(MergeError, match="'no_such_tool' cannot be run"):
        search(Command("no_such_tool {folder}"), grid={"parameters.scale": [1.0]})
    with pytest.raises(MergeError, match="where the candidate stands"):
        Command("python eval.py")


def test_the_last_number_counts():
    assert Command("echo 3 {folder}")(Path("x-1.5e-1")) == pytest.approx(-0.15)
    assert Command("echo {folder} 0.5%")(Path("9")) == 0.5


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_a_model_takes_each_candidate():
    model = Tied()
    tensors = {k: v.clone() for k, v in model.state_dict().items() if k != "head.weight"}
    modes = []

    def metric(model):
        modes.append(model.training)
        return model.head.weight.sum().item() + model.norm.running_mean.sum().item()

    objective = load_into(model.train(), metric)
    other = {k: torch.ones_like(v) for k, v in tensors.items()}
    assert objective(other) == 15 + 3 and modes == [False] and model.training
    recipe = {"merge_method": "linear", "models": ["x", "y"], "parameters": {"normalize": False}}
    grid = {"models.x.weight": [0.5, 2.0], "models.y.weight": [0.0]}
    report = sweep(recipe, objective, grid=grid, sources={"x": other, "y": tensors}, progress=False)
    assert [t.score for t in report.trials] == [9.0, 36.0]
    with pytest.raises(MergeError, match=r"the merged tensors lack norm.weight"):
        objective({k: v for k, v in tensors.items() if k != "norm.weight"})
    with pytest.raises(MergeError, match=r"embed.weights \(5, 3\) is merged, but the model has no such tensor"):
        objective({**tensors, "embed.weights": tensors["embed.weight"]})
    with pytest.raises(MergeError, match=r"embed.weight \(4, 3\) is merged, but .* of shape \(5, 3\)"):
        objective({**tensors, "embed.weight": torch.zeros(4, 3)})


@pytest.mark.parametrize("name", ["BERT", "ViT", "LLaVA", "Llama tied"])
def test_models_of_transformers_take_what_their_files_hold(name, tmp_path):
    """ViT and LLaVA have other names in their files than in memory, BERT and Llama have tied tensors."""
    tiny = ARCHITECTURES[name]
    model = build(tiny)
    tensors = tensors_of(save(moved(model, 1), tmp_path / "moved"))
    score = load_into(model, lambda m: sum(v.double().abs().sum().item() for v in m.parameters()))(tensors)
    assert score == pytest.approx(sum(t.double().abs().sum().item() for t in tensors.values()))
    first = next(iter(tensors))
    with pytest.raises(MergeError, match=r"lack|is missing"):
        load_into(model, len)({k: v for k, v in tensors.items() if k != first})
    with pytest.raises(MergeError, match="no such tensor"):
        load_into(model, len)({**tensors, "nowhere.weight": torch.ones(2)})


def test_a_source_in_memory_is_like_the_source():
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    source = DictSource(tensors, "there", {"x": 1})
    held = InMemory(source)
    assert held.label == "there" and held.config == {"x": 1} and list(held) == ["a", "b"]
    assert (
        held["a"].equal(tensors["a"]) and held.read("b", 1, 3).equal(torch.tensor([1, 2])) and held.extent("a") is None
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of: grid, greedy, or optimiser with bounds"),
        ({"grid": {"parameters.scale": [1]}, "greedy": True}, "one of: grid, greedy"),
        ({"optimiser": "nelder-mead"}, "one of: grid, greedy, or optimiser with bounds"),
        ({"optimiser": "adam", "bounds": {"parameters.scale": (0, 1)}}, "unknown optimiser 'adam'"),
        ({"optimiser": "nelder-mead", "bounds": {"parameters.scale": (1, 0)}}, "the lower bound comes first"),
        ({"optimiser": "nelder-mead", "bounds": {}}, "nothing to optimise"),
        ({"grid": {}}, "the grid varies nothing"),
        ({"grid": {"parameters.scale": []}}, "parameters.scale: no values to try"),
        ({"grid": {"parameters.scale": [1]}, "budget": 0}, "budget must be positive, not 0"),
        ({"greedy": True}, "a soup is the mean of several models"),
    ],
)
def test_what_is_no_search(options, message):
    with pytest.raises(MergeError) as error:
        search(pytest.fail, **options)
    assert message in str(error.value)
    with pytest.raises(MergeError, match="leave out the weights"):
        search(pytest.fail, {**SOUP, "parameters": {"weight": [1, 2, 3]}}, greedy=True)
