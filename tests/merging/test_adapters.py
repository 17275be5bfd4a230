"""LoRA adapters: as dense inputs (base + adapter), and merged into one adapter; against peft where that is here."""

import hashlib
import json
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

from hf_vlmerge import VlmoConfig, VlmoForPreTraining
from hf_vlmerge.hub.card import render, write_merge_card
from hf_vlmerge.merging import MergeError, Recipe, merge, merge_tensors, open_source
from tests.hub_server import HubServer
from tests.merging.test_hub import NEW, OLD, run
from tests.merging.test_vlmo import TINY

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft asks for it

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def llama(**more):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=31, **more))


def bert(**more):
    config = transformers.BertConfig(**SIZES, vocab_size=31, max_position_embeddings=12, num_labels=3, **more)
    return transformers.BertForSequenceClassification(config)


def vlmo():
    return VlmoForPreTraining(VlmoConfig(**TINY))


def gpt2():
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=31, n_positions=12)
    return transformers.GPT2LMHeadModel(config)


def save_adapter(model, folder, seed=1, **settings):
    """Put a LoRA with random factors around a copy of a model and save it as peft does; returns the peft model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_magnitude" in name:
                    parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
                elif parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        adapted.save_pretrained(folder)
    return adapted


def merged_by_peft(adapted, folder):
    """The tensors that peft's own merge writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.merge_and_unload().save_pretrained(folder)
    return open_source(folder)


ATTENTION = ["q_proj", "v_proj"]
CASES = {
    "llama": (llama, {"target_modules": ATTENTION}),
    "llama, other ranks in places": (
        llama,
        {"target_modules": "all-linear", "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 8},
         "alpha_pattern": {"gate_proj": 3}},
    ),
    "llama, rsLoRA": (llama, {"target_modules": ATTENTION, "use_rslora": True}),
    "llama, DoRA": (llama, {"target_modules": ATTENTION, "use_dora": True}),
    "llama, embeddings and head": (llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "llama, tied": (partial(llama, tie_word_embeddings=True), {"target_modules": ["down_proj"]}),
    "bert, head saved whole": (bert, {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    "bert, biases": (bert, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "bert, bias of B": (bert, {"target_modules": ["query"], "lora_bias": True}),
    "gpt2, turned weights": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "vlmo": (vlmo, {"target_modules": ["qkv", "proj", "fc1", "fc2"]}),
    "vlmo, convolution": (vlmo, {"target_modules": ["patch_projection", "word_embeddings"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_base_plus_adapter_is_what_peft_merges(case, tmp_path):
    make, settings = CASES[case]
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")
    expected = merged_by_peft(save_adapter(model, tmp_path / "adapter", **settings), tmp_path / "peft")
    with open_source(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}") as source:
        assert source.keys() == expected.keys() and source.label == "base+adapter"
        base = open_source(tmp_path / "base")
        changed = [key for key in source if not source[key].equal(base[key])]
        assert changed and len(changed) < len(source)
        for key in source:
            assert source.shape(key) == expected.shape(key) and source.dtype(key) == base.dtype(key)
            torch.testing.assert_close(source[key], expected[key], rtol=1e-6, atol=1e-6)


def test_a_run_has_the_same_bytes_whatever_was_asked_for(tmp_path):
    torch.manual_seed(0)
    save_file({"big.weight": torch.randn(700, 129).bfloat16()}, tmp_path / "model.safetensors")
    write_adapter(tmp_path / "adapter", {"big": (torch.randn(5, 129), torch.randn(700, 5))})
    with open_source(f"{tmp_path / 'model.safetensors'}+{tmp_path / 'adapter'}") as source:
        assert source.dtype("big.weight") == torch.bfloat16  # nominal; read gives more
        whole = source.read("big.weight")
        assert whole.dtype == torch.float32 and source.extent("big.weight") is None
        for start, stop in ((0, 1), (5, 129), (33_000, 66_001), (90_000, 90_300), (7, 7)):
            assert source.read("big.weight", start, stop).equal(whole[start:stop])


def write_adapter(folder, modules, **config):
    """An adapter folder without peft: ``modules`` maps names to (A, B)."""
    folder.mkdir()
    tensors = {}
    for name, (a, b) in modules.items():
        prefix = f"base_model.model.{name}"
        tensors |= {f"{prefix}.lora_A.weight": a.clone(), f"{prefix}.lora_B.weight": b.clone()}
    rank = next(iter(modules.values()))[0].shape[0]
    save_file(tensors, folder / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(modules), **config}
    (folder / "adapter_config.json").write_text(json.dumps(known))


def test_a_merge_of_adapted_models_rounds_once(tmp_path):
    torch.manual_seed(0)
    base = torch.randn(40, 24).bfloat16()
    save_file({"w.weight": base, "rest": torch.ones(3)}, tmp_path / "model.safetensors")
    factors = [(torch.randn(2, 24), torch.randn(40, 2)) for _ in range(2)]
    for name, pair in zip("ab", factors, strict=True):
        write_adapter(tmp_path / name, {"w": pair})
    models = [{"model": f"{tmp_path / 'model.safetensors'}+{tmp_path / name}"} for name in "ab"]
    report = merge({"merge_method": "linear", "models": models}, tmp_path / "out", progress=False, fsync=False)
    assert report.recipe.aliases == ("a", "b")
    assert [m.model for m in report.recipe.models] == ["model.safetensors+a", "model.safetensors+b"]
    assert any("1 weights get a low-rank update" in note for note in report.notes)
    merged = open_source(tmp_path / "out")
    expected = base.double() + sum(b.double() @ a.double() for a, b in factors) / 2
    assert merged.dtype("w.weight") == torch.bfloat16 and merged["w.weight"].equal(expected.float().bfloat16())
    assert merge_tensors({"merge_method": "linear", "models": models})["w.weight"].equal(merged["w.weight"])
    copies = {"merge_method": "linear", "models": [models[0], {**models[0], "alias": "again"}]}
    assert merge(copies, tmp_path / "same", progress=False, fsync=False).counts["equal"] == 2


def test_chunks_and_threads_change_no_byte_of_a_merge_of_adapted_models(tmp_path):
    torch.manual_seed(0)
    save_file({"w.weight": torch.randn(700, 513).half()}, tmp_path / "model.safetensors")
    for name in "ab":
        write_adapter(tmp_path / name, {"w": (torch.randn(9, 513), torch.randn(700, 9))})
    models = [{"model": f"{tmp_path / 'model.safetensors'}+{tmp_path / name}"} for name in "ab"]
    settings = ({"threads": 1}, {"threads": 2}, {"threads": 2, "chunk_size": 1}, {"threads": 1, "chunk_size": 1 << 30})
    outputs = set()
    for i, setting in enumerate(settings):
        merge({"merge_method": "slerp", "models": models}, tmp_path / f"{i}", progress=False, fsync=False, **setting)
        outputs.add((tmp_path / f"{i}" / "model.safetensors").read_bytes())
    assert len(outputs) == 1


HUB = """
    import json, sys
    from hf_vlmerge.merging import merge, merge_tensors
    models = ["org/base@v1+org/lora", "org/base@v1"]
    report = merge({"merge_method": "linear", "models": models}, sys.argv[1], progress=False)
    again = merge_tensors(sys.argv[1] + "/recipe.yaml")
    models = report.recipe.to_dict()["models"]
    print(json.dumps({"models": models, "sources": report.sources, "w": again["w.weight"].tolist()}))
"""


def test_base_and_adapter_on_the_hub_are_pinned_and_only_their_files_are_fetched(tmp_path):
    write_adapter(tmp_path / "lora", {"w": (torch.ones(1, 2), torch.ones(2, 1))})
    files = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}
    base = {"model.safetensors": save({"w.weight": torch.zeros(2, 2)}), "config.json": b'{"model_type": "toy"}'}
    repos = {"org/base": {OLD: base}, "org/lora": {NEW: {**files, "optimizer.bin": b"not needed"}}}
    with HubServer(repos, {"org/base": {"main": OLD, "v1": OLD}, "org/lora": {"main": NEW}}) as hub:
        printed = run(hub, tmp_path, HUB, tmp_path / "out")
    assert [m["model"] for m in printed["models"]] == [f"org/base@{OLD}+org/lora@{NEW}", f"org/base@{OLD}"]
    names = {file["name"]: file["sha256"] for file in printed["sources"][0]["files"]}
    assert names.keys() == {"model.safetensors", "org/lora/adapter_model.safetensors"}
    assert names["org/lora/adapter_model.safetensors"] == hashlib.sha256(files["adapter_model.safetensors"]).hexdigest()
    assert printed["w"] == [[0.5, 0.5], [0.5, 0.5]]
    assert not any("optimizer.bin" in request for request in hub.requests)


def test_two_adapters_on_one_base_and_one_from_the_middle_of_a_longer_path(tmp_path):
    save_file({"model.language_model.w.weight": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
    one = (torch.ones(1, 4), torch.ones(3, 1))
    write_adapter(tmp_path / "a", {"model.language_model.w": one})
    write_adapter(tmp_path / "b", {"language_model.model.w": one}, lora_alpha=3)
    with open_source(f"{tmp_path / 'model.safetensors'} + {tmp_path / 'a'} + {tmp_path / 'b'}") as source:
        assert source["model.language_model.w.weight"].eq(4.0).all()
        assert any("found under others, such as language_model.model.w.weight as" in note for note in source.notes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "adapter of type 'LOHA'; only LORA"),
        ({"init_lora_weights": "pissa"}, "started from init_lora_weights='pissa', which changes its base"),
        ({"target_parameters": ["experts.w"]}, "it adapts parameters that are no modules"),
        ({"alora_invocation_tokens": [3]}, "active for some tokens only"),
        ({"r": 7}, r"the factors of w have ranks \(2, 2\), its configuration says 7"),
        ({"lora_alpha": None}, "gives no lora_alpha"),
    ],
)
def test_adapters_that_are_refused(tmp_path, config, message):
    save_file({"w.weight": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
    write_adapter(tmp_path / "a", {"w": (torch.ones(2, 4), torch.ones(3, 2))}, **config)
    with pytest.raises(MergeError, match=message):
        open_source(f"{tmp_path / 'model.safetensors'}+{tmp_path / 'a'}")


def test_adapters_that_do_not_fit_their_base(tmp_path):
    save_file({"w.weight": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
    base = str(tmp_path / "model.safetensors")
    write_adapter(tmp_path / "other", {"layers.0.q": (torch.ones(2, 4), torch.ones(3, 2))})
    with pytest.raises(MergeError, match=r"the adapter changes layers\.0\.q, which the base does not store"):
        open_source(f"{base}+{tmp_path / 'other'}")
    write_adapter(tmp_path / "wide", {"w": (torch.ones(2, 9), torch.ones(3, 2))})
    with pytest.raises(MergeError, match=r"w\.weight has shape \(3, 4\), the adapter's factors \(3, 2\) and \(2, 9\)"):
        open_source(f"{base}+{tmp_path / 'wide'}")
    with pytest.raises(MergeError, match="'nowhere/at/all' is neither the folder of an adapter nor a Hub id"):
        open_source(f"{base}+nowhere/at/all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MergeError, match=r"empty is no adapter: it has no adapter_config\.json"):
        open_source(f"{base}+{tmp_path / 'empty'}")


def test_an_adapter_alone_is_no_model(tmp_path):
    write_adapter(tmp_path / "a", {"w": (torch.ones(2, 4), torch.ones(3, 2))})
    with pytest.raises(MergeError, match=r"a is an adapter, not a model: write 'base\+adapter', or give 'adapters'"):
        merge({"merge_method": "linear", "models": [str(tmp_path / "a")] * 2}, tmp_path / "out")


def test_mergekits_way_to_write_a_model_with_an_adapter():
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": {"model": {"path": "org/base", "revision": "r0"}},
        "models": [
            {
                "model": {
                    "model": {"path": "org/base", "revision": "r1"},
                    "lora": {"path": "org/lora", "revision": "r2"},
                }
            },
            {"model": {"model": "org/base", "lora": "org/other"}},
            {"model": "org/base+org/third@r3"},
        ],
    }
    loaded = Recipe.load(recipe)
    assert [m.model for m in loaded.models] == [
        "org/base@r1+org/lora@r2", "org/base+org/other", "org/base+org/third@r3"
    ]  # fmt: skip
    assert loaded.aliases == ("lora", "other", "third") and loaded.base_model == "org/base@r0"


# Adapters merged into one adapter


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A tiny Llama and two adapters of it, of different rank."""
    folder = tmp_path_factory.mktemp("two")
    torch.manual_seed(0)
    llama().save_pretrained(folder / "base")
    for name, seed, settings in (("a", 1, {"r": 4}), ("b", 2, {"r": 3, "use_rslora": True})):
        model = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
        save_adapter(model, folder / name, seed, target_modules="all-linear", **settings)
    return folder


def updates(folder, adapter):
    """What an adapter adds to its base, by name, in float64."""
    base = open_source(folder / "base")
    with open_source(f"{folder / 'base'}+{adapter}") as source:
        return {key: source[key].double() - base[key].double() for key in source if key.endswith("proj.weight")}


def recipe_of(folder, form, method="linear", **more):
    return {"merge_method": method, "models": [str(folder / "a"), str(folder / "b")], "adapters": form, **more}


@pytest.mark.parametrize(
    ("method", "parameters", "coefficients"),
    [
        ("linear", {"weights": [1, 3]}, (0.25, 0.75)),
        ("linear", {"weights": [0.5, -0.2], "normalize": False}, (0.5, -0.2)),
        ("task_arithmetic", {"weights": [1, 2], "scale": 0.5}, (0.5, 1.0)),
    ],
)
def test_concatenation_is_the_exact_weighted_sum(two, tmp_path, method, parameters, coefficients):
    recipe = recipe_of(two, "concatenation", method, parameters=parameters)
    report = merge(recipe, tmp_path / "out", fsync=False)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (7, 7, False)
    assert config["base_model_name_or_path"] is None  # a folder of this machine
    assert "rank 7; concatenation is exact" in report.notes[-1]
    merged, a, b = (updates(two, folder) for folder in (tmp_path / "out", two / "a", two / "b"))
    for key, value in merged.items():
        torch.testing.assert_close(value, coefficients[0] * a[key] + coefficients[1] * b[key], rtol=0, atol=2e-6)
    in_memory = merge_tensors(recipe)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert in_memory.keys() == written.keys() and all(written[k].equal(v) for k, v in in_memory.items())


@pytest.mark.parametrize("form", ["concatenation", {"form": "svd", "rank": 7}])
def test_peft_loads_the_result_and_computes_the_same(two, tmp_path, form):
    merge(recipe_of(two, form), tmp_path / "out", fsync=False)
    model = transformers.LlamaForCausalLM.from_pretrained(two / "base")
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    expected = merged_by_peft(loaded, tmp_path / "peft")
    a, b, base = updates(two, two / "a"), updates(two, two / "b"), open_source(two / "base")
    for key in a:
        torch.testing.assert_close(expected[key].double(), base[key] + (a[key] + b[key]) / 2, rtol=0, atol=3e-6)


def test_svd_is_the_best_update_of_its_rank_and_says_what_it_loses(two, tmp_path):
    report = merge(recipe_of(two, {"form": "svd", "rank": 3}), tmp_path / "out", fsync=False)
    merged, a, b = (updates(two, folder) for folder in (tmp_path / "out", two / "a", two / "b"))
    lost = total = 0.0
    for key, value in merged.items():
        mean = (a[key] + b[key]) / 2
        s = torch.linalg.svdvals(mean)
        assert torch.linalg.matrix_rank(value, rtol=1e-4) == 3
        assert (value - mean).norm().item() == pytest.approx(s[3:].norm().item(), rel=1e-4)
        lost, total = lost + s[3:].square().sum().item(), total + s.square().sum().item()
    assert f"loses {(lost / total) ** 0.5:.3g} of the norm" in report.notes[-1]


def test_svd_agrees_with_peft(two, tmp_path):
    """peft's own merge of the same two adapters, where it is exact."""
    model = transformers.LlamaForCausalLM.from_pretrained(two / "base")
    loaded = peft.PeftModel.from_pretrained(model, two / "a", adapter_name="a")
    loaded.load_adapter(two / "b", adapter_name="b")
    loaded.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both", combination_type="cat")
    loaded.set_adapter("both")
    loaded.save_pretrained(tmp_path / "peft", selected_adapters=["both"])
    merge(recipe_of(two, "concatenation"), tmp_path / "out", fsync=False)
    ours, theirs = updates(two, tmp_path / "out"), updates(two, tmp_path / "peft" / "both")
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=2e-6)


def test_layers_may_have_weights_of_their_own(two, tmp_path):
    rules = [{"match": "*.layers.0.*", "parameters": {"weights": [1, 0]}}]
    merge(recipe_of(two, "concatenation", rules=rules), tmp_path / "out", fsync=False)
    merged, a, b = (updates(two, folder) for folder in (tmp_path / "out", two / "a", two / "b"))
    for key, value in merged.items():
        expected = a[key] if ".layers.0." in key else (a[key] + b[key]) / 2
        torch.testing.assert_close(value, expected, rtol=0, atol=2e-6)


def test_modules_that_only_one_adapter_has(tmp_path):
    one = (torch.ones(1, 4), torch.ones(3, 1))
    write_adapter(tmp_path / "a", {"v": one, "w": one})
    write_adapter(tmp_path / "b", {"w": one})
    recipe = {"merge_method": "task_arithmetic", "models": [str(tmp_path / "a"), str(tmp_path / "b")]}
    with pytest.raises(MergeError, match="'b' does not adapt v, which others do"):
        merge({**recipe, "adapters": "concatenation"}, tmp_path / "out")
    merge({**recipe, "adapters": {"form": "concatenation", "missing": "zero"}}, tmp_path / "out", fsync=False)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (2, {"v": 1}, {"v": 1})
    assert config["target_modules"] == ["v", "w"]
    save_file({"v.weight": torch.zeros(3, 4), "w.weight": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
    with open_source(f"{tmp_path / 'model.safetensors'}+{tmp_path / 'out'}") as source:
        assert source["v.weight"].eq(1).all() and source["w.weight"].eq(2).all()


def test_tensors_that_adapters_hold_whole_are_averaged_only_by_a_mean(tmp_path):
    one = (torch.ones(1, 4), torch.ones(3, 1))
    for name, value in (("a", 1.0), ("b", 3.0)):
        write_adapter(tmp_path / name, {"w": one})
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        head = {"base_model.model.head.weight": torch.full((2, 2), value)}
        save_file(tensors | head, tmp_path / name / "adapter_model.safetensors")
    recipe = {"models": [str(tmp_path / "a"), str(tmp_path / "b")], "adapters": "concatenation"}
    merged = merge_tensors({"merge_method": "linear", **recipe})
    assert merged["base_model.model.head.weight"].eq(2).all()
    with pytest.raises(MergeError, match=r"head\.weight is held whole by the adapters and differs"):
        merge_tensors({"merge_method": "task_arithmetic", **recipe})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "slerp"}, "adapters are merged by linear or task_arithmetic, not slerp"),
        ({"adapters": "linear"}, "adapters: form can be concatenation or svd, not 'linear'"),
        ({"adapters": {"form": "svd"}}, "svd needs a positive rank, not None"),
        ({"adapters": {"form": "concatenation", "rank": 3}}, "'rank' belongs to the form svd"),
        ({"base_model": "x"}, "'base_model' belongs to merges of models"),
        ({"rules": [{"keep": "a"}]}, "of rules for adapters only match and parameters"),
        ({"parameters": {"weights": [1, -1]}}, "the weights add up to 0"),
    ],
)
def test_recipes_of_adapters_that_are_refused(two, tmp_path, change, message):
    with pytest.raises(MergeError, match=message):
        merge({**recipe_of(two, "concatenation"), **change}, tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"base_model_name_or_path": "org/other"}, "different bases: 'a' 'org/one' and 'b' 'org/other'"),
        ({"fan_in_fan_out": True}, "w: a and b adapt tensors of different shapes"),
    ],
)
def test_adapters_without_a_sum(tmp_path, config, message):
    pair = (torch.ones(1, 4), torch.ones(3, 1))
    write_adapter(tmp_path / "a", {"w": pair}, base_model_name_or_path="org/one")
    write_adapter(tmp_path / "b", {"w": pair}, **{"base_model_name_or_path": "org/one", **config})
    with pytest.raises(MergeError, match=message):
        merge(recipe_of(tmp_path, "concatenation"), tmp_path / "out")


def test_dora_adapters_have_no_sum(tmp_path):
    for name in "ab":
        save_adapter(nn.Sequential(nn.Linear(4, 4)), tmp_path / name, target_modules=["0"], use_dora=True)
    with pytest.raises(MergeError, match="'a' is a DoRA adapter"):
        merge(recipe_of(tmp_path, "concatenation"), tmp_path / "out")


def test_a_public_base_is_kept_and_side_files_go_along(tmp_path):
    pair = (torch.ones(1, 4), torch.ones(3, 1))
    for name in "ab":
        write_adapter(tmp_path / name, {"w": pair}, base_model_name_or_path="org/one", revision="abc")
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"of": name}))
    seen = []
    recipe = recipe_of(tmp_path, "concatenation", files_from="b")
    merge(
        recipe,
        tmp_path / "out",
        fsync=False,
        finish=lambda folder, report: seen.append(sorted(p.name for p in folder.iterdir())),
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/one", "abc")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"of": "b"}
    assert seen == [["adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "tokenizer_config.json"]]
    with pytest.raises(MergeError, match="'out' exists"):
        merge(recipe, tmp_path / "out")


def test_the_shipped_recipe(two):
    recipe = Recipe.load(Path(__file__).parents[2] / "hub_configs" / "recipes" / "adapters.yaml")
    tensors = merge_tensors(recipe, {"runs/lora-caption": two / "a", "runs/lora-vqa": two / "b"})
    assert len(tensors) == 2 * 2 * 7 and all(torch.isfinite(t).all() for t in tensors.values())
    with pytest.raises(MergeError, match="'base_model' belongs to merges of models"):
        Recipe.load({**recipe.to_dict(), "base_model": "runs/base"})


def test_cards_of_adapters_and_of_adapted_models(two, tmp_path):
    report = merge(recipe_of(two, "concatenation"), tmp_path / "out", fsync=False, finish=write_merge_card)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'PeftModel.from_pretrained(base, "out")' in card and "library_name: peft" in card
    assert str(tmp_path) not in card and "rank 7; concatenation is exact" in card
    source = {"role": "a", "label": f"org/base@{'1' * 40}+org/lora@{'2' * 40}", "revision": None, "files": []}
    report.sources = [source, {**source, "role": "b", "label": "base+lora"}]
    text = render(report)
    assert "base_model:\n- org/base\n- org/lora\n" in text and f"`{source['label']}`" in text and "`base+lora`" in text
