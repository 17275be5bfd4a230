"""Cards: what the Hub reads, what people read, and nothing of the author's machine."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from hf_vlmerge import UnivalForConditionalGeneration, VlmoForPreTraining
from hf_vlmerge.hub.card import render, table, write_merge_card, write_model_card
from hf_vlmerge.hub.facts import loading
from hf_vlmerge.hub.merges import hub_names
from hf_vlmerge.hub.publish import with_name
from hf_vlmerge.merging import merge
from tests.models.unival import tiny as unival
from tests.models.vlmo import tiny as vlmo

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = [
    "Model details", "Uses", "Bias, risks and limits", "How to get started", "Training data and procedure",
    "Evaluation", "Environmental impact", "Files", "Citation",
]  # fmt: skip


@pytest.fixture
def merged(tmp_path):
    models = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        save_file({"layer.weight": torch.ones(2, 2) * len(models)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
        models.append({"model": str(tmp_path / name)})
    recipe = {"merge_method": "linear", "models": models}
    return merge(recipe, tmp_path / "out", finish=write_merge_card, progress=False), tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a tiny UnIVAL."""
    folder = tmp_path_factory.mktemp("models") / "unival-tiny"
    unival.tiny_model(UnivalForConditionalGeneration, towers=["image"]).save_pretrained(folder)
    return folder


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def sections(card: str) -> list[str]:
    return re.findall(r"^## (.*)$", card, flags=re.MULTILINE)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
    assert str(folder) not in card + (folder / "out/provenance.json").read_text()
    assert front_matter(card)["tags"] == ["merge", "hf_vlmerge", "linear"]
    assert front_matter(card)["library_name"] == "transformers"
    assert not {"base_model", "base_model_relation"} & front_matter(card).keys()  # nothing to link to
    assert sections(card) == SECTIONS and "\n\n\n" not in card


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
    assert "Nothing was recorded with this model." in render(report) and "\n\n\n" not in card


def test_scores_of_the_model_are_for_the_hub_to_read(merged, trained):
    report, _ = merged
    scores = {"org/clips": {"CIDEr-D": 0.5}, "NLVR, questions": {"accuracy": 62.25, "top 5": 90.0}}
    card = render(report, scores=scores)
    assert "| org/clips | 0.5 |  |  |" in card and "| NLVR, questions |  | 62.25 | 90 |" in card
    read = ModelCard(card).data
    assert read.model_name == "out" and [result.metric_value for result in read.eval_results] == [0.5, 62.25, 90.0]
    first, second, third = read.eval_results
    assert (first.dataset_type, first.dataset_name, first.metric_type) == ("org/clips", "org/clips", "cider_d")
    assert (second.dataset_type, third.metric_type, third.metric_name) == ("NLVR-questions", "top_5", "top 5")
    assert first.task_type == "other"
    write_model_card(trained, results={"captions": {"mean": 3.0}}, scores=scores)
    card = (trained / "README.md").read_text()
    assert "| captions | 3 |" in card and "| NLVR, questions |" not in card
    assert {result.task_type for result in ModelCard(card).data.eval_results} == {front_matter(card)["pipeline_tag"]}


@pytest.mark.parametrize("kind", [np.float32, np.int64, torch.tensor])
def test_scores_may_be_scalars_of_numpy_and_torch(kind, merged):
    card = render(merged[0], scores={"shapes": {"accuracy": kind(3)}})
    (result,) = ModelCard(card).data.eval_results
    assert result.metric_value == 3 and type(result.metric_value) in (int, float)
    assert "| shapes | 3 |" in card and "python/object" not in card


@pytest.mark.parametrize("value", [True, "0.5", None, np.ones(2), torch.ones(2, 2)])
def test_a_score_that_is_no_number_is_named(value, merged):
    with pytest.raises(ValueError, match="expected a number as 'accuracy' of 'shapes'; got ") as caught:
        render(merged[0], scores={"shapes": {"accuracy": value}})
    assert "\n" not in str(caught.value)


def test_data_sets_that_the_hub_would_take_for_one_are_refused(merged):
    scores = {"VQA v2": {"accuracy": 1.0}, "VQA-v2": {"accuracy": 0.5}}
    with pytest.raises(ValueError, match="tell apart; 'VQA v2' and 'VQA-v2' are both 'VQA-v2' there"):
        render(merged[0], scores=scores)


def test_only_commits_make_base_models_of_the_parts_of_a_label():
    commit = "0123456789" * 4
    source = {"label": f"org/base@{commit}+vqa@10k", "revision": None}
    assert hub_names(source) == ["org/base"]
    assert hub_names({"label": "vqa@10k", "revision": None}) == []
    assert hub_names({"label": "org/base", "revision": commit}) == ["org/base"]


def test_a_merge_with_passes_is_not_said_to_read_once(merged):
    assert "The merge read its inputs and wrote the result" in render(merged[0])


@pytest.mark.parametrize(
    ("auto_map", "auto"),
    [
        ({"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Writer"}, "AutoModelForCausalLM"),
        ({"AutoTokenizer": ["code.Words", None], "AutoModel": "org/code--code.Writer"}, "AutoModel"),
    ],
)
def test_code_that_travels_along_is_loaded_by_its_auto_class(auto_map, auto):
    lines = loading({"architectures": ["Writer"], "auto_map": auto_map}, "org/x").splitlines()
    assert lines[0] == f"from transformers import {auto}"
    assert lines[-1] == f'model = {auto}.from_pretrained("org/x", trust_remote_code=True)'


def test_weights_without_a_configuration_load_as_tensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        Path(name).mkdir()
        save_file({"a": torch.ones(2), "b": torch.ones(3)}, Path(name, "model.safetensors"))
    merge({"merge_method": "linear", "models": ["first", "second"]}, "out", finish=write_merge_card, progress=False)
    card = Path("out/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    exec(code, scope := {})
    assert scope["tensors"].keys() == {"a", "b"} and "AutoModel.from_pretrained" not in card
    assert 'name = "org/x"' in with_name(card, "out", "org/x")


def test_hashes_of_inputs_and_outputs_where_they_are_asked_for(merged):
    _, folder = merged
    assert "not recorded" in (folder / "out/README.md").read_text()  # local inputs, whose hash nobody knows yet
    hashed = merge(
        {"merge_method": "linear", "models": [str(folder / "first"), str(folder / "second")]},
        folder / "hashed",
        finish=lambda out, report: write_merge_card(out, report, hashes=True),
        hash_inputs=True,
        progress=False,
    )
    card = (folder / "hashed/README.md").read_text()
    for name in ("first", "second", "hashed"):
        assert f"`{sha256(folder / name / 'model.safetensors')}`" in card
    inputs = json.loads((folder / "hashed/provenance.json").read_text())["inputs"]
    assert [each["files"] for each in inputs] == [each["files"] for each in hashed.sources]
    assert inputs[0]["files"][0]["sha256"] == sha256(folder / "first/model.safetensors")


@pytest.mark.parametrize("family", ["vlmo", "unival"])
def test_a_merge_of_our_models_loads_with_our_classes(family, tmp_path):
    tiny, kind = (vlmo, VlmoForPreTraining) if family == "vlmo" else (unival, UnivalForConditionalGeneration)
    for seed in (0, 1):
        tiny.tiny_model(kind, seed=seed).save_pretrained(tmp_path / f"model{seed}")
    recipe = {"merge_method": "linear", "models": [str(tmp_path / "model0"), str(tmp_path / "model1")]}
    merge(recipe, tmp_path / "out", finish=write_merge_card, progress=False)
    card = (tmp_path / "out/README.md").read_text()
    assert (
        f"from hf_vlmerge import {kind.__name__}\n" in card and f"from transformers import {kind.__name__}" not in card
    )
    assert front_matter(card).get("pipeline_tag") == ("image-text-to-text" if family == "unival" else None)
    assert ("2307.16184" if family == "unival" else "2111.02358") in card


def test_the_card_of_a_trained_model(trained):
    write_model_card(
        trained,
        results={"captions": {"CIDEr-D": 0.123456}},
        data=["NLVR", "org/clips"],
        settings={"steps": 1000, "learning rate": 1e-3},
        license="apache-2.0",
        datasets=["org/clips"],
        parents={"org/start": "v1"},
    )
    card = (trained / "README.md").read_text()
    assert front_matter(card) == {
        "base_model": ["org/start"],
        "datasets": ["org/clips"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "image-text-to-text",
        "tags": ["hf_vlmerge"],
    }
    assert sections(card) == SECTIONS and "\n\n\n" not in card
    for text in (
        "# unival-tiny",
        "| Inputs | text, image |",
        "ResNet, blocks [2, 1, 2, 1]",
        'AutoModelForImageTextToText.from_pretrained("unival-tiny", trust_remote_code=True)',
        "Data: NLVR, org/clips.",
        "| steps | 1000 |",
        "| captions | 0.1235 |",
        "Training began from [org/start](https://huggingface.co/org/start/tree/v1).",
        sha256(trained / "model.safetensors"),
        "https://arxiv.org/abs/2307.16184",
    ):
        assert text in card, text
    (count,) = re.findall(r"\| Parameters and buffers \| ([\d,]+) \(", card)
    model = UnivalForConditionalGeneration(unival.tiny_config(towers=["image"]))
    stored = {name: t for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys}
    assert int(count.replace(",", "")) == sum(t.numel() for t in stored.values())


def test_the_example_of_a_card_runs(trained):
    write_model_card(trained)
    (code,) = re.findall(r"```python\n(.*?)```", (trained / "README.md").read_text(), flags=re.DOTALL)
    ours = code.partition("# or without")[0].replace('"unival-tiny"', repr(str(trained)))
    exec(ours, scope := {})
    assert type(scope["model"]).__name__ == "UnivalForConditionalGeneration"


def test_a_card_says_what_was_not_recorded(trained):
    write_model_card(trained)
    card = (trained / "README.md").read_text()
    assert "The data were not recorded with this model." in card and "Nothing was recorded with this model." in card


def test_a_card_needs_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        write_model_card(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="holds no weights"):
        write_model_card(tmp_path)


def test_a_table_leaves_absent_cells_empty():
    assert table({"a": {"x": 1}, "b": {"y": 2.0}}).splitlines() == [
        "| | x | y |",
        "|---|---|---|",
        "| a | 1 |  |",
        "| b |  | 2 |",
    ]


def test_the_sample_card_has_the_sections_of_a_written_one():
    assert sections((ROOT / "MODEL_CARD.md").read_text()) == SECTIONS
