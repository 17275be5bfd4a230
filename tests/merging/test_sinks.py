"""Sinks: atomic folders, sizes of shards, and a disk that is full."""

import errno
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open

from hf_vlmerge.merging import MergeError, atomic_folder, open_source, save_checkpoint
from hf_vlmerge.merging.tensors import sinks
from hf_vlmerge.merging.tensors.sinks import copy_bytes, parse_size

TENSORS = {"w": torch.randn(4, 4), "half": torch.randn(3).to(torch.bfloat16), "flag": torch.tensor([True])}


def test_a_checkpoint_with_config_side_files_and_a_last_word(tmp_path):
    (tmp_path / "vocab.txt").write_text("a")
    save_checkpoint(
        tmp_path / "out",
        iter(TENSORS.items()),
        config={"model_type": "toy"},
        side_files={"extra/vocab.txt": tmp_path / "vocab.txt"},
        finish=lambda folder: (folder / "README.md").write_text("hello"),
    )
    found = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert found == ["README.md", "config.json", "extra/vocab.txt", "model.safetensors"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} and all(file.get_tensor(k).equal(v) for k, v in TENSORS.items())
    assert sorted(os.listdir(tmp_path)) == ["out", "vocab.txt"]


def test_views_and_non_contiguous_tensors_are_written_as_they_read(tmp_path):
    w = torch.randn(4, 6)
    save_checkpoint(tmp_path / "out", {"t": w.T, "part": w[:, 2:4], "whole": w})
    written = open_source(tmp_path / "out")
    assert written["t"].equal(w.T) and written["part"].equal(w[:, 2:4])


def test_a_name_that_occurs_twice(tmp_path):
    with pytest.raises(MergeError, match="occurs twice: w"):
        save_checkpoint(tmp_path / "out", [("w", torch.ones(1)), ("w", torch.ones(1))])
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(MergeError, match="the output 'out' exists"):
        save_checkpoint(tmp_path / "out", TENSORS)
    with pytest.raises(MergeError, match="the output 'file' is a file"):
        save_checkpoint(tmp_path / "file", TENSORS, overwrite=True)
    save_checkpoint(tmp_path / "out", TENSORS, overwrite=True)
    assert len(open_source(tmp_path / "out")) == 3


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(MergeError, match="exists"), atomic_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
        (tmp_path / "out").mkdir()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == []


@pytest.mark.skipif(sys.platform != "linux", reason="two names are exchanged on Linux only")
def test_an_output_is_replaced_in_one_step(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
    monkeypatch.setattr(sinks.os, "rename", lambda *_: pytest.fail("two steps"))
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").touch()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["new"]


def test_an_output_is_replaced_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks, "exchange", lambda a, b: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").touch()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["new"]


def test_an_output_that_is_a_link_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(MergeError, match="exists"):
        save_checkpoint(tmp_path / "link", TENSORS)
    save_checkpoint(tmp_path / "link", TENSORS, overwrite=True)
    assert (tmp_path / "link").is_symlink() and len(open_source(tmp_path / "real")) == 3
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_an_output_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file/out", "file/deeper/out"):
        with pytest.raises(MergeError, match="the output 'out' cannot be made: a folder above it is a file"):
            save_checkpoint(tmp_path / name, TENSORS)


def test_a_failing_rename_brings_the_old_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks, "exchange", lambda a, b: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
    rename = os.rename

    def broken(source, target):
        if ".partial-" in str(source):
            raise PermissionError(13, "not now")
        rename(source, target)

    monkeypatch.setattr(sinks.os, "rename", broken)
    with pytest.raises(PermissionError), atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").touch()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["config.json"]


def test_flushing_can_be_left_out(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(sinks.os, "fsync", lambda descriptor: calls.append(descriptor))
    save_checkpoint(tmp_path / "a", TENSORS, fsync=False)
    assert not calls
    save_checkpoint(tmp_path / "b", TENSORS)
    assert calls


FULL_DISK = """
    import resource, sys, torch
    from hf_vlmerge.merging import merge, MergeError
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as if the disk ended there
    models = {name: {"w": torch.full((100_000,), value)} for name, value in (("a", 1.0), ("b", 2.0))}
    try:
        recipe = {"merge_method": "linear", "models": ["a", "b"]}
        merge(recipe, sys.argv[1], sources=models, overwrite=True, progress=False)
    except MergeError as error:
        print(error)
"""


def test_no_space_left_while_writing(tmp_path):
    save_checkpoint(tmp_path / "out", TENSORS)
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("no space left while writing 'out'") and done.stdout.count("\n") == 1
    assert os.listdir(tmp_path) == ["out"] and len(open_source(tmp_path / "out")) == 3


def test_no_space_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(MergeError, match=r"no space left while writing 'out' \(71 bytes needed, 10 free\)"):
        save_checkpoint(tmp_path / "out", TENSORS)
    assert os.listdir(tmp_path) == []


def test_sizes():
    assert [parse_size(s) for s in ("5GB", "200 MB", "1GiB", "1.5k", 7, "12")] == [
        5 * 10**9,
        2 * 10**8,
        2**30,
        1500,
        7,
        12,
    ]
    for wrong in ("five", "5XB", 0, -1, "0GB", None):
        with pytest.raises(MergeError, match="a size reads like 5GB"):
            parse_size(wrong)


def test_a_tensor_above_the_limit_gets_a_shard_of_its_own(tmp_path):
    tensors = {"small": torch.ones(2), "large": torch.ones(100), "last": torch.ones(2)}
    save_checkpoint(tmp_path / "out", tensors, max_shard_size=20)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3 and index["metadata"]["total_size"] == 416
    assert all(open_source(tmp_path / "out")[k].equal(v) for k, v in tensors.items())


def test_bytes_are_copied_by_the_kernel_or_through_memory(tmp_path, monkeypatch):
    data = os.urandom(100_000)
    (tmp_path / "source").write_bytes(b"head" + data)

    def copied(name):
        source = os.open(tmp_path / "source", os.O_RDONLY)
        target = os.open(tmp_path / name, os.O_RDWR | os.O_CREAT)
        copy_bytes(source, 4, target, 3, len(data))
        os.close(source)
        os.close(target)
        return (tmp_path / name).read_bytes()[3:]

    def across_devices(*_):
        raise OSError(errno.EXDEV, "another device")

    assert copied("kernel") == data
    monkeypatch.setattr(os, "copy_file_range", across_devices)
    assert copied("memory") == data
    monkeypatch.delattr(os, "copy_file_range")
    assert copied("without") == data


def test_an_input_that_ends_too_early(tmp_path):
    (tmp_path / "source").write_bytes(b"short")
    error = pytest.raises(MergeError, match="became shorter while it was copied")
    with open(tmp_path / "source", "rb") as source, open(tmp_path / "target", "wb") as target, error:
        copy_bytes(source.fileno(), 0, target.fileno(), 0, 100)
