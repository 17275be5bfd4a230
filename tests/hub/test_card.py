"""The card of a merge: what the Hub reads, what people read, and nothing of the author's machine."""

from pathlib import Path

import pytest
import torch
import yaml

from hf_vlmerge.hub.card import render, table, write_merge_card
from hf_vlmerge.merging import merge

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def merged(tmp_path):
    from safetensors.torch import save_file

    models = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        save_file({"layer.weight": torch.ones(2, 2) * len(models)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
        models.append({"model": str(tmp_path / name)})
    recipe = {"merge_method": "linear", "models": models}
    return merge(recipe, tmp_path / "out", finish=write_merge_card, progress=False), tmp_path


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_merge_writes_its_card_without_a_local_path(merged):
    _, folder = merged
    card = (folder / "out/README.md").read_text()
    for text in (
        "# out",
        "`first`",
        "`second`",
        "merge_method: linear",
        "from transformers import BertModel",
        "2203.05482",
    ):
        assert text in card, text
    assert str(folder) not in card
    assert front_matter(card)["tags"] == ["merge", "hf_vlmerge", "linear"]
    assert front_matter(card)["library_name"] == "transformers"
    assert not {"base_model", "base_model_relation"} & front_matter(card).keys()  # nothing to link to


def test_inputs_on_the_hub_are_linked_as_base_models(merged):
    report, _ = merged
    for source, name in zip(report.sources, ("org/a", "org/b"), strict=True):
        source.update(label=name, revision="0123abc")
    card = render(report, license="apache-2.0")
    assert front_matter(card)["base_model"] == ["org/a", "org/b"]
    assert front_matter(card)["base_model_relation"] == "merge"
    assert front_matter(card)["license"] == "apache-2.0"
    assert "https://huggingface.co/org/a/tree/0123abc" in card


def test_results_and_distances_are_tables(merged):
    report, _ = merged
    card = render(report, results={"merged": {"TR@1": 0.51234, "steps": 7}}, distances={"first-second": 0.25})
    assert "| | TR@1 | steps |" in card
    assert "| merged | 0.5123 | 7 |" in card
    assert "| first-second | 0.25 |" in card
    assert "## Results" not in render(report)


def test_a_table_leaves_absent_cells_empty():
    assert table({"a": {"x": 1}, "b": {"y": 2.0}}).splitlines() == [
        "| | x | y |",
        "|---|---|---|",
        "| a | 1 |  |",
        "| b |  | 2 |",
    ]


def test_the_sample_card_has_the_sections_of_a_written_one(merged):
    report, _ = merged
    written = render(report, results={"a": {"x": 1}}, distances={"a-b": 1.0})
    sections = [line for line in written.splitlines() if line.startswith("## ")]
    sample = (ROOT / "MODEL_CARD.md").read_text()
    assert [line for line in sample.splitlines() if line.startswith("## ")] == sections
