"""Distances: facts by hand, laws over the registry, and reports over groups."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from hf_vlmerge.merging import (
    MergeError,
    distance,
    get_distance,
    list_distances,
    measurement,
    mergeability,
    open_source,
)
from hf_vlmerge.merging.program import BLOCK
from hf_vlmerge.merging.registry import DISTANCES, distance_metric
from hf_vlmerge.merging.survey import CLOSENESS
from hf_vlmerge.merging.tensors.sources import DictSource

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


def test_the_number_of_threads_changes_nothing(metric, monkeypatch):
    models = {n: {f"{i}.w": torch.randn(3000) for i in range(20)} for n in "abc"}
    found = []
    for threads in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(3)), raising=False)
        found.append(distance(models, metric=metric, progress=False).to_dict())
    assert found[0] == found[1]


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


def test_sign_conflicts_count_entries_that_two_members_move():
    conflict = get_distance("sign_conflict")
    assert conflict([A, B]) == 2 / 3  # 3 3 | 0 4 | -1 1 | 2 -1: the second entry has one member
    assert conflict([A, B, C]) == 3 / 4  # 3 3 -3 | 0 4 4 | -1 1 0 | 2 -1 1
    assert conflict([A, 0 * A]) == 0


def test_the_magnitude_gap():
    gap = get_distance("magnitude_gap")
    assert gap([A, B]) == pytest.approx(1 - math.sqrt(14 / 27))
    assert gap([A, 3 * B, B]) == pytest.approx(1 - math.sqrt(14 / 27) / 3)
    assert gap([A, 0 * A]) == 1 and gap([0 * A, 0 * A]) == 0


class CountingSource(DictSource):
    """Counts how many elements are read."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.read_elements = 0

    def read(self, key, start=0, stop=None):
        values = super().read(key, start, stop)
        self.read_elements += len(values)
        return values


def test_all_distances_are_taken_in_one_pass(monkeypatch):
    sources = {name: CountingSource(model(i)) for i, name in enumerate("abc")}
    size = sum(t.numel() for t in model(0).values())
    recipe = {"merge_method": "linear", "models": ["a", "b", "c"]}
    report = mergeability(recipe, sources=sources, progress=False)
    assert {s.read_elements for s in sources.values()} == {size}, "six distances, three pairs, one pass"
    for name in list_distances():
        alone = distance(recipe, metric=name, sources=sources, progress=False)
        assert report.distances[name].to_dict() == alone.to_dict()
    monkeypatch.setattr(measurement, "HELD", 0)  # tensors too large to be held are read again, with the same result
    again = mergeability(recipe, sources=sources, progress=False)
    assert again.to_dict() == report.to_dict()


def test_distances_of_another_unit_see_their_own_chunks():
    whole = lambda c: (torch.tensor(len(c.x.shape)), torch.tensor(1))  # noqa: E731
    distance_metric("dimensions", unit="tensor")(lambda: (whole, lambda dimensions, tensors: dimensions / tensors))
    try:
        models = {"a": {"0.w": torch.ones(3, 4)}, "b": {"0.w": torch.zeros(3, 4)}}
        report = mergeability(models, progress=False)
        assert report.distances["dimensions"].total["a-b"] == 3  # members, rows, columns
        assert report.distances["magnitude_gap"].total["a-b"] == 1
    finally:
        DISTANCES.entries.pop("dimensions")


def family(layers=4, noise=(0.0, 0.05, 0.15, 3.0)):
    """Two models that part more from layer to layer, and their base."""
    torch.manual_seed(1)
    base, models = {}, {"a": {}, "b": {}}
    for i in range(layers):
        for module in ("attn.q", "mlp.up"):
            name = f"model.layers.{i}.{module}.weight"
            base[name] = torch.randn(20, 16)
            for tensors in models.values():
                tensors[name] = base[name] + noise[i] * torch.randn(20, 16)
    for tensors in (base, *models.values()):
        tensors["model.embed.weight"] = torch.ones(5, 16)
    return models, base


def test_the_report_says_which_layers_merge_well():
    models, _ = family()
    report = mergeability(models, progress=False)
    assert [report.verdict(f"model.layers.{i}") for i in range(4)] == ["well", "well", "with care", "badly"]
    assert report.summary().startswith(
        "By the distance of their weights, model.layers.0–1 (2 of 4 layers) will merge well; model.layers.2 (1 of 4 "
        "layers) will merge with care; model.layers.3 (1 of 4 layers) will merge badly. Over all entries the farthest "
        "pair is a-b, with a cosine dissimilarity of "
    )
    labels = [line.label for line in report.sheet("a-b", modules=True)]
    assert labels[:3] == ["model.layers.0", "model.layers.0 / attn", "model.layers.0 / mlp"]
    assert labels[-5:] == [
        "outside layers",
        "outside layers / model.embed",
        "all layers / attn",
        "all layers / mlp",
        "total",
    ]
    assert report.compared == 4 * 640 + 80 and report.copied == 0 and report.verdict("") == ""
    both = torch.cat([models["a"][f"model.layers.{i}.attn.q.weight"] for i in range(4)])
    other = torch.cat([models["b"][f"model.layers.{i}.attn.q.weight"] for i in range(4)])
    assert report.distances["cosine"].modules["attn"]["a-b"] == pytest.approx(get_distance("cosine")([both, other]))
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["verdicts"]["model.layers.3"] == "badly"
    assert "model.layers.3" in report.table() and "model.layers.3 / mlp" in report.table(modules=True)


def test_a_base_makes_it_a_report_on_task_vectors():
    models, base = family()
    recipe = {"merge_method": "task_arithmetic", "models": ["a", "b"], "base_model": "seed"}
    report = mergeability(recipe, sources={**models, "seed": base}, progress=False)
    assert report.reference == "base" and list(report.distances)[-1] == CLOSENESS
    weights = mergeability(recipe, reference="none", sources={**models, "seed": base}, progress=False)
    assert weights.reference == "none" and CLOSENESS not in weights.distances
    assert report.closeness.layers == weights.distances["cosine"].layers, "the verdict is about the weights"
    assert [report.verdict(layer) for layer in report.layers] == [weights.verdict(layer) for layer in weights.layers]
    assert report.distances["cosine"].layers["model.layers.2"]["a-b"] == pytest.approx(1, abs=0.2)
    share = 100 * report.distances["sign_conflict"].total["a-b"]
    assert f"differ in sign in {share:.0f} % of the entries" in report.summary() and 40 < share < 60
    alone = distance(recipe, metric="ssd", reference="base", sources={**models, "seed": base}, progress=False)
    assert report.distances["ssd"].to_dict() == alone.to_dict()


def test_grams_are_reported_by_how_well_they_can_be_inverted(tmp_path):
    models, _ = family(layers=2)
    names = [f"{n}" for n in models["a"] if "embed" not in n]
    x = torch.randn(100, 16, dtype=torch.float64)
    few = torch.randn(5, 16, dtype=torch.float64)
    for alias, rows in (("a", x), ("b", few)):
        tensors = {f"gram.{name}": rows.T @ rows for name in names[1:]}
        aliases = {f"gram.{names[0]}": f"gram.{names[1]}"}
        tokens = {key: len(rows) for key in tensors}
        save_file(
            tensors, tmp_path / f"{alias}.safetensors", {"aliases": json.dumps(aliases), "tokens": json.dumps(tokens)}
        )
    members = [{"model": alias, "statistics": str(tmp_path / f"{alias}.safetensors")} for alias in "ab"]
    report = mergeability({"merge_method": "linear", "models": members}, sources=models, progress=False)
    assert [(row.weight, row.member) for row in report.grams[:3]] == [
        (names[0], "a"),
        (names[0], "b"),
        (names[0], "sum"),
    ]
    by_member = {row.member: row for row in report.grams if row.weight == names[-1]}
    assert by_member["a"].condition == pytest.approx(float(torch.linalg.cond(x.T @ x)))
    assert by_member["b"].condition is None and by_member["b"].tokens == 5 and 1 < by_member["b"].rank <= 5
    total = x.T @ x + few.T @ few
    assert (
        by_member["sum"].condition == pytest.approx(float(torch.linalg.cond(total))) and by_member["sum"].tokens == 105
    )
    assert by_member["sum"].rank == pytest.approx(float(total.trace() ** 2 / (total * total).sum()))
    table = report.table()
    assert "model.layers.0, b: model.layers.0.attn.q.weight, singular" in table
    with pytest.raises(MergeError, match="no Gram matrix of a compared weight"):
        mergeability(RECIPE, statistics=str(tmp_path / "a.safetensors"), sources={"msa": model(0)}, progress=False)


def test_a_member_of_another_shape_cannot_be_measured():
    with pytest.raises(MergeError, match="shapes differ"):
        mergeability({"a": {"0.w": torch.ones(3)}, "b": {"0.w": torch.ones(4)}}, progress=False)
