"""Our methods against what fusion_bench made of the same tensors (recorded by tests/peer/record_fusion.py).

Where formulas differ: fusion_bench adds 1e-6 to all Fisher values (variant "add"); its WUDI descends by Adam to what
ours solves for; it fills up TSV's and Iso's bases with singular vectors of value zero, which ours leaves out (these
tensors have none).
"""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hf_vlmerge.merging import get_merge_method, merge_tensors

RECORDED = Path(__file__).resolve().parents[1] / "golden" / "fusion_bench.safetensors"
MEMBERS = ("0", "1", "2")
CASES = {
    "tsv_merge": ("tsv_merge", {}),
    "iso_c": ("iso_c", {}),
    "iso_cts": ("iso_cts", {}),
    "iso_cts_0.4": ("iso_cts", {"common_share": 0.4}),
}


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, torch.Tensor]]:
    """Checkpoint or algorithm -> its tensors, float64."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(RECORDED).items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups


def sources(recorded, dtype=torch.float32):
    """Inputs for merge_tensors: the members, the base, and each member's statistics."""
    models = {m: {k: v.to(dtype) for k, v in recorded[m].items() if k in recorded["base"]} for m in MEMBERS}
    statistics = {f"s{m}": {k: v for k, v in recorded[m].items() if k not in recorded["base"]} for m in MEMBERS}
    return {**models, **statistics, "base": {k: v.to(dtype) for k, v in recorded["base"].items()}}


def close(merged, expected, tolerance=1e-6):
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            merged[name].double(), tensor, rtol=tolerance, atol=tolerance, msg=lambda t, name=name: f"{name}: {t}"
        )


@pytest.mark.parametrize("case", CASES)
def test_methods_on_task_vectors(case, recorded):
    """The update itself, brought to size 1: members are task vectors about a zero base."""
    name, parameters = CASES[case]
    for tensor, base in recorded["base"].items():
        tasks = [((recorded[m][tensor] - base) * 100).float() for m in MEMBERS]
        update = get_merge_method(name)(tasks, base=torch.zeros_like(tasks[0]), **parameters)
        close({tensor: update}, {tensor: recorded[case][tensor] * 100}, 2e-6)


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_regmean(gamma, recorded):
    recipe = {
        "merge_method": "regmean",
        "models": [{"model": m, "statistics": f"s{m}"} for m in MEMBERS],
        "parameters": {"gamma": gamma},
    }
    close(merge_tensors(recipe, sources(recorded)), recorded[f"regmean_{gamma}"])


@pytest.mark.parametrize(
    ("case", "parameters"),
    [("fisher", {}), ("fisher_scaled", {"normalize": False, "weights": [0.2, 0.3, 0.5]})],
)
def test_fisher(case, parameters, recorded):
    recipe = {
        "merge_method": "fisher",
        "models": [{"model": m, "statistics": f"s{m}"} for m in MEMBERS],
        "parameters": {"variant": "add", **parameters},
    }
    close(merge_tensors(recipe, sources(recorded)), recorded[case])


def test_wudi_is_what_their_descent_goes_to(recorded):
    """After 30000 steps of Adam theirs is ours within the step's size; its loss is never below ours."""
    base, wudi = recorded["base"], get_merge_method("wudi")
    for name in base:
        tasks = [recorded[m][name] - base[name] for m in MEMBERS]
        ours = wudi([t.float() for t in tasks], base=torch.zeros_like(base[name]).float()).double()
        torch.testing.assert_close(recorded["wudi_30000"][name], ours, rtol=0, atol=3e-5)
        if base[name].ndim == 2:
            theirs = [interference(recorded[run][name], tasks) for run in ("wudi_30000", "wudi_400")]
            assert interference(ours, tasks) <= theirs[0] * (1 + 1e-6) < theirs[1]


def interference(update, tasks):
    """The loss of WUDI."""
    return sum(float(((update - own) @ own.T).norm() ** 2 / own.norm() ** 2) for own in tasks)


def test_the_recorded_version():
    with safe_open(RECORDED, "pt") as file:
        assert file.metadata()["made_with"].startswith("fusion_bench 0.2.33, ")
