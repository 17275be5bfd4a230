"""`hf-vlmerge statistics` on a text classifier: Fisher values, sampled tokens, and labels from a column."""

import json

import pytest
import torch

from hf_vlmerge.cli import main
from hf_vlmerge.merging import open_source

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder = tmp_path_factory.mktemp("models") / "classifier"
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=12, num_labels=2, **shape)
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> str:
    from datasets import Dataset

    path = tmp_path_factory.mktemp("data") / "reviews.parquet"
    Dataset.from_dict({"text": ["good film", "bad film", "film"], "stars": [1, 0, 1]}).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("labels", [["sampled"], ["expected"], ["data", "--label-column", "stars"]])
def test_fisher_values_of_every_weight_feed_a_merge(classifier, reviews, labels, tmp_path, capsys):
    file = tmp_path / "fisher.safetensors"
    command = ["statistics", classifier, str(file), "--data", reviews, "--kind", "fisher", "--labels", *labels]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["samples"] == 3 and set(report["tokens"].values()) == {3}
    source = open_source(file)
    assert json.loads(source.metadata["labels"]) == labels[0] and json.loads(source.metadata["source"]) == "classifier"
    assert source["fisher.classifier.weight"].any()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"merge_method: fisher\nmodels: [{classifier}]\nstatistics: {file}\n")
    assert main(["merge", str(recipe), str(tmp_path / "merged")]) == 0


def test_grams_of_some_tokens(classifier, reviews, tmp_path, capsys):
    file = tmp_path / "grams.safetensors"
    assert main(["statistics", classifier, str(file), "--data", reviews, "--sample-tokens", "2"]) == 0
    assert "Gram matrices from 3 samples" in capsys.readouterr().out
    assert json.loads(open_source(file).metadata["sample_tokens"]) == 2


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--kind", "hessian"], 2, "--kind is 'hessian'; expected gram or fisher"),
        (["--labels", "true"], 2, "--labels is 'true'; expected sampled or expected or data"),
        (["--sample-tokens", "1.5"], 2, "--sample-tokens is '1.5'; expected a share up to 1.0 or a whole number"),
        (["--sample-tokens", "half"], 2, "--sample-tokens is 'half'; expected a share"),
        (["--label-column", "grade"], 1, "has no column 'grade'; it has: text, stars"),
        (["--kind", "fisher", "--labels", "data"], 1, "labels 'data' needs a loss"),
    ],
)
def test_wrong_options_are_told_in_a_sentence(classifier, reviews, options, code, message, tmp_path, capsys):
    assert main(["statistics", classifier, str(tmp_path / "s.safetensors"), "--data", reviews, *options]) == code
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(tmp_path.iterdir())
