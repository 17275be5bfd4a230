"""Merges on a GPU give what they give on the CPU, and a device that is not there is refused in a sentence."""

import pytest
import torch

from hf_vlmerge.merging import MergeError, list_merge_methods, merge, merge_tensors
from hf_vlmerge.merging.program import BLOCK
from tests.merging.every_method import recipe_for, write_inputs

VARIANTS = [
    ("linear", {"normalize": False}),
    ("task_arithmetic", {"normalize": True, "scale": 0.3}),
    ("ties", {"scope": "tensor", "density": [0.1, 1.0], "zero_sign": "positive", "rescale": True}),
    ("ties", {"elect": "weighted", "mean": "weights", "zero_sign": "majority"}),
    ("breadcrumbs", {"ranked_over": "row", "gamma": 0.05, "rescale": True}),
    ("dare_ties", {"rescale_by": "l1", "density": [0.3, 1.0]}),
    ("della", {"density": 0.3, "epsilon": 0.2}),
    ("model_stock", {"filter_wise": True}),
    ("nuslerp", {"along": "row"}),
    ("nuslerp", {"along": "column"}),
    ("sce", {"select_topk": 0.3, "selection": "weights"}),
    ("wudi", {"spectral": True}),
]
CASES = [(name, {}) for name in list_merge_methods()] + VARIANTS


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def steps_between(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many bfloat16 numbers apart two bfloat16 tensors are, in units of the larger one's last place."""
    step = torch.exp2(torch.maximum(a.abs(), b.abs()).double().clamp(min=2.0**-126).log2().floor() - 7)
    return (a.double() - b.double()).abs() / step


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps", ""])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(MergeError, match=r"chunks are merged on 'cpu' or 'cuda' .*, not on|there is no device|no GPU"):
        merge_tensors({"merge_method": "linear", "models": ["a"]}, {"a": {"w": torch.ones(2)}}, device=name)


def test_without_a_gpu_cuda_is_refused_before_anything_is_written(inputs, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(MergeError, match="device 'cuda' was asked for, but torch finds no GPU here; use device 'cpu'"):
        merge(recipe_for("linear", inputs), tmp_path / "out", device="cuda", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "parameters"), CASES, ids=str)
def test_the_gpu_agrees_with_the_cpu(name, parameters, inputs):
    recipe = {**recipe_for(name, inputs), "parameters": parameters}
    expected = merge_tensors(recipe, threads=1)
    found = merge_tensors(recipe, threads=2, device="cuda")
    assert all(steps_between(found[key], value).max() <= 1 for key, value in expected.items() if key != "steps")
    exact = {**recipe, "out_dtype": "float32"}
    expected, found = merge_tensors(exact, threads=1), merge_tensors(exact, threads=2, device="cuda")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6 * float(value.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("name", list_merge_methods())
def test_chunks_and_threads_change_no_byte_there_either(name, inputs, tmp_path):
    recipe = recipe_for(name, inputs)
    settings = {"device": "cuda", "fsync": False, "progress": False}
    merge(recipe, tmp_path / "whole", threads=1, **settings)
    merge(recipe, tmp_path / "small", threads=3, chunk_size=BLOCK, **settings)
    whole, small = (tmp_path / run / "model.safetensors" for run in ("whole", "small"))
    assert whole.read_bytes() == small.read_bytes()


@pytest.mark.gpu
def test_not_finite_inputs_are_named_there_too():
    values = {"w": torch.tensor([1.0, float("nan")])}
    with pytest.raises(MergeError, match=r"w of .* contains NaN"):
        merge_tensors({"merge_method": "linear", "models": ["a", "b"]}, {"a": values, "b": values}, device="cuda")
