"""A merge that is killed leaves the old output, and goes on where it was; what it ends with is the same to the byte."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_vlmerge.merging import MergeError, merge
from hf_vlmerge.merging.manifest import LISTS, LOCK, locked

TENSORS = 9
KILLED = """
import os, signal, sys
from hf_vlmerge.merging import merge
from hf_vlmerge.merging.manifest import Manifest

recipe, output, after = sys.argv[1], sys.argv[2], int(sys.argv[3])
add = Manifest.add

def add_and_die(manifest, name, how):
    add(manifest, name, how)
    if len(manifest.done) == after:
        os.kill(os.getpid(), signal.SIGKILL)

Manifest.add = add_and_die
merge(recipe, output, overwrite=True, threads=1, progress=False)
"""


@pytest.fixture
def recipe(tmp_path):
    """Two models of nine tensors, and a method that asks for sums over the whole model."""
    for seed, name in enumerate(("a", "b", "base")):
        (tmp_path / name).mkdir()
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.w": torch.randn(40 + i, 50, generator=generator) for i in range(TENSORS)}
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text("{}")
    path = tmp_path / "recipe.yaml"
    models = [str(tmp_path / "a"), str(tmp_path / "b")]
    content = {"merge_method": "ties", "models": models, "base_model": str(tmp_path / "base")}
    path.write_text(json.dumps(content))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def killed_after(count: int, recipe: Path, output: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", KILLED, str(recipe), str(output), str(count)], timeout=120)
    assert ran.returncode == -signal.SIGKILL


def test_a_name_with_brackets_leaves_other_unfinished_merges_alone(recipe, tmp_path):
    killed_after(2, recipe, tmp_path / "m1")
    merge(recipe, tmp_path / "m[1]", progress=False)
    assert len(left_over(tmp_path / "m1")) == 1


def left_over(output: Path) -> list[Path]:
    return list(output.parent.glob(f".{output.name}.partial-*"))


@pytest.mark.parametrize("count", [1, 2, 4, 8, 9])
def test_a_killed_merge_goes_on_after_what_it_had_finished(recipe, tmp_path, count):
    merge(recipe, tmp_path / "whole", progress=False)
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("old")
    killed_after(count, recipe, output)
    assert files(output) == {"config.json": b"old"} and len(left_over(output)) == 1
    report = merge(recipe, output, overwrite=True, progress=False)
    assert report.resumed == count and report.counts["merged"] == TENSORS
    assert files(output) == files(tmp_path / "whole") and not left_over(output)


def test_a_merge_killed_twice_and_a_line_cut_short(recipe, tmp_path):
    merge(recipe, tmp_path / "whole", progress=False)
    output = tmp_path / "out"
    killed_after(2, recipe, output)
    killed_after(5, recipe, output)
    assert not output.exists()
    [folder] = left_over(output)
    with open(folder / f"{LISTS}0", "a") as file:
        file.write('["layers.8.')
    assert merge(recipe, output, progress=False).resumed == 5
    assert files(output) == files(tmp_path / "whole")


def test_changed_inputs_settings_or_a_restarted_machine_begin_anew(recipe, tmp_path):
    output = tmp_path / "out"
    killed_after(3, recipe, output)
    [folder] = left_over(output)
    (folder / LOCK).write_text("another run of the machine")
    assert merge(recipe, output, progress=False).resumed == 0
    killed_after(3, recipe, output)
    os.utime(tmp_path / "a" / "model.safetensors", (1, 1))
    assert merge(recipe, output, overwrite=True, progress=False).resumed == 0 and not left_over(output)
    killed_after(3, recipe, output)
    assert merge(recipe, output, overwrite=True, max_shard_size="9KB", progress=False).resumed == 0


def test_two_merges_cannot_write_one_output_at_once(recipe, tmp_path):
    output = tmp_path / "out"
    killed_after(3, recipe, output)
    [folder] = left_over(output)
    with locked(folder), pytest.raises(MergeError, match="another merge is writing 'out'"):
        merge(recipe, output, progress=False)
    assert folder.exists() and merge(recipe, output, progress=False).resumed == 3


def test_what_is_stopped_by_hand_is_kept_and_what_fails_is_not(recipe, tmp_path):
    def stop(folder, report):
        raise KeyboardInterrupt

    def fail(folder, report):
        raise ArithmeticError

    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, output, finish=stop, progress=False)
    assert len(left_over(output)) == 1
    with pytest.raises(ArithmeticError):
        merge(recipe, output, finish=fail, progress=False)
    assert not left_over(output) and not output.exists()


def test_tensors_in_memory_are_not_recognised_again(tmp_path):
    given = {name: {"w": torch.randn(4)} for name in "ab"}

    def stop(folder, report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge({"merge_method": "linear", "models": ["a", "b"]}, tmp_path / "out", sources=given, finish=stop)
    assert not os.listdir(tmp_path)
