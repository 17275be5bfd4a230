"""`hf-vlmerge merge`: limits, the plan, and going on after an interruption, from the command line."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from hf_vlmerge.cli.app import run
from hf_vlmerge.merging import merge


@pytest.fixture
def recipe(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        save_file({"w": torch.randn(300, 300), "v": torch.randn(9)}, tmp_path / name / "model.safetensors")
    path = tmp_path / "recipe.yaml"
    models = [str(tmp_path / name) for name in "ab"]
    path.write_text(json.dumps({"merge_method": "linear", "models": models, "rules": [{"match": "v", "keep": "b"}]}))
    return path


def test_a_dry_run_prints_costs_and_rules(recipe, capsys):
    assert run(["merge", str(recipe), "--dry-run", "--threads", "2", "--max-memory", "1GB"]) == 0
    said = capsys.readouterr().out
    assert "rule 1 (v): 1 tensors, such as v" in said
    assert "2 tensors: reads 720 kB, writes 360 kB" in said and "on 2 threads" in said


def test_too_little_memory_is_one_sentence(recipe, tmp_path, capsys):
    assert run(["merge", str(recipe), str(tmp_path / "out"), "--max-memory", "1kB"]) == 1
    said = capsys.readouterr()
    assert "w needs about" in said.err and "more than the limit of 1 kB" in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_shards_of_a_wanted_size(recipe, tmp_path):
    assert run(["merge", str(recipe), str(tmp_path / "out"), "--max-shard-size", "1KB", "--no-fsync"]) == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 2


def test_hashes_of_all_files_go_into_the_card(recipe, tmp_path):
    assert run(["merge", str(recipe), str(tmp_path / "out"), "--hash", "--no-fsync"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for name in ("a", "b", "out"):
        assert hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest() in card


def test_the_command_tells_what_an_earlier_run_finished(recipe, tmp_path, capsys):
    def stop(folder, report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe, tmp_path / "out", finish=stop, progress=False)
    assert run(["merge", str(recipe), str(tmp_path / "out"), "--no-fsync"]) == 0
    assert "2 tensors were finished by an earlier run" in capsys.readouterr().out
