"""Distances: facts by hand, laws over the registry, and reports over groups."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from hf_vlmerge.merging import MergeError, distance, get_distance, list_distances, open_source
from hf_vlmerge.merging.program import BLOCK

A = torch.tensor([3.0, 0.0, -1.0, 2.0])
B = torch.tensor([3.0, 4.0, 1.0, -1.0])
C = torch.tensor([-3.0, 4.0, 0.0, 1.0])


def test_l2():
    l2 = get_distance("l2")
    assert l2([A, B]) == pytest.approx(math.sqrt(16 + 4 + 9))
    pairs = [math.sqrt(16 + 4 + 9), math.sqrt(36 + 16 + 1 + 1), math.sqrt(36 + 1 + 4)]
    assert l2([A, B, C]) == pytest.approx(sum(pairs) / 3)


def test_cosine():
    cosine = get_distance("cosine")
    assert cosine([A, B]) == pytest.approx(1 - (9 - 1 - 2) / math.sqrt(14 * 27))
    assert cosine([A, -A]) == pytest.approx(2) and cosine([A, 3 * A]) == pytest.approx(0)
    assert cosine([A, 0 * A]) == 1 and cosine([0 * A, 0 * A]) == 0


def test_soft_sign_dissimilarity():
    ssd = get_distance("ssd")
    assert ssd([A, B]) == pytest.approx((0 + 0 + 1 + (1 - 1 / 3)) / 4)
    assert ssd([A, B, C]) == pytest.approx(((1 - 3 / 9) + 0 + 1 + (1 - 2 / 4)) / 4)
    assert ssd([A, -A]) == 0.75  # 0/0 counts as agreement
    assert ssd([A, 2 * A]) == 0


def test_truncation_keeps_the_largest_entries_of_each_member():
    tssd = get_distance("tssd")
    # half: A keeps 3 and 2, B keeps 3 and 4: no entry of both differs in sign
    assert tssd([A, B], keep_fraction=0.5) == 0
    # three quarters: A keeps 3, -1, 2; B keeps 3, 4 and both of magnitude 1
    assert tssd([A, B], keep_fraction=0.75) == pytest.approx((1 + 2 / 3) / 4)
    assert tssd([A, B], keep_fraction=1.0) == get_distance("ssd")([A, B])
    assert tssd([A, B], keep_fraction={"0": 1.0, "1": 0.01}) == 0


@pytest.fixture(params=list_distances())
def metric(request):
    return request.param


def test_laws(metric):
    measure = get_distance(metric)
    x, y, z = torch.randn(3, 50)
    assert measure([x, x]) == pytest.approx(0, abs=1e-12) and measure([x, x, x]) == pytest.approx(0, abs=1e-12)
    assert measure([x, y]) >= 0 and measure([x, y]) == measure([y, x])
    assert measure([x, y, z]) >= 0
    assert measure([x.reshape(5, 10), y.reshape(5, 10)]) == measure([x, y])


def model(seed, layers=2, dtype=torch.float32):
    torch.manual_seed(seed)
    tensors = {"norm.weight": torch.randn(3).to(dtype)}
    for i in range(layers):
        for expert in ("vision", "language", "vision_language")[: 3 if i == layers - 1 else 2]:
            tensors[f"enc.layers.{i}.attention.{expert}.w"] = torch.randn(7, 5).to(dtype)
            tensors[f"enc.layers.{i}.ffn.{expert}.w"] = torch.randn(6).to(dtype)
    return tensors


RECIPE = {
    "merge_method": "linear",
    "experts_of": "msa",
    "experts": {"experts": ["vision", "language", "vision_language"]},
}


def test_experts_of_one_checkpoint_by_layer_and_in_total(metric):
    tensors = model(0)
    report = distance(RECIPE, metric=metric, sources={"msa": tensors}, progress=False)
    pairs = {"vision-language", "vision-vision_language", "language-vision_language"}
    assert report.total.keys() == pairs and report.layers.keys() == {"enc.layers.0", "enc.layers.1"}
    assert report.layers["enc.layers.0"].keys() == {"vision-language"}
    assert {(r.layer, r.module) for r in report.rows} == {
        (f"enc.layers.{i}", m) for i in (0, 1) for m in ("attention", "ffn")
    }
    assert sum(r.parameters for r in report.rows if r.pair == "vision-language") == 2 * (35 + 6)
    if metric != "tssd":  # its threshold is one of each tensor

        def joined(expert, layers):
            return torch.cat(
                [tensors[f"enc.layers.{i}.{m}.{expert}.w"].flatten() for i in layers for m in ("attention", "ffn")]
            )

        whole = get_distance(metric)([joined(e, (0, 1)) for e in ("vision", "language")])
        assert report.total["vision-language"] == pytest.approx(whole)
        last = get_distance(metric)([joined(e, (1,)) for e in ("vision", "vision_language")])
        assert report.total["vision-vision_language"] == pytest.approx(last)
    assert json.dumps(report.to_dict())
    table = report.table()
    assert "vision-language" in table and "enc.layers.1" in table and "attention" in table


def test_all_members_at_once_and_named_pairs():
    sources = {"msa": model(0)}
    at_once = distance(RECIPE, metric="ssd", pairs="all", sources=sources, progress=False)
    assert at_once.total.keys() == {"vision-language", "vision-language-vision_language"}
    named = distance(RECIPE, metric="ssd", pairs=[("vision", "vision_language")], sources=sources, progress=False)
    each = distance(RECIPE, metric="ssd", sources=sources, progress=False)
    assert named.total == {"vision-vision_language": each.total["vision-vision_language"]}


def test_against_a_base_the_modality_vectors_are_measured():
    tensors = model(0)
    base = {k.replace(".vision.", ".shared."): torch.ones_like(v) for k, v in tensors.items() if "language" not in k}
    sources = {"msa": tensors, "seed": base}
    report = distance(RECIPE, metric="cosine", base="seed", reference="base", sources=sources, progress=False)
    shifted = {k: v - 1 for k, v in tensors.items()}
    plain = distance(RECIPE, metric="cosine", sources={"msa": shifted}, progress=False)
    assert report.total == pytest.approx(plain.total) and report.reference == "base"
    same = distance(RECIPE, metric="l2", base="seed", reference="base", sources=sources, progress=False)
    other = distance(RECIPE, metric="l2", sources=sources, progress=False)
    assert same.total == pytest.approx(other.total, rel=1e-6)


def test_the_threshold_of_each_tensor_or_of_the_whole_model():
    small, large = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    models = {"a": {"0.w": small, "1.w": large}, "b": {"0.w": -small, "1.w": large}}
    options = {"metric": "tssd", "keep_fraction": 0.5, "progress": False}
    assert distance(models, scope="tensor", **options).layers["0"]["a-b"] == 0.5
    assert distance(models, scope="global", **options).layers["0"]["a-b"] == 0.0


def test_the_chunk_size_changes_nothing(metric):
    models = {n: {"0.w": torch.randn(3 * BLOCK + 5), "0.v": torch.randn(40)} for n in "ab"}
    runs = [
        distance(models, metric=metric, chunk_size=size, progress=False).to_dict() for size in (1, BLOCK * 2, 1 << 24)
    ]
    assert runs[0] == runs[1] == runs[2]


def test_what_can_be_compared(tmp_path):
    for name, seed in (("left", 0), ("right", 1)):
        (tmp_path / name).mkdir()
        save_file(model(seed), tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"expert_layout": RECIPE["experts"]}))
    left, right = tmp_path / "left", tmp_path / "right"
    experts = distance(str(left), progress=False)
    assert experts.total.keys() == distance(open_source(left), progress=False).total.keys()
    by_name = distance([left, right], progress=False)
    assert by_name.total.keys() == {"left-right"} and "" in by_name.layers  # the norm lies outside layers
    assert distance({"x": left, "y": model(1)}, progress=False).total["x-y"] == by_name.total["left-right"]
    (tmp_path / "recipe.yaml").write_text(f"merge_method: linear\nexperts_of: {left}\n")
    assert distance(tmp_path / "recipe.yaml", progress=False).total == experts.total
    kept = {"merge_method": "linear", "models": [str(left), str(right)], "rules": [{"match": "enc*", "keep": "left"}]}
    assert distance(kept, progress=False).layers.keys() == {""}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "sds"}, "unknown distance 'sds'; did you mean 'ssd'?"),
        ({"keep": 1}, "ssd has no parameter 'keep'; it has no parameters"),
        (
            {"metric": "tssd", "keep_fractoin": 1},
            "tssd has no parameter 'keep_fractoin'; did you mean 'keep_fraction'?",
        ),
        ({"metric": "tssd", "scope": "model"}, "scope must be one of 'tensor', 'global', not 'model'"),
        ({"reference": "seed"}, "reference is 'none' or 'base', not 'seed'"),
        ({"reference": "base"}, "reference 'base' needs a base"),
        ({"pairs": "some"}, "pairs is 'each', 'all' or a list of pairs, not 'some'"),
        ({"pairs": [("vision", "text")]}, "nothing to compare"),
    ],
)
def test_what_cannot_be_compared(options, message):
    with pytest.raises(MergeError) as error:
        distance(RECIPE, sources={"msa": model(0)}, progress=False, **options)
    assert message in str(error.value)


def test_one_source_is_no_pair():
    with pytest.raises(MergeError, match="at least two sources with different names"):
        distance(["runs/a/model", "runs/b/model"])


@pytest.mark.parametrize("metric", list_distances())
def test_tensors_without_elements_do_not_count(metric):
    w = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([2.0, 1.0])}
    full = distance({alias: {"w": value} for alias, value in w.items()}, metric=metric, progress=False).total
    models = {alias: {"w": value, "none": torch.zeros(0, 3)} for alias, value in w.items()}
    assert distance(models, metric=metric, progress=False).total == full
