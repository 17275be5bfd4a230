"""Git re-basin: the tables of permutations keep what models compute, and matching finds permutations again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_vlmerge import VlmoConfig, VlmoForPreTraining
from hf_vlmerge.merging import ExpertLayout, MergeError, Recipe, merge, open_source, save_checkpoint
from hf_vlmerge.merging.alignment import Matching, align, align_experts
from hf_vlmerge.merging.matching import HeadMatcher, HeadSimilarity, best
from hf_vlmerge.merging.permutations import Blocks, attention_blocks, ffn_blocks, residual_block
from hf_vlmerge.merging.tensors.permuted import PermutedSource
from hf_vlmerge.merging.tensors.sources import DictSource
from tests.merging.test_vlmo import TINY, VARIANTS, batch, load, noisy, outputs  # noqa: F401 - batch is a fixture

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
IMAGE = {"image_size": 16, "patch_size": 8}
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1]])
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


def vlmo(modules=("attention", "ffn", "layer_norm"), **more):
    return VlmoForPreTraining(VlmoConfig(**{**TINY, "num_attention_heads": 4, **more}, expert_modules=list(modules)))


def bart():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 20}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
    return transformers.BartModel(transformers.BartConfig(vocab_size=31, max_position_embeddings=12, **sizes, **heads))


def t5():
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=31)
    return transformers.T5Model(config)


def gpt2():
    config = transformers.GPT2Config(n_embd=16, n_inner=24, n_layer=2, n_head=4, vocab_size=31, n_positions=12)
    return transformers.GPT2LMHeadModel(config)


def llama(cls="Llama", **more):
    sizes = {**SIZES, "hidden_size": 32, "num_key_value_heads": 2, "vocab_size": 31, "head_dim": 8, **more}
    return getattr(transformers, f"{cls}ForCausalLM")(getattr(transformers, f"{cls}Config")(**sizes))


def clip():
    text = {**SIZES, "vocab_size": 31, "max_position_embeddings": 12, "eos_token_id": 1}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config={**SIZES, **IMAGE}, projection_dim=8)
    )


def of(name, **more):
    return lambda: getattr(transformers, name)(
        getattr(transformers, name.partition("For")[0].removesuffix("Model") + "Config")(**{**SIZES, **more})
    )


DECODER = {"decoder_input_ids": IDS}
MODELS = {  # make, inputs, whether a table covers its residual stream
    "vit": (of("ViTForImageClassification", **IMAGE), {"pixel_values": PIXELS}, True),
    "beit": (
        of("BeitForImageClassification", **IMAGE, use_relative_position_bias=True),
        {"pixel_values": PIXELS},
        True,
    ),
    "dinov2": (of("Dinov2Model", **IMAGE), {"pixel_values": PIXELS}, False),
    "bert": (of("BertForMaskedLM", vocab_size=31), {"input_ids": IDS}, True),
    "bert, classifier": (of("BertForSequenceClassification", vocab_size=31), {"input_ids": IDS}, True),
    "bert, tokens": (of("BertForTokenClassification", vocab_size=31), {"input_ids": IDS}, True),
    "llama": (llama, {"input_ids": IDS}, True),
    "llama, biases": (lambda: llama(attention_bias=True, mlp_bias=True), {"input_ids": IDS}, True),
    "qwen3": (lambda: llama("Qwen3"), {"input_ids": IDS}, True),
    "clip": (clip, {"input_ids": IDS, "pixel_values": PIXELS}, False),
    "bart": (bart, {"input_ids": IDS, **DECODER}, False),
    "t5": (t5, {"input_ids": IDS, **DECODER}, False),
    "gpt2": (gpt2, {"input_ids": IDS}, False),
}


class Shuffle(Matching):
    """Draws a valid order for every block in place of finding the best one."""

    def __init__(self, source, blocks, seed):
        super().__init__(source, source, blocks, lambda key: key)
        self.random = np.random.default_rng(seed)
        for block in self.blocks:
            draw = self.ordered_heads(block) if hasattr(block, "heads") else self.ordered_units(block, block.slots)
            self.orders |= draw

    def similarity(self, slots, size):
        return self.random.standard_normal((size, size))


def blocks_of(source, residual):
    found = [*ffn_blocks(source).found, *attention_blocks(source).found]
    return Blocks([*found, *([residual_block(source)] if residual else [])], [])


def permuted_copy(folder, seed=0, residual=False):
    """The tensors of a model with all units in another order."""
    source = open_source(folder)
    shuffle = Shuffle(source, blocks_of(source, residual), seed)
    view = PermutedSource(source, shuffle.permutations())
    return {key: view[key] for key in view}, source


def saved_copy(folder, copy, **more):
    tensors, source = permuted_copy(folder, **more)
    save_checkpoint(copy, tensors, config=source.config, fsync=False)
    return copy


@torch.no_grad()
def logits(model, inputs):
    result = model.eval()(**inputs)
    return result.logits if hasattr(result, "logits") else result[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {}, tmp_path_factory


def saved(folders, name):
    """A tiny model with noise on all of its parameters, saved once."""
    known, factory = folders
    if name not in known:
        torch.manual_seed(5)
        folder = factory.mktemp("model") / "model"
        noisy_parameters(MODELS[name][0]()).save_pretrained(folder)
        known[name] = folder
    return known[name]


def noisy_parameters(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def cases():
    for name, (_, _, covered) in MODELS.items():
        yield pytest.param(name, False, id=name)
        if covered:
            yield pytest.param(name, True, id=f"{name}, residual")


@pytest.mark.parametrize(("name", "residual"), list(cases()))
def test_a_permuted_copy_computes_the_same_and_is_found_again(folders, tmp_path, name, residual):
    make, inputs, _ = MODELS[name]
    folder = saved(folders, name)
    copy = saved_copy(folder, tmp_path / "copy", seed=1, residual=residual)
    original, other = (type(make()).from_pretrained(path) for path in (folder, copy))
    torch.testing.assert_close(logits(other, inputs), logits(original, inputs), rtol=0, atol=3e-5)
    source = open_source(folder)
    moved = [k for k, v in open_source(copy).items() if not v.equal(source[k])]
    assert len(moved) >= len(source) / 4
    alignment = align(copy, folder, blocks=("ffn", "attention", *(("residual",) if residual else ())))
    view = alignment.view(open_source(copy))
    assert all(view[key].equal(source[key]) for key in source)
    assert all(b.after == 0 for b in alignment.blocks) and any(b.before > 0.1 for b in alignment.blocks)


def test_the_tables_know_what_is_free(folders):
    def freedom(name):
        blocks = attention_blocks(open_source(saved(folders, name))).found
        return {(b.free_heads, b.free_qk, b.free_vo) for b in blocks}

    assert freedom("vit") == freedom("bert") == freedom("bart") == freedom("gpt2") == {(True, True, True)}
    assert freedom("llama") == {(True, False, True)}  # rotary positions pair up query-key dimensions
    assert freedom("t5") == {(False, True, True), (True, True, True)}  # a table of positions numbers the heads
    llama_blocks = attention_blocks(open_source(saved(folders, "llama"))).found
    assert {(b.heads, b.groups) for b in llama_blocks} == {(4, 2)}


def test_what_no_table_knows_stays_as_it_is():
    tensors = {
        "mlp.fc1.weight": torch.randn(6, 4), "mlp.fc2.weight": torch.randn(4, 6), "mlp.norm.weight": torch.randn(6),
        "self_attn.q_proj.weight": torch.randn(4, 4), "self_attn.k_proj.weight": torch.randn(4, 4),
        "self_attn.v_proj.weight": torch.randn(4, 4), "self_attn.out_proj.weight": torch.randn(4, 4),
    }  # fmt: skip
    source = open_source(tensors)
    assert ffn_blocks(source).left == ["mlp: mlp.norm.weight is not in the table of FFNs; its units keep their order"]
    assert attention_blocks(source).left[0].startswith("self_attn: the number of heads is not in config.json")
    assert not attention_blocks(source, heads=2).found[0].free_qk  # without a config positions may be rotary
    with pytest.raises(MergeError, match="the residual stream of memory is in no table"):
        align(tensors, tensors, blocks=("residual",))
    with pytest.raises(MergeError, match=r"nothing of memory is described by a table \(mlp: mlp\.norm"):
        align(tensors, tensors, blocks=("ffn",))


# VLMo


def saved_vlmo(folder, modules, seed=5, **more):
    torch.manual_seed(seed)
    model = vlmo(modules, **more)
    torch.nn.init.normal_(model.vlmo.encoder.relative_position_bias_table, std=0.5)
    noisy_parameters(noisy(model)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("residual", [False, True], ids=["blocks", "residual"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_permuted_copy_of_a_vlmo(tmp_path, variant, residual, batch):  # noqa: F811
    folder = saved_vlmo(tmp_path / "model", VARIANTS[variant])
    copy = saved_copy(folder, tmp_path / "copy", seed=2, residual=residual)
    for ours, theirs in zip(outputs(load(copy), batch), outputs(load(folder), batch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    blocks = ["ffn", "attention", *(["residual"] if residual else [])]
    models = [{"model": str(folder), "alias": "a"}, {"model": str(copy), "alias": "b"}]
    recipe = {"merge_method": "linear", "models": models, "align": {"to": "a", "blocks": blocks}}
    report = merge(recipe, tmp_path / "merged", progress=False, fsync=False)
    source, merged = open_source(folder), open_source(tmp_path / "merged")
    assert all(merged[key].equal(source[key]) for key in source)
    assert report.counts == {"merged": 0, "copied": 0, "equal": len(source)}
    assert any(note.startswith("b aligned to a: attention: ") and note.endswith("to 0") for note in report.notes)


def test_the_merge_of_a_vit_and_its_permuted_copy_is_the_vit(folders, tmp_path):
    folder = saved(folders, "vit")
    copy = saved_copy(folder, tmp_path / "copy", residual=True)
    models = [{"model": str(folder), "alias": "a"}, {"model": str(copy), "alias": "b"}]
    align_to = {"to": "a", "blocks": ["ffn", "attention", "residual"]}
    merge(
        {"merge_method": "slerp", "models": models, "align": align_to}, tmp_path / "merged", progress=False, fsync=False
    )
    source, merged = open_source(folder), open_source(tmp_path / "merged")
    assert all(merged[key].equal(source[key]) for key in source)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["num_attention_heads"] == 4
    plain = {"merge_method": "linear", "models": models}
    merge(plain, tmp_path / "plain", progress=False, fsync=False)
    assert not open_source(tmp_path / "plain")["vit.encoder.layer.0.intermediate.dense.weight"].equal(
        source["vit.encoder.layer.0.intermediate.dense.weight"]
    )


def test_experts_are_matched_inside_one_model(tmp_path, batch):  # noqa: F811
    """A model whose vision experts are renumbered language experts: aligned, the FFNs and lower attention are equal."""
    source = open_source(saved_vlmo(tmp_path / "model", VARIANTS["modality_specific"]))
    tensors = dict(source)
    for key in source:
        if ".vision." in key:
            tensors[key] = source[key.replace(".vision.", ".language.")].clone()
    save_checkpoint(tmp_path / "twins", tensors, config=source.config, fsync=False)
    twins = open_source(tmp_path / "twins")
    own = [b for find in (ffn_blocks, lambda s: attention_blocks(s, between_experts=True)) for b in find(twins).found]
    shuffled = Shuffle(twins, Blocks([b for b in own if ".vision" in b.label], []), 3)
    save_checkpoint(
        tmp_path / "model2", PermutedSource(twins, shuffled.permutations()), config=source.config, fsync=False
    )
    for ours, theirs in zip(
        outputs(load(tmp_path / "model2"), batch), outputs(load(tmp_path / "twins"), batch), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)

    layout = ExpertLayout.from_dict(source.config["expert_layout"], "layout")
    alignment = align_experts(tmp_path / "model2", layout, "language")
    view = alignment.view(open_source(tmp_path / "model2"))
    found = [key for key in twins if ".vision_language." not in key]
    assert all(view[key].equal(twins[key]) for key in found)  # the table of positions came along
    assert {b.kind for b in alignment.blocks} == {"ffn", "attention"}
    assert all(b.after == 0 for b in alignment.blocks if ".vision." in f"{b.label}." and "_language" not in b.label)
    assert any("share the table of positions" in line for line in alignment.left)

    recipe = {"merge_method": "linear", "experts_of": str(tmp_path / "model2"), "align": {"to": "language"}}
    recipe["rules"] = [{"match": "*", "has": "vision", "members": ["vision", "language"]}]
    merge(recipe, tmp_path / "merged", progress=False, fsync=False)
    merged = open_source(tmp_path / "merged")
    for key in merged:
        expected = key.replace(".shared.", ".language.")
        assert merged[key].equal(twins[expected])


def test_an_aligned_vlmo_computes_what_it_did(tmp_path, batch):  # noqa: F811
    folder = saved_vlmo(tmp_path / "model", VARIANTS["modality_specific"])
    source = open_source(folder)
    layout = ExpertLayout.from_dict(source.config["expert_layout"], "layout")
    alignment = align_experts(source, layout, "language")
    save_checkpoint(tmp_path / "view", alignment.view(source), config=source.config, fsync=False)
    for ours, theirs in zip(outputs(load(tmp_path / "view"), batch), outputs(load(folder), batch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert all(b.after < b.before for b in alignment.blocks if b.moved)
    lower = [b for b in alignment.blocks if b.kind == "attention" and "layers.0" in b.label]
    assert lower and lower[0].moved


def test_experts_that_attend_to_each_other_keep_their_heads(tmp_path):
    folder = saved_vlmo(tmp_path / "model", VARIANTS["modality_specific"], joint_attention_in_lower_layers=True)
    left = attention_blocks(open_source(folder)).left
    assert left[0] == "vlmo.encoder.layers.0.attention: its experts attend to each other; their heads keep their order"


def test_experts_are_matched_to_a_seed(tmp_path):
    folder = saved_vlmo(tmp_path / "model", VARIANTS["modality_specific"])
    seed = saved_vlmo(tmp_path / "seed", [], seed=6)
    recipe = {
        "merge_method": "modality_arithmetic",
        "experts_of": str(folder),
        "base_model": str(seed),
        "align": "base",
    }
    report = merge(recipe, tmp_path / "merged", progress=False, fsync=False)
    assert any(note.startswith("experts aligned to base: ffn: 7 of 7 blocks renumbered") for note in report.notes)
    blocks = report.to_dict()["sources"][0]["alignment"]["blocks"]
    assert len(blocks) == 14 and all(block["after"] <= block["before"] for block in blocks)
    recipe.pop("base_model")
    with pytest.raises(MergeError, match="align: to: base, but the recipe has no base_model"):
        merge({**recipe, "merge_method": "linear"}, tmp_path / "other")
    with pytest.raises(MergeError, match="there is no expert 'langauge'; did you mean 'language'"):
        merge({**recipe, "merge_method": "linear", "align": "langauge"}, tmp_path / "other")


def test_the_shipped_recipe(tmp_path):
    folder = saved_vlmo(tmp_path / "model", VARIANTS["modality_specific"])
    recipe = Recipe.load(Path(__file__).parents[2] / "hub_configs" / "recipes" / "interpolation_aligned.yaml")
    report = merge(recipe.map_sources(lambda _: str(folder)), tmp_path / "out", progress=False, fsync=False)
    load(tmp_path / "out")
    assert any(note.startswith("experts aligned to language: attention: ") for note in report.notes)


# Independent models


def test_matching_of_independent_models_gains_and_says_so(tmp_path):
    folders = [saved_vlmo(tmp_path / str(seed), [], seed=seed) for seed in (1, 2)]
    alignment = align(folders[1], folders[0])
    again = align(folders[1], folders[0])
    assert alignment.to_dict() == again.to_dict()  # deterministic
    assert all(b.after < b.before for b in alignment.blocks)
    assert len(alignment.blocks) == 6 and alignment.table().count("\n") == 6
    lines = alignment.summary()
    assert lines[0].startswith("ffn: 3 of 3 blocks renumbered; mean distance from 1.")
    original = open_source(folders[1])
    assert alignment.view(original)["vlmo.pooler.dense.weight"].equal(original["vlmo.pooler.dense.weight"])
    more = align(folders[1], folders[0], blocks=("ffn", "attention", "residual"))
    reference = open_source(folders[0])

    def apart(view):
        return sum((view[key] - reference[key]).square().sum().item() for key in reference)

    assert more.passes > 1
    assert apart(more.view(original)) < apart(alignment.view(original)) < apart(original)


def test_a_base_is_aligned_too(tmp_path):
    """Task vectors are differences of models whose units correspond."""
    folder = saved_vlmo(tmp_path / "a", [])
    copy = saved_copy(folder, tmp_path / "b")
    base = saved_copy(folder, tmp_path / "base", seed=4)
    models = [{"model": str(folder)}, {"model": str(copy)}]
    recipe = {"merge_method": "task_arithmetic", "models": models, "base_model": str(base), "align": "a"}
    report = merge(recipe, tmp_path / "out", progress=False, fsync=False)
    source, merged = open_source(folder), open_source(tmp_path / "out")
    assert all(merged[key].equal(source[key]) for key in source)
    assert {note.partition(" ")[0] for note in report.notes if "aligned to a" in note} == {"base", "b"}


def test_a_model_may_be_matched_with_a_part_of_a_larger_one(folders):
    """Only what both have moves; the report says what had no counterpart."""
    source = open_source(saved(folders, "llama"))
    part = DictSource({k: v for k, v in source.items() if ".layers.1." not in k}, "part", source.config)
    alignment = align(source, part)
    assert {b.label for b in alignment.blocks} == {"model.layers.0.mlp", "model.layers.0.self_attn"}
    assert alignment.left[0].startswith("model.layers.1.mlp: part has no model.layers.1.mlp.gate_proj.weight")


# The assignment itself


def test_heads_and_dimensions_are_found_at_once():
    """A head's best place depends on the best order of its dimensions: two heads, two dimensions, by hand."""
    a = np.array([[5.0, 0], [0, 1], [0, 2], [3, 0]])  # rows: head 0 (2 dimensions), head 1
    b = a[[3, 2, 0, 1]]  # heads exchanged, and within the second of them the dimensions too
    zero = np.zeros((4, 4))
    similarity = HeadSimilarity(a @ b.T, zero, zero, zero)
    matcher = HeadMatcher(2, 2, [similarity], np.zeros((2, 2)), heads_free=True, qk=True, vo=True)
    (order,), heads = matcher.solve()
    assert heads.tolist() == [1, 0] and (b[order.q] == a).all()
    fixed = HeadMatcher(2, 2, [similarity], np.zeros((2, 2)), heads_free=False, qk=False, vo=True).solve()
    assert fixed[1].tolist() == [0, 1] and fixed[0][0].q.tolist() == [0, 1, 2, 3]


def test_the_best_order_has_the_largest_total():
    assert best(np.array([[1.0, 5.0, 0.0], [4.0, 5.0, 0.0], [0.0, 0.0, 1.0]])).tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "c"}, "align: to: 'c' is neither 'base' nor a member"),
        ({"to": "a", "blocks": ["heads"]}, "align: blocks can be ffn or attention or residual, not 'heads'"),
        ({"to": "a", "heads": 0}, "heads must be a positive number"),
        ({"too": "a"}, "unknown key 'too'"),
    ],
)
def test_options_that_are_refused(options, message):
    recipe = {"merge_method": "linear", "models": ["a", "b"], "align": options}
    with pytest.raises(MergeError, match=message):
        merge(recipe, None, dry_run=True)


def test_models_of_other_shapes_are_refused(tmp_path):
    one, other = saved_vlmo(tmp_path / "one", []), saved_vlmo(tmp_path / "other", [], intermediate_size=20)
    with pytest.raises(MergeError, match=r"fc1\.weight has shape \(20, 16\), and \(24, 16\) in one"):
        align(other, one)
