"""What is made does not depend on how: chunk size, threads, shard size and processes change no byte, for any method."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_vlmerge.merging import list_merge_methods, merge, open_source
from hf_vlmerge.merging.program import BLOCK
from tests.merging.every_method import recipe_for, write_inputs

ROOT = Path(__file__).resolve().parents[2]
TWO_PROCESSES = ROOT / "training_scripts" / "accelerate_configs" / "cpu_2proc.yaml"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def references(inputs, tmp_path_factory):
    """Each method's weights, made whole tensor by whole tensor on one thread: the folder of outputs."""
    outputs = tmp_path_factory.mktemp("references")
    for name in list_merge_methods():
        merge(recipe_for(name, inputs), outputs / name, threads=1, chunk_size=1 << 24, fsync=False, progress=False)
    return outputs


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", list_merge_methods())
def test_chunks_threads_copies_and_shards_change_no_byte(method, inputs, references, tmp_path):
    recipe = recipe_for(method, inputs)
    merge(recipe, tmp_path / "small", threads=2, chunk_size=1, fsync=False, progress=False)
    assert weights(tmp_path / "small") == weights(references / method)
    merge(recipe, tmp_path / "copies", threads=3, processes=True, chunk_size=BLOCK, fsync=False, progress=False)
    assert weights(tmp_path / "copies") == weights(references / method)
    merge(recipe, tmp_path / "sharded", threads=2, max_shard_size="150KB", fsync=False, progress=False)
    with open_source(references / method) as expected, open_source(tmp_path / "sharded") as found:
        assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2 and set(found) == set(expected)
        assert all(found[key].dtype == expected[key].dtype and found[key].equal(expected[key]) for key in expected)


@pytest.mark.multiproc
def test_two_processes_write_the_same_bytes(inputs, references, tmp_path):
    """Started as users do, by ``accelerate launch`` with the configuration beside the training scripts."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(TWO_PROCESSES)]
    command = [*launch, "--main_process_port", "0", "-m", "tests.merging.every_method", str(inputs), str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("ranks-*")} == {"ranks-0-of-2", "ranks-1-of-2"}
    wrong = [name for name in list_merge_methods() if weights(tmp_path / name) != weights(references / name)]
    assert not wrong and not list(tmp_path.glob(".*"))


def test_a_large_tensor_is_cut_among_the_threads(tmp_path):
    """Its sums are taken by several workers, and still in flat order."""
    sizes = {"large": (8 * BLOCK + 5,), "small": (3,)}
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        generator = torch.Generator().manual_seed(seed)
        tensors = {key: torch.randn(shape, generator=generator) for key, shape in sizes.items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    recipe = {"merge_method": "slerp", "models": [str(tmp_path / "a"), str(tmp_path / "b")]}
    for threads in (1, 2, 4):
        merge(recipe, tmp_path / f"out{threads}", threads=threads, chunk_size=BLOCK, fsync=False, progress=False)
    assert weights(tmp_path / "out1") == weights(tmp_path / "out2") == weights(tmp_path / "out4")
