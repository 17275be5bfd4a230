"""Sources: formats, dtypes, nesting, and damaged or hostile files."""

import argparse
import collections
import io
import json
import mmap
import os
import pathlib
import pickle
import struct
import tarfile
import zipfile
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_vlmerge.merging import MergeError, merge, open_source, save_checkpoint
from hf_vlmerge.merging.tensors.dtypes import SAFETENSORS
from hf_vlmerge.merging.tensors.pickles import RestrictedUnpickler, StandIn
from hf_vlmerge.merging.tensors.safetensors_file import SafetensorsFile

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(2.5), "ids": torch.arange(5)}


def same(source, tensors):
    return source.keys() == tensors.keys() and all(source[k].equal(v) for k, v in tensors.items())


def test_every_dtype_survives_a_round_trip_with_the_reference_reader(tmp_path):
    tensors = {}
    for name, dtype in SAFETENSORS.items():
        if name in ("F4", "F8_E8M0"):  # the installed reference package cannot write these
            continue
        tensors[name] = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    save_file(tensors, tmp_path / "reference.safetensors")
    with open_source(tmp_path / "reference.safetensors") as source:
        assert source.keys() == tensors.keys()
        for key, value in tensors.items():
            assert source.dtype(key) == value.dtype and source.shape(key) == (2, 3)
            assert source[key].view(torch.uint8).equal(value.view(torch.uint8))
        save_checkpoint(tmp_path / "ours", source)
    again = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(again[k].view(torch.uint8).equal(v.view(torch.uint8)) for k, v in tensors.items())


@pytest.mark.parametrize("name", [n for n in ("F4", "F8_E8M0") if n in SAFETENSORS])
def test_dtypes_that_only_newer_readers_know(tmp_path, name):
    values = torch.arange(8, dtype=torch.uint8).view(SAFETENSORS[name]).reshape(2, 4)
    save_checkpoint(tmp_path / "out", {"w": values})
    header = json.loads((tmp_path / "out" / "model.safetensors").read_bytes()[8:].partition(b"}}")[0] + b"}}")
    assert header["w"]["shape"] == ([2, 8] if name == "F4" else [2, 4])
    source = open_source(tmp_path / "out")
    assert source.shape("w") == (2, 4) and source["w"].view(torch.uint8).equal(values.view(torch.uint8))


def test_a_dtype_that_torch_lacks_is_named(tmp_path):
    header = json.dumps({"w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"abc")
    with pytest.raises(MergeError, match="w has dtype F6_E2M3"):
        open_source(tmp_path / "x.safetensors")


def test_a_source_is_a_mapping_that_reads_runs(tmp_path):
    save_checkpoint(tmp_path / "out", TENSORS, config={"model_type": "toy"})
    with open_source(tmp_path / "out") as source:
        assert same(source, TENSORS) and len(source) == 3 and "b" in source and source.get("c") is None
        assert source.read("a.weight", 3, 6).tolist() == [3.0, 4.0, 5.0]
        assert source.shape("b") == () and source.dtype("ids") == torch.int64
        assert source.config == {"model_type": "toy"} and source.label == "out" and source.revision is None
        source["b"].add_(1)  # a tensor of its own
        assert source["b"] == 2.5
        with pytest.raises(MergeError, match=r"out has no tensor a.wieght \(closest: a.weight"):
            source.shape("a.wieght")


def test_shards_with_an_index(tmp_path):
    save_checkpoint(tmp_path / "out", TENSORS, max_shard_size=48)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 2
    assert same(open_source(tmp_path / "out"), TENSORS)


def test_a_single_file_of_another_name_is_found_and_two_are_ambiguous(tmp_path):
    save_file(TENSORS, tmp_path / "grams.safetensors")
    assert same(open_source(tmp_path), TENSORS)
    save_file(TENSORS, tmp_path / "more.safetensors")
    with pytest.raises(MergeError, match=r"2 safetensors files and no model\.safetensors\.index\.json"):
        open_source(tmp_path)


def test_tensors_in_memory():
    source = open_source(TENSORS)
    assert same(source, TENSORS) and source.label == "memory" and open_source(source) is source
    with pytest.raises(MergeError, match="'step' is something else"):
        open_source({"w": torch.ones(1), "step": 3})


def test_an_empty_tensor_where_the_last_page_ends(tmp_path):
    header = {"w": ("F32", [512], [0, 2048]), "z": ("F32", [0], [2048, 2048])}
    fields = ("dtype", "shape", "data_offsets")
    text = json.dumps({key: dict(zip(fields, entry, strict=True)) for key, entry in header.items()}).encode()
    room = mmap.PAGESIZE - 8 - 2048
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", room) + text.ljust(room) + bytes(2048))
    source = open_source(path)
    assert source["z"].shape == (0,) and not source["w"].any()


@pytest.mark.parametrize("cut", [4, 30, -1, -9])
def test_a_truncated_file(tmp_path, cut):
    save_file(TENSORS, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:cut])
    with pytest.raises(MergeError, match=r"model\.safetensors is truncated"):
        open_source(tmp_path)


def test_bytes_after_the_end_and_a_damaged_header(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data + b"more")
    with pytest.raises(MergeError, match="longer than its header says"):
        open_source(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data[:8] + b"[" + data[9:])
    with pytest.raises(MergeError, match="the safetensors header is damaged"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}, "w does not lie where its shape"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "w does not lie where its shape"),
        ({"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}, "sizes must be whole numbers"),
        ({"dtype": "F32", "shape": [2], "data_offsets": ["0", 8]}, "sizes must be whole numbers"),
        ({"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}, "the safetensors header is damaged"),
        ({"shape": [2], "data_offsets": [0, 8]}, "the safetensors header is damaged"),
    ],
)
def test_a_header_that_makes_no_sense(tmp_path, entry, message):
    header = json.dumps({"w": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(MergeError, match=message):
        open_source(tmp_path / "x.safetensors")


def test_damaged_files_beside_the_weights(tmp_path):
    save_checkpoint(tmp_path / "out", TENSORS)
    (tmp_path / "out" / "config.json").write_text("[1, 2]")
    with pytest.raises(MergeError, match=r"out: config\.json is not a JSON object"):
        open_source(tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    (tmp_path / "out" / "model.safetensors.index.json").write_text("[]")
    assert set(open_source(tmp_path / "out")) == set(TENSORS)  # as transformers has it: the index is an older one's
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(MergeError, match=r"model\.safetensors\.index\.json is no index of shards"):
        open_source(tmp_path / "out")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 200)
    with pytest.raises(MergeError, match="became shorter while it was read"):
        file.read("ids")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "link.safetensors"]
)
def test_an_index_that_points_outside_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "secret.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    index = {"weight_map": dict.fromkeys(TENSORS, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MergeError, match="points outside its folder"):
        open_source(folder)


def test_the_links_of_the_hub_cache_are_no_escape(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(TENSORS, blobs / "0123")
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/0123")
    index = {"weight_map": dict.fromkeys(TENSORS, "model-1.safetensors")}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(open_source(snapshot), TENSORS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(extra="model-00001-of-00002.safetensors"), "misses the tensor extra"),
        (lambda m: m.pop("ids"), "holds, against the index, the tensor ids"),
        (lambda m: m.update(ids="gone.safetensors"), "gone.safetensors"),
    ],
)
def test_an_index_that_does_not_fit_its_shards(tmp_path, change, message):
    save_checkpoint(tmp_path / "out", TENSORS, max_shard_size=48)
    path = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(MergeError) as error:
        open_source(tmp_path / "out")
    assert message in str(error.value) or "holds, against the index" in str(error.value)


@pytest.mark.parametrize("ref", ["no/such/folder", "./missing", "model.txt", "gone.safetensors", "org/base+org/lora"])
def test_a_reference_to_nothing(ref, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.txt").write_text("x")
    with pytest.raises(MergeError) as error:
        open_source(ref)
    assert "\n" not in str(error.value) and len(str(error.value)) > 20


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(MergeError, match="holds no weights"):
        open_source(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "ignored"),
    [
        (TENSORS, []),
        ({"state_dict": TENSORS, "epoch": 3}, ["epoch"]),
        ({"model": {"module": TENSORS}, "args": 1}, ["args"]),
        ({"model": {**TENSORS, "version": 2}}, ["model.version"]),
        ({"state_dict": {k: torch.nn.Parameter(v) for k, v in TENSORS.items() if v.is_floating_point()}}, []),
        ({"state_dict": TENSORS, "hyper_parameters": argparse.Namespace(lr=1), "path": pathlib.Path("/x")}, ["h", "p"]),
    ],
)
def test_checkpoint_files(tmp_path, content, ignored, zipped):
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    source = open_source(tmp_path / "x.ckpt")
    expected = TENSORS if "ids" in source else {k: v for k, v in TENSORS.items() if v.is_floating_point()}
    assert same(source, expected)
    assert [found[: len(wanted)] for found, wanted in zip(source.ignored, ignored, strict=True)] == ignored


def test_tensors_that_share_memory_are_reported(tmp_path):
    w = torch.ones(2, 2)
    torch.save({"embed": w, "head": w, "other": torch.ones(2, 2)}, tmp_path / "x.pt")
    assert open_source(tmp_path / "x.pt").tied == (("embed", "head"),)


class Hostile:
    """A pickle whose loading would call ``function`` with a marker file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch(path):
    """Stands for any function of an installed package that a pickle could name."""
    pathlib.Path(path).touch()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.system, exec, eval, __import__, getattr, open], ids=lambda f: f.__name__)
def test_a_malicious_pickle_is_refused_and_nothing_in_it_runs(tmp_path, function, zipped):
    marker = tmp_path / "marker"
    argument = {os.system: f"touch {marker}", open: str(marker)}.get(function, f"open({str(marker)!r}, 'w')")
    content = {
        "state_dict": TENSORS,
        "extra": Hostile(function, *((argument, "w") if function is open else (argument,))),
    }
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(MergeError, match=rf"x\.ckpt: refused: the checkpoint asks for \w+\.{function.__name__}"):
        open_source(tmp_path / "x.ckpt")
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_an_unknown_function_becomes_a_stand_in_that_does_nothing(tmp_path, zipped):
    marker = tmp_path / "marker"
    content = {"state_dict": TENSORS, "extra": Hostile(touch, str(marker))}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    source = open_source(tmp_path / "x.ckpt")
    assert same(source, TENSORS) and source.ignored == ("extra",) and not marker.exists()


class Nested:
    """Reduces to stand-ins that are called, updated, appended to and put into a set."""

    def __reduce__(self):
        return (Nested, (), {"state": 1}, iter([1, 2]), iter([("a", 1)]))


def test_whatever_is_done_to_a_stand_in_has_no_effect(tmp_path):
    torch.save({"model": TENSORS, "rest": [Nested(), {Nested()}]}, tmp_path / "x.pt")
    assert same(open_source(tmp_path / "x.pt"), TENSORS)


CALLABLE = ["torch._utils\n_rebuild_tensor_v2", "_codecs\nencode", "torch.nn.parameter\nParameter", "any.module\nname"]


@pytest.mark.parametrize("name", CALLABLE)
@pytest.mark.parametrize("state", ["}S'planted'\nI1\ns", "(N}S'planted'\nI1\nst"], ids=["dict", "slots"])
def test_a_pickle_cannot_alter_what_it_may_call(name, state):
    script = f"c{name}\n{state}b.".encode()  # BUILD: sets an attribute on what the name stands for
    with suppress(TypeError):  # of a class, which refuses it
        assert not hasattr(RestrictedUnpickler(io.BytesIO(script)).load(), "planted")


@pytest.mark.parametrize("name", ["OrderedDict", "Counter"])
def test_a_pickle_cannot_alter_a_class_of_the_standard_library(name):
    script = f"ccollections\n{name}\n(N}}S'planted'\nI1\nstb.".encode()
    with pytest.raises(TypeError):
        RestrictedUnpickler(io.BytesIO(script)).load()
    assert not hasattr(getattr(collections, name), "planted")


@pytest.mark.parametrize("name", ["torch._utils\nos.system", "torch\nserialization.os.system", "torch\nSize.__class__"])
def test_a_dotted_name_leads_nowhere(name):
    assert issubclass(RestrictedUnpickler(io.BytesIO(f"c{name}\n.".encode())).load(), StandIn)


def test_no_patch_file_is_written_for_a_container_whose_source_differs(tmp_path):
    """torch's reader of old files compares a container's source with that in the file, and can write a patch."""
    name = str(tmp_path / "planted")
    build = f"c_codecs\nencode\n(N}}S'dump_patches'\nI01\nsS'__name__'\nS'{name}'\nstb"
    container = f"(S'module'\n{build}S'x.py'\nS'another source'\ntQ.".encode()
    start = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}]
    parts = [pickle.dumps(part, 2) for part in start]
    (tmp_path / "x.pt").write_bytes(b"".join([*parts, container, pickle.dumps([], 2)]))
    with pytest.raises(MergeError, match=r"x\.pt is no readable checkpoint"):
        open_source(tmp_path / "x.pt")
    assert os.listdir(tmp_path) == ["x.pt"]


def test_a_tar_archive_is_not_unpacked(tmp_path):
    with tarfile.open(tmp_path / "x.pt", "w") as archive:
        archive.add(__file__, "storages")
    with pytest.raises(MergeError, match=r"x\.pt is a tar archive"):
        open_source(tmp_path / "x.pt")


@pytest.mark.parametrize("data", [b"", b"nonsense", pickle.dumps([1, 2])], ids=["empty", "text", "list"])
def test_a_file_that_is_no_checkpoint(tmp_path, data):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(MergeError, match=r"x\.pt is no readable checkpoint|x\.pt holds no state dict"):
        open_source(tmp_path / "x.pt")
    torch.save({"epoch": 1}, tmp_path / "y.pt")
    with pytest.raises(MergeError, match=r"y\.pt holds no state dict"):
        open_source(tmp_path / "y.pt")


def test_a_torchscript_program_is_not_run(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/data.pkl", b"")
    with pytest.raises(MergeError, match="TorchScript program"):
        open_source(tmp_path / "x.pt")


def save_bin_shards(folder, tensors, count):
    """A folder as older versions of transformers wrote it: pytorch_model-….bin with an index."""
    folder.mkdir()
    keys, weight_map = list(tensors), {}
    for i in range(count):
        name = f"pytorch_model-{i + 1:05d}-of-{count:05d}.bin"
        torch.save({key: tensors[key] for key in keys[i::count]}, folder / name)
        weight_map |= dict.fromkeys(keys[i::count], name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_sources_of_different_layouts_merge_together(tmp_path):
    """One file, safetensors shards of two sizes and .bin shards, each with other neighbours and another dtype."""
    keys = [f"layers.{i}.{part}" for i in range(3) for part in ("weight", "bias")]
    torch.manual_seed(0)
    values = [{k: torch.randn(5, 7) if k.endswith("weight") else torch.randn(7) for k in keys} for _ in range(4)]
    values[1] = {k: v.half() for k, v in values[1].items()}
    values[3] = {k: v.bfloat16() for k, v in values[3].items()}
    save_checkpoint(tmp_path / "one", values[0], fsync=False)
    save_checkpoint(tmp_path / "small", values[1], max_shard_size=90, fsync=False)
    save_checkpoint(tmp_path / "large", {k: values[2][k] for k in reversed(keys)}, max_shard_size=300, fsync=False)
    save_bin_shards(tmp_path / "bin", values[3], 3)
    models = [str(tmp_path / name) for name in ("one", "small", "large", "bin")]
    merge(
        {"merge_method": "linear", "models": models}, tmp_path / "out", max_shard_size=200, progress=False, fsync=False
    )
    with open_source(tmp_path / "out") as merged:
        assert list(merged) and merged.keys() == set(keys)
        for key in keys:
            mean = sum(own[key].double() for own in values) / 4
            assert merged.dtype(key) == torch.float32
            torch.testing.assert_close(merged[key].double(), mean, rtol=0, atol=1e-6)


def test_bin_shards_hold_what_their_index_says(tmp_path):
    weight_map = save_bin_shards(tmp_path / "bin", TENSORS, 2)
    assert same(open_source(tmp_path / "bin"), TENSORS)
    first, second = sorted(set(weight_map.values()))
    torch.save({**torch.load(tmp_path / "bin" / second), "a.weight": torch.ones(1)}, tmp_path / "bin" / second)
    with pytest.raises(MergeError, match=r"00002\.bin holds, against the index, the tensor a\.weight"):
        open_source(tmp_path / "bin")
    torch.save({"a.weight": torch.ones(1)}, tmp_path / "bin" / first)
    with pytest.raises(MergeError, match=r"00002\.bin misses the tensor ids"):
        open_source(tmp_path / "bin")
    (tmp_path / "bin" / first).unlink()
    with pytest.raises(MergeError, match=r"the index names pytorch_model-00001-of-00002\.bin, which is missing"):
        open_source(tmp_path / "bin")
