"""Arguments of training hold nothing that must not get on the Hub."""

import os
import pickle

from hf_vlmerge.training.arguments import VlmergeTrainingArguments


def test_a_token_goes_to_the_environment_and_into_no_pickle(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    arguments = VlmergeTrainingArguments(str(tmp_path), use_cpu=True, hub_token="hf_secret")
    assert os.environ["HF_TOKEN"] == "hf_secret" and arguments.hub_token is None
    assert b"hf_secret" not in pickle.dumps(arguments)
    assert arguments.hub_strategy == "end"
