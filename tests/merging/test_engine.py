"""The engine: laws over methods through files, dtypes, copying, rules, what is carried along, and atomicity."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_vlmerge.merging import MergeError, get_merge_method, list_merge_methods, merge, merge_tensors, open_source
from hf_vlmerge.merging.program import BLOCK
from hf_vlmerge.merging.registry import MERGE_METHODS, PerMember, WholeModel, merge_method

EXPERTS = ["vision", "language", "vision_language"]
LAYOUT = {"experts": EXPERTS, "merged": "shared", "config": {"expert_modules": []}}


def expert_model(equal=False, layers=2, width=8, seed=0):
    """A tiny checkpoint with experts in each layer, the cross-modal one in the last layer only."""
    torch.manual_seed(seed)
    tensors = {"embeddings.weight": torch.randn(5, width), "encoder.norm.weight": torch.randn(width)}
    for i in range(layers):
        one = {"fc.weight": torch.randn(width, width), "fc.bias": torch.randn(width), "norm.weight": torch.randn(width)}
        for expert in EXPERTS if i == layers - 1 else EXPERTS[:2]:
            for name, value in one.items():
                module, _, leaf = name.partition(".")
                own = value.clone() if equal else torch.randn_like(value)
                tensors[f"encoder.layers.{i}.{module}.{expert}.{leaf}"] = own
        tensors[f"encoder.layers.{i}.layer_scale"] = torch.randn(width)
    return tensors


def as_shared(tensors):
    """The modality-agnostic twin: the vision expert under the merged name."""
    return {
        k.replace(".vision.", ".shared."): v
        for k, v in tensors.items()
        if ".language." not in k and "_language" not in k
    }


def statistics_for(tensors, width=8):
    grams = {f"gram.{k}": torch.eye(width) for k, v in tensors.items() if v.ndim == 2 and "layers" in k}
    return grams | {f"fisher.{k}": torch.ones_like(v) for k, v in tensors.items()}


def expert_recipe(method, **more):
    recipe = {"merge_method": method, "experts_of": "specific", "experts": LAYOUT, "base_model": "seed", **more}
    if get_merge_method(method).statistics:
        recipe["statistics"] = "statistics"
    if (most := get_merge_method(method).members[1]) < 3:
        recipe["rules"] = [{"members": ["vision", "language"][:most]}]
    return recipe


@pytest.mark.parametrize("method", list_merge_methods())
def test_copies_of_one_expert_merge_into_it_bit_for_bit(method):
    specific = expert_model(equal=True)
    given = {"specific": specific, "seed": as_shared(specific), "statistics": statistics_for(specific)}
    merged = merge_tensors(expert_recipe(method), given)
    expected = as_shared(specific)
    assert merged.keys() == expected.keys()
    assert all(merged[key].equal(expected[key]) for key in merged)


@pytest.mark.parametrize("method", list_merge_methods())
def test_names_are_the_image_of_the_grouping(method):
    specific = expert_model()
    given = {"specific": specific, "seed": as_shared(expert_model(seed=1)), "statistics": statistics_for(specific)}
    merged = merge_tensors(expert_recipe(method), given)
    assert {k: v.shape for k, v in merged.items()} == {k: v.shape for k, v in as_shared(specific).items()}
    for key in ("embeddings.weight", "encoder.norm.weight", "encoder.layers.0.layer_scale"):
        assert merged[key].equal(specific[key])


@pytest.mark.parametrize("method", list_merge_methods())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunk_size_changes_no_bit(method, dtype):
    shapes = {"a.weight": (130, 1030), "b.weight": (3 * BLOCK + 9,), "c": ()}
    models = {name: {k: torch.randn(s).to(dtype) for k, s in shapes.items()} for name in ("a", "b", "seed")}
    if get_merge_method(method).statistics:
        fisher = {f"fisher.{k}": torch.rand(s) for k, s in shapes.items()}
        models["statistics"] = {"gram.a.weight": torch.eye(1030) + 0.1, **fisher}
    members = ["a", "b"][: get_merge_method(method).members[1]]
    recipe = {"merge_method": method, "models": members, "base_model": "seed"}
    recipe |= {"statistics": "statistics"} if get_merge_method(method).statistics else {}
    first, *others = (merge_tensors(recipe, models, chunk_size=size) for size in (1, 2 * BLOCK, 1 << 24))
    assert all(first[key].equal(other[key]) for other in others for key in first)
    assert all(value.dtype == dtype for value in first.values())


@pytest.fixture
def method():
    """Registers methods for one test only."""
    names = []

    def register(name, **traits):
        names.append(name)
        return merge_method(name, **traits)

    yield register
    for name in names:
        MERGE_METHODS.entries.pop(name)


def test_a_method_over_rows_sees_whole_rows_and_their_sums(method):
    seen = set()

    @method("rows", unit="row")
    def rows(*, share: PerMember = 1.0):
        (sums,) = yield lambda c: (c.x.double().sum((1, 2)),)

        def merge(c):
            seen.add(tuple(c.x.shape[2:]))
            assert c.start % c.x.shape[2] == 0
            return (c.x / sums.float()[:, None, None]).amax(2, keepdim=True).sum(0) * c.x[0] * share[0]

        return merge

    models = {name: {"m": torch.rand(700, 300), "v": torch.rand(5), "c": torch.rand(3, 2, 2)} for name in "ab"}
    recipe = {"merge_method": "rows", "models": ["a", "b"], "parameters": {"share": {"a": 2.0, "b": [0, 1]}}}
    first, second = (merge_tensors(recipe, models, chunk_size=size) for size in (1, 1 << 24))
    assert all(first[key].equal(second[key]) for key in first) and seen == {(300,), (5,), (4,)}
    x = torch.stack([models[n]["m"] for n in "ab"])
    expected = 2 * (x / x.sum((1, 2), keepdim=True)).amax(2, keepdim=True).sum(0) * x[0]
    torch.testing.assert_close(first["m"], expected)


def test_a_method_may_ask_for_sums_over_the_whole_model(method):
    @method("centred", weighted=False)
    def centred():
        sums, counts = yield WholeModel(lambda c: (c.x.double().sum(1), torch.full((len(c.x),), c.x.shape[1])))
        means = (sums / counts).float()
        return lambda c: (c.x - means[:, None]).sum(0)

    models = {
        "a": {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([6.0])},
        "b": {"x": torch.zeros(2), "y": torch.ones(1)},
    }
    merged = merge_tensors({"merge_method": "centred", "models": ["a", "b"]}, models)
    torch.testing.assert_close(merged["x"], torch.tensor([-2.0, -1.0]) - 1 / 3)
    torch.testing.assert_close(merged["y"], torch.tensor([3.0]) + 2 / 3)


def test_a_method_that_changes_the_shape_is_stopped(method):
    method("broken")(lambda: lambda c: c.x)
    models = {name: {"w": torch.rand(3)} for name in "ab"}
    with pytest.raises(RuntimeError, match=r"broken returned \(2, 3\) for \(3,\)"):
        merge_tensors({"merge_method": "broken", "models": ["a", "b"]}, models)


def test_the_number_of_threads_changes_no_bit():
    models = {name: {"w": torch.randn(5 * BLOCK + 3)} for name in "ab"}
    threads = torch.get_num_threads()
    merged = []
    for count in (1, 2):
        torch.set_num_threads(count)
        merged.append(merge_tensors({"merge_method": "slerp", "models": ["a", "b"]}, models)["w"])
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert merged[0].equal(merged[1])


@pytest.fixture
def folders(tmp_path):
    """Two models and a base on disk, with everything that a model folder holds."""
    for i, name in enumerate(("base", "left", "right")):
        torch.manual_seed(i)
        folder = tmp_path / name
        folder.mkdir()
        tensors = {"layers.0.w": torch.randn(4, 3), "layers.1.w": torch.randn(4, 3), "steps": torch.tensor([i])}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "toy", "name": name}))
        for side in ("tokenizer.json", "chat_template.jinja", "modeling_toy.py", "LICENSE", "vocab.txt"):
            (folder / side).write_text(f"{side} of {name}")
        for other in ("README.md", "training_args.bin", "trainer_state.json", ".secret.json", "optimizer.pt"):
            (folder / other).write_text("not carried")
    return tmp_path


def by_name(folders, method="linear", **more):
    models = [{"model": str(folders / "left")}, {"model": str(folders / "right")}]
    return {"merge_method": method, "models": models, "base_model": str(folders / "base"), **more}


def test_a_written_folder_is_complete(folders):
    report = merge(by_name(folders), folders / "out", progress=False)
    out = folders / "out"
    found = {p.name for p in out.iterdir()}
    carried = {"tokenizer.json", "chat_template.jinja", "modeling_toy.py", "LICENSE", "vocab.txt"}
    assert found == {"model.safetensors", "config.json", "recipe.yaml", *carried}
    assert json.loads((out / "config.json").read_text())["name"] == "base"
    assert (out / "tokenizer.json").read_text() == "tokenizer.json of base"
    left, right = (load_file(folders / name / "model.safetensors") for name in ("left", "right"))
    written = load_file(out / "model.safetensors")
    torch.testing.assert_close(written["layers.0.w"], (left["layers.0.w"] + right["layers.0.w"]) / 2)
    assert open_source(out).metadata == {"format": "pt"}
    assert report.output == out and report.counts == {"merged": 2, "copied": 1, "equal": 0}
    assert report.parameters == 25 and report.input_parameters == 50 and report.bytes_written == 24 * 4 + 8
    assert json.dumps(report.to_dict())


def test_files_can_be_carried_from_another_source(folders):
    merge(by_name(folders, files_from="right"), folders / "out", progress=False)
    assert (folders / "out" / "vocab.txt").read_text() == "vocab.txt of right"


def test_no_path_of_this_machine_leaves_with_the_folder(folders):
    report = merge(by_name(folders, tokenizer_source=str(folders / "left")), folders / "out", progress=False)
    text = (folders / "out" / "recipe.yaml").read_text() + json.dumps(report.to_dict())
    assert str(folders) not in text and "model: left" in text and "files_from: left" in text


def test_the_written_recipe_is_a_recipe(folders):
    report = merge(by_name(folders, parameters={"weights": [3, 1]}), folders / "out", progress=False)
    models = {name: open_source(folders / name) for name in ("base", "left", "right")}
    again = merge_tensors(folders / "out" / "recipe.yaml", models)
    assert again["layers.1.w"].equal(open_source(folders / "out")["layers.1.w"])
    assert report.recipe.parameters == {"weights": [3, 1]}


def test_integers_come_from_the_base_else_from_the_first(folders):
    merge(by_name(folders), folders / "with", progress=False)
    recipe = by_name(folders)
    del recipe["base_model"]
    report = merge(recipe, folders / "without", progress=False)
    assert open_source(folders / "with")["steps"].item() == 0
    assert open_source(folders / "without")["steps"].item() == 1
    assert any("1 integer tensors are copied" in note for note in report.notes)


@pytest.mark.parametrize(("wanted", "expected"), [({}, "bfloat16"), ({"dtype": "float16"}, "float16")])
def test_output_dtype(wanted, expected):
    models = {"a": {"w": torch.randn(3)}, "b": {"w": torch.randn(3)}, "z": {"w": torch.randn(3).to(torch.bfloat16)}}
    recipe = {"merge_method": "linear", "models": ["a", "b"], "base_model": "z", **wanted}
    assert merge_tensors(recipe, models)["w"].dtype == getattr(torch, expected)
    both = {**recipe, "dtype": "float16", "out_dtype": "float32"}
    assert merge_tensors(both, models)["w"].dtype == torch.float32


def test_dtype_reaches_config_json(folders):
    merge(by_name(folders, out_dtype="bf16"), folders / "out", progress=False)
    assert json.loads((folders / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert open_source(folders / "out").dtype("steps") == torch.int64


def test_bfloat16_is_rounded_once():
    a, b = (torch.randn(1000).to(torch.bfloat16) for _ in range(2))
    merged = merge_tensors({"merge_method": "linear", "models": ["a", "b"]}, {"a": {"w": a}, "b": {"w": b}})["w"]
    assert merged.equal(((a.double() + b.double()) / 2).to(torch.bfloat16))


def test_values_that_do_not_fit_the_output_dtype_are_an_error():
    models = {"a": {"w": torch.tensor([1e5])}, "b": {"w": torch.tensor([3e5])}}
    with pytest.raises(MergeError, match="w: values up to 2e\\+05 do not fit into float16"):
        merge_tensors({"merge_method": "linear", "models": ["a", "b"], "dtype": "float16"}, models)


def test_equal_inputs_are_copied_even_where_arithmetic_would_round():
    x = torch.randn(1000)
    models = {name: {"w": x.clone()} for name in "abc"}
    recipe = {"merge_method": "linear", "models": list("abc")}
    assert merge_tensors(recipe, models)["w"].equal(x)
    unnormalised = {**recipe, "parameters": {"normalize": False, "weights": 0.5}}
    torch.testing.assert_close(merge_tensors(unnormalised, models)["w"], 1.5 * x)


def test_running_statistics_are_averaged_by_every_method():
    models = {
        n: {"bn.running_var": torch.tensor([v]), "w": torch.randn(2)} for n, v in (("a", 1.0), ("b", 9.0), ("z", 0.0))
    }
    recipe = {
        "merge_method": "task_arithmetic",
        "models": ["a", "b"],
        "base_model": "z",
        "parameters": {"weights": [3, 1]},
    }
    assert merge_tensors(recipe, models)["bn.running_var"].item() == 3.0


def test_config_receives_the_layouts_changes(tmp_path):
    source = tmp_path / "specific"
    source.mkdir()
    save_file(expert_model(), source / "model.safetensors")
    config = {"model_type": "toy", "expert_modules": ["attention"], "expert_layout": LAYOUT}
    (source / "config.json").write_text(json.dumps(config))
    report = merge({"merge_method": "interpolation", "experts_of": str(source)}, tmp_path / "out", progress=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**config, "expert_modules": []} == report.config


def test_dry_run_writes_nothing_and_tells_the_plan(folders):
    rules = [{"match": "layers.1.*", "keep": "right"}, {"match": "nothing*", "keep": "base"}]
    before = sorted(folders.iterdir())
    report = merge(by_name(folders, rules=rules, parameters={"weights": [3, 1]}), folders / "out", dry_run=True)
    assert sorted(folders.iterdir()) == before and report.output is None
    plan = {t.output: (t.method, t.members, t.rules, t.note) for t in report.tensors}
    assert plan["layers.1.w"] == ("copy", ("right",), (1,), "kept: right")
    assert plan["layers.0.w"] == ("linear", ("left", "right"), (), "")
    assert "rule 2 applies to no tensor" in report.notes
    assert "kept: right" in report.table() and "rules 1" in report.table()
    assert "weights=(3.0, 1.0)" in report.table()


def test_shards_and_index(folders):
    merge(by_name(folders), folders / "out", progress=False, max_shard_size=60)
    names = sorted(p.name for p in (folders / "out").glob("*.safetensors"))
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((folders / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 24 * 4 + 8
    whole = merge_tensors(by_name(folders))
    with open_source(folders / "out") as written:
        assert all(written[key].equal(whole[key]) for key in whole)


def test_finish_sees_the_folder_before_it_appears(folders):
    seen = {}

    def finish(folder: Path, report):
        seen["files"], seen["output"] = {p.name for p in folder.iterdir()}, (folders / "out").exists()
        (folder / "README.md").write_text(f"{report.parameters} parameters")

    merge(by_name(folders), folders / "out", finish=finish, progress=False)
    assert "model.safetensors" in seen["files"] and not seen["output"]
    assert (folders / "out" / "README.md").read_text() == "25 parameters"


def test_an_error_at_any_point_leaves_everything_as_it_was(folders):
    (folders / "out").mkdir()
    (folders / "out" / "old.txt").write_text("old")
    (folders / "out" / "config.json").write_text("{}")
    before = sorted(os.listdir(folders))

    def fail(folder, report):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        merge(by_name(folders), folders / "out", finish=fail, overwrite=True, progress=False)
    assert sorted(os.listdir(folders)) == before and (folders / "out" / "old.txt").read_text() == "old"
    merge(by_name(folders), folders / "out", overwrite=True, progress=False)
    assert sorted(os.listdir(folders)) == before and not (folders / "out" / "old.txt").exists()


def test_a_merge_may_replace_one_of_its_inputs(folders):
    expected = merge_tensors(by_name(folders))
    merge(by_name(folders), folders / "left", overwrite=True, progress=False)
    assert open_source(folders / "left")["layers.0.w"].equal(expected["layers.0.w"])


def test_what_is_no_model_or_holds_inputs_is_not_replaced(folders, monkeypatch):
    (folders / "thesis").mkdir()
    (folders / "thesis" / "thesis.tex").write_text("years")
    with pytest.raises(MergeError, match="'thesis' is a folder of something else than a model"):
        merge(by_name(folders), folders / "thesis", overwrite=True, progress=False)
    (folders / "config.json").write_text("{}")  # even where it looks like one
    monkeypatch.chdir(folders)
    before = sorted(folders.rglob("*"))
    with pytest.raises(MergeError, match=r"the output '.*' is a folder above the input '\w+'"):
        merge(by_name(folders), ".", overwrite=True, progress=False)
    assert sorted(folders.rglob("*")) == before


def test_float64_is_written_and_what_does_not_fit_is_refused_also_where_it_is_copied():
    exact = {"w": torch.tensor([1.0, 2.0**-40], dtype=torch.float64)}
    recipe = {"merge_method": "linear", "models": ["a", "b"]}
    merged = merge_tensors(recipe, {"a": exact, "b": {"w": exact["w"] * 3}})
    assert merged["w"].dtype == torch.float64 and merged["w"].equal(exact["w"] * 2)
    large = {"w": torch.tensor([1e5, 1.0])}
    half = recipe | {"out_dtype": "float16"}
    kept = half | {"rules": [{"match": "*", "keep": "a"}]}
    for each in (half, kept):
        with pytest.raises(MergeError, match=r"w: values up to 1e\+05 do not fit into float16"):
            merge_tensors(each, {"a": large, "b": large})
    eight = {"w": torch.tensor([1.0, 2.0]).to(torch.float8_e5m2)}
    assert merge_tensors(kept, {"a": eight, "b": eight})["w"].tolist() == [1.0, 2.0]


def test_codes_are_not_averaged(folders):
    codes, floats = {"w": torch.ones(3, dtype=torch.int8)}, {"w": torch.ones(3)}
    recipe = {"merge_method": "linear", "models": ["a", "b"]}
    for a, b in ((codes, floats), (floats, codes)):
        with pytest.raises(MergeError, match=r"w: (int8|float32) in .* and (int8|float32) in .* cannot be averaged"):
            merge_tensors(recipe, {"a": a, "b": b})
    config = json.loads((folders / "left" / "config.json").read_text()) | {"quantization_config": {"bits": 4}}
    (folders / "left" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match="left is quantised"):
        merge_tensors(by_name(folders))


def test_a_rule_for_one_of_two_tied_tensors_is_refused():
    w, v = torch.ones(2, 2), torch.zeros(2, 2)
    sources = {"a": {"embed": w, "head": w}, "b": {"embed": v, "head": v}}
    recipe = {"merge_method": "linear", "models": ["a", "b"], "rules": [{"match": "head", "keep": "a"}]}
    with pytest.raises(MergeError, match="embed and head are tied, but the recipe merges them differently"):
        merge_tensors(recipe, sources)


def test_tied_tensors_are_merged_alike_or_not_at_all():
    def tied(seed):
        torch.manual_seed(seed)
        w = torch.randn(3, 2)
        return {"embed.weight": w, "head.weight": w}

    models = {"a": tied(0), "b": tied(1)}
    recipe = {"merge_method": "linear", "models": ["a", "b"]}
    merged = merge_tensors(recipe, models)
    assert merged["embed.weight"].equal(merged["head.weight"])
    apart = {**recipe, "rules": [{"match": "head*", "parameters": {"weights": [1, 0]}}]}
    with pytest.raises(
        MergeError, match=r"embed.weight and head.weight are tied, but the recipe merges them differently"
    ):
        merge_tensors(apart, models)


def test_what_should_not_go_unsaid(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "left.ckpt")
    save_file({"w": torch.zeros(2, dtype=torch.float16)}, tmp_path / "right.safetensors")
    save_file({"w": torch.zeros(2), "head": torch.ones(1)}, tmp_path / "seed.safetensors")
    models = [str(tmp_path / "left.ckpt"), str(tmp_path / "right.safetensors")]
    recipe = {"merge_method": "linear", "models": models, "base_model": str(tmp_path / "seed.safetensors")}
    assert merge(recipe, None, dry_run=True).notes == [
        "the inputs have different dtypes (float16, float32)",
        "left.ckpt (left.ckpt): beside the state dict and left out: epoch",
        "1 tensors of the base are in no member and are not used, such as head",
    ]
    with pytest.raises(MergeError, match="an output folder is needed"):
        merge(recipe, None)


def test_the_name_of_an_input_does_not_stay_in_config_json(folders):
    for name in ("base", "left"):
        config = {"model_type": "toy", "_name_or_path": f"/home/someone/{name}"}
        (folders / name / "config.json").write_text(json.dumps(config))
    merge(by_name(folders), folders / "out", progress=False)
    assert json.loads((folders / "out" / "config.json").read_text()) == {"model_type": "toy"}


def test_a_link_out_of_a_models_folder_is_not_carried_along(folders):
    (folders / "key.txt").write_text("private")
    (folders / "base" / "merges.txt").symlink_to(folders / "key.txt")
    with pytest.raises(MergeError, match=r"base: merges\.txt is a link that points outside its folder"):
        merge(by_name(folders), folders / "out", progress=False)
    assert not (folders / "out").exists()
    (folders / "base" / "merges.txt").unlink()
    (folders / "base" / "merges.txt").symlink_to("vocab.txt")
    merge(by_name(folders), folders / "out", progress=False)
    assert (folders / "out" / "merges.txt").read_text() == "vocab.txt of base"


def test_tensors_without_elements(tmp_path):
    models = {
        name: {"w": torch.full((2,), value), "none": torch.zeros(0, 3)} for name, value in (("a", 1.0), ("b", 3.0))
    }
    recipe = {"merge_method": "linear", "models": ["a", "b"], "parameters": {"normalize": False}}
    report = merge(recipe, tmp_path / "out", sources=models, progress=False)
    assert report.counts == {"merged": 2, "copied": 0, "equal": 0}
    with open_source(tmp_path / "out") as written:
        assert written["w"].tolist() == [4.0, 4.0] and written["none"].shape == (0, 3)
