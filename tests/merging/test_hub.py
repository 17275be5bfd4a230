"""Sources on the Hub, against a server of our own on the loopback interface; each client is a process of its own."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save

from hf_vlmerge.merging import MergeError
from hf_vlmerge.merging.report import published
from hf_vlmerge.merging.tensors.hub import is_hub_id
from hf_vlmerge.merging.tensors.sources import FileRecord
from tests.hub_server import HubServer

OLD, NEW = "a" * 40, "b" * 40


def weights(value):
    return save({"layers.0.w": torch.full((3,), value)}, {"format": "pt"})


def repository(value):
    return {
        "model.safetensors": weights(value),
        "pytorch_model.bin": b"the same, pickled",
        "config.json": b'{"model_type": "toy"}',
        "README.md": b"# A model",
        "tokenizer.json": b"{}",
    }


@pytest.fixture
def hub():
    repos = {"org/left": {OLD: repository(1.0), NEW: repository(2.0)}, "org/right": {NEW: repository(4.0)}}
    heads = {"org/left": {"main": NEW, "v1": OLD}, "org/right": {"main": NEW}}
    with HubServer(repos, heads) as server:
        yield server


def run(hub, tmp_path, code, *arguments, **environment):
    """Run code in a fresh interpreter that knows this Hub only; returns what it printed as JSON."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, **hub.environment(tmp_path / "home"), **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


MERGE = """
    import json, sys
    from hf_vlmerge.merging import merge
    recipe = {"merge_method": "linear", "models": ["org/left@v1", "org/right"]}
    report = merge(recipe, sys.argv[1], progress=False)
    print(json.dumps({"sources": report.sources, "recipe": report.recipe.to_dict()}))
"""


def test_a_merge_from_the_hub_pins_its_revisions(hub, tmp_path):
    hub.failures["org/left"] = 1  # one call fails and is made again
    printed = run(hub, tmp_path, MERGE, tmp_path / "out")
    left, right = printed["sources"]
    assert (left["label"], left["revision"], right["revision"]) == ("org/left", OLD, NEW)
    expected = hashlib.sha256(weights(1.0)).hexdigest()
    assert left["files"] == [{"name": "model.safetensors", "size": len(weights(1.0)), "sha256": expected}]
    models = [{"alias": "left", "model": f"org/left@{OLD}"}, {"alias": "right", "model": f"org/right@{NEW}"}]
    assert printed["recipe"]["models"] == models
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.json", "recipe.yaml",
    }  # fmt: skip
    assert not any("pytorch_model.bin" in request or "README" in request for request in hub.requests)
    # the written recipe finds the same commits again, in the cache, without a network
    again = run(hub, tmp_path, MERGE_AGAIN, tmp_path / "out" / "recipe.yaml", HF_HUB_OFFLINE="1")
    assert again == [2.5, 2.5, 2.5]


MERGE_AGAIN = """
    import json, sys
    from hf_vlmerge.merging import MergeError, merge_tensors, open_source
    try:
        open_source("org/other")
    except MergeError as error:
        assert str(error) == "'org/other' is no folder here and not in the local cache, and the Hub cannot be reached"
    print(json.dumps(merge_tensors(sys.argv[1])["layers.0.w"].tolist()))
"""

OPEN = """
    import json, sys
    from hf_vlmerge.merging import MergeError, open_source
    from hf_vlmerge.merging.tensors import hub
    hub.PAUSE = 0.01
    messages = []
    for ref in sys.argv[1:]:
        try:
            open_source(ref)
        except MergeError as error:
            messages.append(str(error))
    print(json.dumps(messages))
"""


def test_what_the_hub_does_not_give(hub, tmp_path):
    hub.failures["org/right"] = 50
    missing, revision, failing = run(hub, tmp_path, OPEN, "org/nothing", "org/left@v9", "org/right")
    assert missing == "'org/nothing' is neither a folder here nor a model on the Hub (or it is private: log in)"
    assert revision == "org/left has no revision 'v9'"
    assert (
        failing.startswith("'org/right' is no folder here and could not be fetched from the Hub: ") and "503" in failing
    )
    assert hub.failures["org/right"] <= 47  # it was tried three times


def test_a_hub_that_is_away(hub, tmp_path):
    (away,) = run(hub, tmp_path, OPEN, "org/left", HF_ENDPOINT="http://127.0.0.1:9")
    assert away.startswith("'org/left' is no folder here and could not be fetched from the Hub") and "\n" not in away


def test_a_download_that_is_not_what_the_hub_has(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights(1.0))
    record = FileRecord(path.name, path.stat().st_size, hashlib.sha256(weights(2.0)).hexdigest(), path=path)
    assert published(record)["sha256"] == record.sha256  # as the Hub reports it
    with pytest.raises(MergeError, match=r"model\.safetensors is not the file that the Hub has"):
        published(record, hashed=True)
    assert published(record._replace(sha256=None), hashed=True)["sha256"] == hashlib.sha256(weights(1.0)).hexdigest()


def test_which_references_are_hub_ids():
    assert all(map(is_hub_id, ("gpt2", "org/model-1.5", "org/model@main", "org/model@refs/pr/1")))
    assert not any(map(is_hub_id, ("./x", "/x/y", "a/b/c", "x.safetensors", "org/", "a b", "x.yaml", "base+lora")))
