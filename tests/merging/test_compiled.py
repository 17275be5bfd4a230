"""Compiled forms give the bits of the torch programs, and say the same of what is wrong."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_vlmerge.merging import (
    MergeError,
    _compiled,
    _ops,
    get_merge_method,
    list_merge_methods,
    merge,
    merge_tensors,
    streaming,
)
from tests.merging.every_method import SHAPES

pytest.importorskip("numba")

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
VARIANTS = [
    ("linear", {}),
    ("linear", {"normalize": False}),
    ("task_arithmetic", {"scale": 0.3}),
    ("task_arithmetic", {"normalize": True}),
    ("ties", {}),
    ("ties", {"scope": "tensor", "density": [0.1, 0.5, 1.0], "scale": 0.7}),
    ("ties", {"scope": "tensor", "elect": "weighted", "mean": "weights", "zero_sign": "positive", "rescale": True}),
    ("ties", {"normalize": False, "zero_sign": "majority"}),
    ("ties", {"density": [0.0, 0.2, 0.4]}),
    ("breadcrumbs", {"density": 0.9, "gamma": 0.01}),
    ("breadcrumbs", {"normalize": True, "rescale": True}),
    ("breadcrumbs_ties", {"gamma": [0.0, 0.1, 0.9]}),
    ("dare_linear", {}),
    ("dare_linear", {"rescale_by": "l1", "density": [0.3, 1.0, 0.77]}),
    ("dare_ties", {"density": [0.0, 0.3, 0.9]}),
    ("dare_ties", {"rescale": False, "mean": "weights"}),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base and three members near it in two dtypes, with zeros of both signs and equal entries."""
    root = tmp_path_factory.mktemp("inputs")
    for name, dtype in DTYPES.items():
        for seed, alias in enumerate(("base", "a", "b", "c")):
            own, shared = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(9)
            tensors = {}
            for key, shape in SHAPES.items():
                values = torch.randn(shape, generator=shared) * 0.02
                values += torch.randn(shape, generator=own) * 2e-3
                values.view(-1)[::7], values.view(-1)[3::91] = 0.0, -0.0
                tensors[key] = values.to(dtype)
            (root / name / alias).mkdir(parents=True)
            save_file(tensors, root / name / alias / "model.safetensors")
    return root


@pytest.fixture
def always(monkeypatch):
    """Compiled forms for every merge, however small; counts the runs that went through the kernels."""
    from hf_vlmerge.merging import _kernels

    calls = {"merge": 0, "split": 0}

    def counting(name, kernel):
        def call(*arguments):
            calls[name] += 1
            return kernel(*arguments)

        return call

    monkeypatch.setattr(_compiled, "WORTH_IT", 0)
    for name in calls:
        monkeypatch.setattr(_kernels, name, counting(name, getattr(_kernels, name)))
    return calls


def recipe_for(folder, method, parameters, **more):
    weights = dict(zip("abc", (0.2, 0.3, 0.7), strict=True))
    models = [{"model": str(folder / alias), "parameters": {"weight": weights[alias]}} for alias in "abc"]
    recipe = {"merge_method": method, "parameters": parameters, "models": models, "seed": 5, **more}
    return recipe | ({"base_model": str(folder / "base")} if method != "linear" else {})


def weights(recipe, output, **settings):
    merge(recipe, output, fsync=False, progress=False, overwrite=True, **settings)
    return (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("written", DTYPES)
@pytest.mark.parametrize(("method", "parameters"), VARIANTS, ids=str)
def test_compiled_and_torch_give_the_same_bytes(method, parameters, stored, written, inputs, tmp_path, request):
    recipe = recipe_for(inputs / stored, method, parameters, out_dtype=written)
    expected = weights(recipe, tmp_path / "torch")
    calls = request.getfixturevalue("always")
    assert weights(recipe, tmp_path / "compiled") == expected
    assert weights(recipe, tmp_path / "copies", threads=2, processes=True, chunk_size=1) == expected
    assert calls["merge"] >= len(SHAPES)
    assert bool(calls["split"]) == method.startswith(("ties", "breadcrumbs"))


def test_the_variants_are_those_of_all_methods_with_a_compiled_form():
    compiled = {name for name in list_merge_methods() if get_merge_method(name).compiled}
    assert compiled == {method for method, _ in VARIANTS}


def test_runs_that_have_no_compiled_form_are_merged_all_the_same(inputs, always, tmp_path):
    """Inputs of two dtypes, an output in float16, magnitudes ranked within rows."""
    mixed = recipe_for(inputs / "bfloat16", "task_arithmetic", {})
    mixed["models"][0]["model"] = str(inputs / "float32" / "a")
    rows = recipe_for(inputs / "bfloat16", "breadcrumbs", {"ranked_over": "row"})
    half = recipe_for(inputs / "bfloat16", "task_arithmetic", {}, out_dtype="float16")
    for recipe in (mixed, half, rows):
        weights(recipe, tmp_path / "out")
    assert always == {"merge": 0, "split": 0}


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_views_that_give_float32_are_taken_as_such(method, inputs, always, tmp_path):
    """An adapted member is read in float32, whatever its dtype is; one without the tensor as it is stored."""
    target = "layers.0.weight"
    rank = torch.Generator().manual_seed(3)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        factors = {
            "base_model.model.layers.0.lora_A.weight": torch.randn(4, SHAPES[target][1], generator=rank),
            "base_model.model.layers.0.lora_B.weight": torch.randn(SHAPES[target][0], 4, generator=rank),
        }
        save_file(factors, tmp_path / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["layers.0"]}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    base = inputs / "bfloat16" / "base"
    recipe = {"merge_method": method, "base_model": str(base)}
    recipe["models"] = [f"{base}+{tmp_path / 'first'}", f"{base}+{tmp_path / 'second'}", str(inputs / "bfloat16" / "a")]
    expected = merge_tensors(recipe)  # in memory all goes the torch way
    assert weights(recipe, tmp_path / "out") and always["merge"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(found[key].equal(value) for key, value in expected.items())


@pytest.mark.parametrize("method", ["linear", "ties", "breadcrumbs"])
def test_a_tensor_without_entries_is_merged_too(method, always, tmp_path):
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        save_file({"none": torch.empty(0, 3), "w": torch.randn(5)}, tmp_path / name / "model.safetensors")
    recipe = {"merge_method": method, "models": [str(tmp_path / "a"), str(tmp_path / "b")]}
    weights(recipe | ({} if method == "linear" else {"base_model": str(tmp_path / "base")}), tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["none"].shape == (0, 3)


def test_infinities_that_elect_nobody_are_refused(always, tmp_path):
    for name, value in (("base", 0.0), ("a", 3e38), ("b", -3e38)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((4,), value)}, tmp_path / name / "model.safetensors")
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1e30}} for name in "ab"]
    recipe = {"merge_method": "ties", "base_model": str(tmp_path / "base"), "models": models}
    recipe["parameters"] = {"elect": "weighted", "density": 1.0}
    with pytest.raises(MergeError, match="do not fit into float32"):
        weights(recipe, tmp_path / "out")


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_refused_by_name(method, value, inputs, always, tmp_path):
    folder = tmp_path / "inputs"
    for alias in ("base", "a", "b", "c"):
        tensors = load_file(inputs / "bfloat16" / alias / "model.safetensors")
        if alias == "b":
            tensors["flat"][-3] = value
        (folder / alias).mkdir(parents=True)
        save_file(tensors, folder / alias / "model.safetensors")
    kind = "Inf" if value == float("-inf") else "NaN"
    with pytest.raises(MergeError, match=f"flat of b .* contains {kind}"):
        weights(recipe_for(folder, method, {}), tmp_path / "out")
    merge(recipe_for(folder, method, {}), tmp_path / "out", allow_nonfinite=True, progress=False)


def test_what_does_not_fit_is_refused(inputs, always, tmp_path):
    for scale in (3e38, 1e300):
        recipe = recipe_for(inputs / "float32", "task_arithmetic", {"scale": scale}, out_dtype="bfloat16")
        recipe["models"][0]["parameters"]["weight"] = 1e4
        with pytest.raises(MergeError, match="do not fit into bfloat16"):
            weights(recipe, tmp_path / "out")


def test_weights_that_cannot_be_normalised_are_refused(inputs, always, tmp_path):
    recipe = recipe_for(inputs / "bfloat16", "linear", {})
    for model, weight in zip(recipe["models"], (1, 1, -2), strict=True):
        model["parameters"]["weight"] = weight
    with pytest.raises(MergeError, match="sum to zero"):
        weights(recipe, tmp_path / "out")


def test_without_numba_or_a_place_for_it_torch_merges(inputs, monkeypatch, tmp_path):
    recipe = recipe_for(inputs / "bfloat16", "ties", {})
    expected = weights(recipe, tmp_path / "torch")
    monkeypatch.setattr(_compiled, "WORTH_IT", 0)
    monkeypatch.setitem(sys.modules, "hf_vlmerge.merging._kernels", None)  # importing it raises ImportError
    assert weights(recipe, tmp_path / "out") == expected
    monkeypatch.setattr(_compiled, "find_spec", lambda name: None)
    assert weights(recipe, tmp_path / "out") == expected


def test_what_is_read_once_is_copied_whole_in_several_pieces_or_mapped(inputs, always, monkeypatch, tmp_path):
    recipe = recipe_for(inputs / "bfloat16", "linear", {})
    expected = weights(recipe, tmp_path / "copied")
    at_once, asked = os.preadv, []

    def in_pieces(descriptor, buffers, offset):
        asked.append(len(buffers[0]))
        return at_once(descriptor, [buffers[0][:1000]], offset)

    monkeypatch.setattr(os, "preadv", in_pieces)
    assert weights(recipe, tmp_path / "pieces") == expected and asked
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(MergeError, match="became shorter while it was read"):
        weights(recipe, tmp_path / "shorter")
    monkeypatch.setattr(streaming, "CAN_COPY", False)
    assert weights(recipe, tmp_path / "mapped") == expected


@pytest.mark.parametrize("width", [256, 301, 1024, 5000])
def test_ranks_within_rows_are_the_same_with_and_without_kernels(width, monkeypatch):
    rows = torch.randn(9, width, generator=torch.Generator().manual_seed(0))
    rows[1] = rows[1].bfloat16()  # ties
    rows[2], rows[3] = 0.0, -0.0
    rows[4, ::3], rows[4, 1::3], rows[4, 2::3] = torch.inf, torch.nan, -torch.inf
    rows[5] *= 1e-42  # subnormal
    rows[6] = torch.arange(width)
    rows[7] = -torch.arange(width).flip(0)
    rows[8] = torch.tensor([1.0, -1.0]).repeat(width)[:width]
    assert _compiled.load() and _compiled.is_loaded()
    compiled = _ops.by_rank(rows, 0.25, 0.75)
    monkeypatch.setattr(_compiled, "is_loaded", lambda: False)
    expected = _ops.by_rank(rows, 0.25, 0.75)
    assert torch.equal(compiled, expected)
    assert expected[6].tolist() == torch.linspace(0.25, 0.75, width, dtype=torch.float64).float().tolist()
    assert compiled[8, 0] == 0.25 and compiled[8, -1] == 0.75  # of equal ones the earlier ranks lower


def test_a_package_is_absent_only_while_it_is_said_to_be():
    with _compiled.absent("a_package_that_nobody_has"), pytest.raises(ImportError):
        import a_package_that_nobody_has  # noqa: F401
    assert "a_package_that_nobody_has" not in sys.modules
    with _compiled.absent("torch"):  # it was imported before
        assert sys.modules["torch"] is torch
