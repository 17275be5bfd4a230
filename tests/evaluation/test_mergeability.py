"""The mergeability report as picture and page: complete, well-formed, and in need of nothing from elsewhere."""

import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from hf_vlmerge.evaluation.mergeability_page import mergeability_page
from hf_vlmerge.evaluation.mergeability_plot import cells, plot_mergeability
from hf_vlmerge.merging import mergeability

VOID = {"meta", "br", "line", "circle", "polyline"}


def models(names, layers=3):
    torch.manual_seed(0)
    base = {f"model.layers.{i}.{m}.weight": torch.randn(6, 4) for i in range(layers) for m in ("attn", "mlp")}
    base["model.layers.1.extra.weight"] = torch.randn(4)
    base["embed.weight"] = torch.randn(5, 4)
    return {name: {k: v + 0.3 * torch.randn_like(v) for k, v in base.items()} for name in names}


@pytest.fixture(scope="module")
def report():
    return mergeability(models(["a", "b<i>", "c"]), progress=False)


class Reader(HTMLParser):
    """Checks that tags are balanced; collects text and attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not reader.open
    return reader, "".join(reader.text)


def test_the_page_is_complete_and_self_contained(report, tmp_path):
    path = mergeability_page(report, tmp_path / "report.html", title="Two & three")
    reader, text = read(path)
    assert report.summary() in text and "Two & three" in text and "b<i>" in text
    for metric in report.distances:
        assert metric in text
    for row in report.first.rows:
        if row.layer:
            assert f"{row.value:.4g}" in text and row.module in text
    content = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|src=|href=|@import|url\(|<script", content), "nothing from elsewhere, no script"
    assert "prefers-color-scheme: dark" in content and "color-scheme: light dark" in content
    lines = [value for name, value in reader.attributes if name == "points"]
    assert len(lines) == len(report.pairs) and all(len(line.split()) == 3 for line in lines)


def test_the_page_opens_with_its_summary(report, tmp_path):
    _, text = read(mergeability_page(report, tmp_path / "report.html"))
    body = text.partition("Mergeability report")[2].partition("Mergeability report")[2]
    assert body.strip().startswith(report.summary())


def test_a_page_of_task_vectors_with_grams(tmp_path):
    given = models(["a", "b", "seed"], layers=1)
    grams = {f"gram.model.layers.0.{m}.weight": torch.eye(4) + s for m, s in (("attn", 0.5), ("mlp", 0.0))}
    recipe = {"merge_method": "linear", "models": ["a", "b"], "base_model": "seed", "statistics": "grams"}
    report = mergeability(recipe, sources={**given, "grams": grams}, progress=False)
    _, text = read(mergeability_page(report, tmp_path / "report.html"))
    assert "Gram matrices" in text and "task vectors" in text and "effective rank" in text
    assert f"{report.worst_grams()[0].condition:.3g}" in text


def test_the_picture_has_a_panel_for_each_pair_and_distance(report, tmp_path):
    with Image.open(plot_mergeability(report, tmp_path / "report.png")) as image:
        assert image.width > image.height > 600
    modules = [*report.first.modules, "all"]
    assert modules == ["attn", "mlp", "extra", "all"]
    rows = cells(report, "ssd", report.pairs[0], report.layers, modules)
    assert [sum(v == v for v in row) for row in rows] == [3, 4, 3, 1], "no value where a layer lacks the module"
    assert rows[1][3] == report.distances["ssd"].layers["model.layers.1"][report.pairs[0]]


def test_many_pairs_are_cut_in_the_picture_and_said(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **_: titles.append(text))
    plot_mergeability(mergeability(models("abcde", layers=1), progress=False), tmp_path / "report.png")
    assert titles == ["Distances of the weights of a, b, c, d, e (4 further pairs are not drawn)"]
