"""The matrix over model classes: what is merged loads again with nothing missing, and holds what float64 says."""

import json
from fnmatch import fnmatch

import pytest
import torch
from torch import Tensor

from hf_vlmerge.merging import merge
from tests.merging.architectures import ARCHITECTURES, LAYOUTS, PLAIN, build, load, moved, save, tensors_of

WEIGHTS = {"a": 0.2, "b": 0.3, "c": 0.5}
DELTA_WEIGHTS, SCALE, DENSITY = {"a": 1.0, "b": 0.5}, 0.7, 0.4
NAMES = list(ARCHITECTURES)
SIDE = ("*.safetensors", "*.index.json", "config.json")


@pytest.fixture(scope="module", params=NAMES)
def family(request, tmp_path_factory):
    """A base and three members of one class, each stored in another layout, which turns with the class."""
    tiny = ARCHITECTURES[request.param]
    folder, turn = tmp_path_factory.mktemp("family"), NAMES.index(request.param)
    model = build(tiny)
    base_layout = PLAIN if turn % 3 else LAYOUTS[3]
    save(model, folder / "base", base_layout)
    for i, alias in enumerate("abc"):
        save(moved(model, i + 1), folder / alias, LAYOUTS[(turn + i) % len(LAYOUTS)])
    return tiny, folder


def running(name: str) -> bool:
    return name.endswith(("running_mean", "running_var"))


def mean(x: list[Tensor], weights: list[float]) -> tuple[Tensor, Tensor]:
    """The weighted mean in float64, and the sum of the magnitudes that went into it."""
    share = [w / sum(weights) for w in weights]
    terms = [w * t.double() for w, t in zip(share, x, strict=True)]
    return sum(terms), sum(t.abs() for t in terms)


def task_arithmetic(x: list[Tensor], base: Tensor, weights: list[float]) -> tuple[Tensor, Tensor]:
    terms = [SCALE * w * (t.double() - base.double()) for w, t in zip(weights, x, strict=True)]
    return base.double() + sum(terms), base.double().abs() + sum(t.abs() for t in terms)


def trimmed(x: Tensor, base: Tensor, threshold: Tensor) -> Tensor:
    """A task vector (in float32, where its entries are ranked) without what is smaller than the threshold."""
    delta = (x.double() - base.double()).float()
    return delta.where(delta.abs() >= threshold, 0.0).double()


def ties(x: list[Tensor], base: Tensor, weights: list[float], thresholds: list[Tensor]) -> tuple[Tensor, Tensor]:
    tau = torch.stack([trimmed(t, base, threshold) for t, threshold in zip(x, thresholds, strict=True)])
    agreeing = tau * (tau.sign() == tau.sum(0).sign())
    weighted = sum(w * t for w, t in zip(weights, agreeing, strict=True))
    delta = SCALE * weighted / (agreeing != 0).sum(0).clamp(min=1)
    return base.double() + delta, base.double().abs() + tau.abs().sum(0)


def kth_magnitude(values: list[Tensor]) -> Tensor:
    """The smallest of the largest magnitudes that make the share DENSITY."""
    magnitudes = torch.cat([v.flatten() for v in values]).abs()
    return magnitudes.topk(max(1, int(DENSITY * len(magnitudes)))).values[-1]


def assert_one_rounding(name: str, found: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """Half a unit in the last place of the output's dtype, and what float32 sums may differ from float64 ones."""
    assert found.shape == exact.shape, name
    limits = torch.finfo(found.dtype)
    unit = torch.exp2(torch.frexp(exact)[1].double() - 1).where(exact != 0, 0.0).clamp(min=limits.tiny) * limits.eps
    allowed = unit / 2 + 8 * torch.finfo(torch.float32).eps * magnitude
    worst = ((found.double() - exact).abs() - allowed).max()
    assert worst <= 0, f"{name}: off by {worst} more than one rounding"


def assert_reloads(tiny, out, source) -> None:
    """Nothing missing, unexpected or of another shape; finite outputs; tied weights are one tensor; files carried."""
    model, info = load(tiny, out)
    kinds = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(kinds.values()), kinds
    with torch.no_grad():
        outputs = model(**tiny.inputs())
    shown = [value for value in outputs.values() if isinstance(value, Tensor)]
    assert shown and all(value.isfinite().all() for value in shown)
    for target, origin in model.all_tied_weights_keys.items():
        assert model.get_parameter(target).data_ptr() == model.get_parameter(origin).data_ptr(), target
    carried = [f for f in source.iterdir() if not any(fnmatch(f.name, glob) for glob in SIDE)]
    assert {"chat_template.jinja", "vocab.txt"} <= {f.name for f in carried}
    assert all((out / f.name).read_bytes() == f.read_bytes() for f in carried)
    config, given = (json.loads((folder / "config.json").read_text()) for folder in (out, source))
    assert config == {key: value for key, value in given.items() if key != "_name_or_path"}
    if tiny.is_remote:
        assert {"modeling_toy.py", "configuration_toy.py"} <= {f.name for f in out.iterdir()}
        assert config["auto_map"]["AutoModel"] == "modeling_toy.ToyModel"
    if model.can_generate():
        assert (out / "generation_config.json").is_file()


def run(folder, recipe) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Merge; the tensors of the inputs, and of the output. The names are those of the inputs' files."""
    out = folder / recipe["merge_method"]
    merge(recipe, out, fsync=False, progress=False)
    given = {name: tensors_of(folder / name) for name in ("base", "a", "b", "c")}
    found = tensors_of(out)
    assert all(found.keys() == tensors.keys() for tensors in given.values())
    return given, found


def test_the_mean_of_three(family):
    tiny, folder = family
    models = [{"model": str(folder / n), "parameters": {"weight": w}} for n, w in WEIGHTS.items()]
    given, found = run(folder, {"merge_method": "linear", "models": models})
    for name, value in found.items():
        x = [given[n][name] for n in WEIGHTS]
        assert value.dtype == x[0].dtype, name
        if value.dtype.is_floating_point:
            assert_one_rounding(name, value, *mean(x, list(WEIGHTS.values())))
        else:
            assert value.equal(x[0]), name
    assert_reloads(tiny, folder / "linear", folder / "a")


def test_task_vectors_on_a_base(family):
    tiny, folder = family
    models = [{"model": str(folder / n), "parameters": {"weight": w}} for n, w in DELTA_WEIGHTS.items()]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "models": models}
    given, found = run(folder, recipe | {"parameters": {"scale": SCALE}})
    for name, value in found.items():
        x, base = [given[n][name] for n in DELTA_WEIGHTS], given["base"][name]
        assert value.dtype == base.dtype, name
        weights = list(DELTA_WEIGHTS.values())
        if not value.dtype.is_floating_point:
            assert value.equal(base), name
        elif running(name):  # variances are no vectors: they are averaged
            assert_one_rounding(name, value, *mean(x, weights))
        else:
            assert_one_rounding(name, value, *task_arithmetic(x, base, weights))
    assert_reloads(tiny, folder / "task_arithmetic", folder / "base")


def test_ties_on_a_base(family):
    tiny, folder = family
    scope = ("tensor", "global")[list(ARCHITECTURES.values()).index(tiny) % 2]
    models = [{"model": str(folder / n), "parameters": {"weight": w}} for n, w in DELTA_WEIGHTS.items()]
    recipe = {"merge_method": "ties", "base_model": str(folder / "base"), "models": models}
    parameters = {"scale": SCALE, "density": DENSITY, "scope": scope}
    given, found = run(folder, recipe | {"parameters": parameters})
    base, weights = given["base"], list(DELTA_WEIGHTS.values())
    vectors = [name for name, value in found.items() if value.is_floating_point() and not running(name)]
    deltas = {m: {n: (given[m][n].double() - base[n].double()).float() for n in vectors} for m in DELTA_WEIGHTS}
    whole = [kth_magnitude(list(deltas[m].values())) for m in DELTA_WEIGHTS]
    for name in vectors:
        own = whole if scope == "global" else [kth_magnitude([deltas[m][name]]) for m in DELTA_WEIGHTS]
        x = [given[m][name] for m in DELTA_WEIGHTS]
        assert_one_rounding(name, found[name], *ties(x, base[name], weights, own))
    assert_reloads(tiny, folder / "ties", folder / "base")


def test_the_matrix_has_at_least_25_classes():
    assert len({tiny.model for tiny in ARCHITECTURES.values()}) >= 25 and len(ARCHITECTURES) >= 30
