"""BEiT weights and seeds as initial weights, against the recorded mappings of the original loader."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hf_vlmerge import VlmoConfig, VlmoForPreTraining
from hf_vlmerge.conversion.beit import convert_beit, initial_weights
from hf_vlmerge.conversion.seed import specialise_folder
from hf_vlmerge.conversion.specialise import specialise
from hf_vlmerge.conversion.vlmo_keys import INDEX_BUFFERS, NAMINGS, UNUSED_PARAMETERS, key_table

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8, "vocab_size": 97, "max_text_length": 12, "num_text_positions": 20, "num_fusion_layers": 2,
}  # fmt: skip
ALL = ["attention", "ffn", "layer_norm"]


def beit(flavour: str, grid: int, prefix: str = "transformer.") -> dict[str, torch.Tensor]:
    """Random weights under the names of the original BEiT files."""
    d, f, layers, heads = 32, 64, 4, 4
    rows = (2 * grid - 1) ** 2 + 3
    norm = "norm" if flavour == "pretrained" else "fc_norm"
    shapes = {
        "cls_token": (1, 1, d), "patch_embed.proj.weight": (d, 3, 8, 8), "patch_embed.proj.bias": (d,),
        f"{norm}.weight": (d,), f"{norm}.bias": (d,), "head.weight": (7, d), "head.bias": (7,),
    }  # fmt: skip
    if flavour == "pretrained":
        shapes |= {"mask_token": (1, 1, d), "rel_pos_bias.relative_position_bias_table": (rows, heads)}
    for i in range(layers):
        block = {
            "gamma_1": (d,), "gamma_2": (d,), "norm1.weight": (d,), "norm1.bias": (d,), "norm2.weight": (d,),
            "norm2.bias": (d,), "attn.q_bias": (d,), "attn.v_bias": (d,), "attn.qkv.weight": (3 * d, d),
            "attn.proj.weight": (d, d), "attn.proj.bias": (d,), "mlp.fc1.weight": (f, d), "mlp.fc1.bias": (f,),
            "mlp.fc2.weight": (d, f), "mlp.fc2.bias": (d,),
        }  # fmt: skip
        if flavour == "finetuned":
            block["attn.relative_position_bias_table"] = (rows, heads)
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(grid)
    return {prefix + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("flavour", ["pretrained", "finetuned"])
@pytest.mark.parametrize("grid", [3, 4])
def test_the_position_table_is_the_original_loaders(flavour, grid, shared):
    golden = load_file(shared / "goldens/vlmo/beit_relative_position.safetensors")
    source = beit(flavour, grid)
    given = {key.split(".in.")[1]: t for key, t in golden.items() if key.startswith(f"{flavour}.grid{grid}.in.")}
    assert set(given) <= set(source)
    table = initial_weights(source | given, VlmoConfig(**SIZES, expert_modules=[]))[
        "encoder.relative_position_bias_table"
    ]
    expected = golden[f"{flavour}.grid{grid}.out.relative_position_bias_table"]
    torch.testing.assert_close(table, expected, atol=1e-6, rtol=0)
    assert not table[49 + 3 :].any()


@pytest.mark.parametrize(
    ("case", "flavour", "grid", "expert_modules"),
    [
        ("beit_pretrained.grid4.to_maa", "pretrained", 4, []),
        ("beit_pretrained.grid3.to_maa", "pretrained", 3, []),
        ("beit_finetuned.grid4.to_maa", "finetuned", 4, []),
        ("beit_finetuned.grid3.to_maa", "finetuned", 3, []),
        ("beit_finetuned.grid4.to_msa.copied_to_all_modalities", "finetuned", 4, ALL),
        ("beit_finetuned.grid4.to_msa", "finetuned", 4, ALL),
        ("beit_finetuned.grid4.to_custom_attn.copied_to_all_modalities", "finetuned", 4, ["attention"]),
        ("beit_finetuned.grid4.to_custom_ln.copied_to_all_modalities", "finetuned", 4, ["layer_norm"]),
    ],
)
def test_each_tensor_goes_where_the_original_loader_puts_it(case, flavour, grid, expert_modules, shared):
    golden = json.loads((shared / "goldens/vlmo/goldens.json").read_text())["loading"][case]
    source = beit(flavour, grid)
    config = VlmoConfig(**SIZES, expert_modules=expert_modules)
    copied = case != "beit_finetuned.grid4.to_msa"
    ours = initial_weights(source, config, vision_weights_for_all=copied)
    table = key_table("pretraining", NAMINGS["research"], expert_modules, 4, 2)
    loaded = {
        theirs: ours[key.removeprefix("vlmo.")] for theirs, key in table.items() if key.removeprefix("vlmo.") in ours
    }
    assert set(table) - set(loaded) == set(golden["missing"]) - set(INDEX_BUFFERS) - set(UNUSED_PARAMETERS)
    for new, old in golden.get("mapping_new_from_old", {}).items():
        if new in loaded and old != "<computed>":
            assert torch.equal(loaded[new], source[old]), new


@pytest.mark.parametrize("expert_modules", [ALL, ["attention"], ["layer_norm"]])
def test_a_seed_goes_where_the_original_loader_puts_it(expert_modules, shared):
    golden = json.loads((shared / "goldens/vlmo/goldens.json").read_text())["loading"]["seed_maa_to_msa"]
    source = load_file(shared / "goldens/vlmo/maa.state_dict.safetensors")
    seed_table = key_table("pretraining", NAMINGS["research"], [], 4, 2)
    seed = {ours: source[theirs] for theirs, ours in seed_table.items()}
    made = specialise(seed, expert_modules, 2)
    table = key_table("pretraining", NAMINGS["research"], expert_modules, 4, 2)
    assert set(made) == set(table.values())
    for theirs, ours in table.items():
        old = golden["mapping_new_from_old"].get(theirs, theirs)
        assert torch.equal(made[ours], source[old]), theirs


@pytest.mark.parametrize("names", ["files", "modules"])
@pytest.mark.parametrize("flavour", ["pretrained", "finetuned"])
def test_transformers_names_give_the_weights_of_the_original_files(flavour, names):
    source = beit(flavour, 4, prefix="")
    theirs = {}
    for key, tensor in source.items():
        theirs.update(transformers_name(key, tensor, names))
    config = VlmoConfig(**SIZES, expert_modules=[])
    ours, expected = initial_weights(theirs, config), initial_weights(source, config)
    assert set(ours) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(ours[key], tensor), key


def transformers_name(key: str, tensor: torch.Tensor, names: str) -> dict[str, torch.Tensor]:
    """The tensor under the name that `transformers` gives it in its files or in its modules."""
    block, attention, out = ("encoder.layer", "attention.attention.", "attention.output.dense")
    q, k, v, table = "query", "key", "value", "attention.attention.relative_position_bias"
    fc1, fc2, shared = "intermediate.dense", "output.dense", "encoder.relative_position_bias"
    if names == "modules":
        block, attention, out = "layers", "attention.", "attention.o_proj"
        q, k, v, table = "q_proj", "k_proj", "v_proj", "relative_position_bias"
        fc1, fc2, shared = "mlp.fc1", "mlp.fc2", "shared_position_bias"
    renames = {
        "attn.q_bias": f"{attention}{q}.bias", "attn.v_bias": f"{attention}{v}.bias", "attn.proj": out,
        "attn.relative_position_bias_table": f"{table}.relative_position_bias_table", "mlp.fc1": fc1, "mlp.fc2": fc2,
        "gamma_": "lambda_", "norm1": "layernorm_before", "norm2": "layernorm_after", "blocks": f"beit.{block}",
        "fc_norm": "beit.pooler.layernorm", "rel_pos_bias": f"beit.{shared}", "cls_token": "beit.embeddings.cls_token",
        "mask_token": "beit.embeddings.mask_token", "patch_embed.proj": "beit.embeddings.patch_embeddings.projection",
        "head.": "classifier.",
    }  # fmt: skip
    key = key.replace("norm.", "layernorm.") if key.startswith("norm.") else key
    for old, new in renames.items():
        key = key.replace(old, new)
    if "attn.qkv" not in key:
        return {key: tensor}
    parts = (f"{attention}{part}" for part in (q, k, v))
    return {key.replace("attn.qkv", part): rows for part, rows in zip(parts, tensor.chunk(3), strict=True)}


def test_convert_beit_writes_a_model_that_loads(tmp_path):
    torch.save({"model": beit("finetuned", 3, prefix="")}, tmp_path / "beit.pth")
    report = convert_beit(tmp_path / "beit.pth", tmp_path / "init", expert_modules=["ffn"], image_size=32)
    model, info = VlmoForPreTraining.from_pretrained(tmp_path / "init", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.image_size == 32
    assert model.config.expert_modules == ["ffn"]
    layer = model.vlmo.encoder.layers[3]
    assert torch.equal(layer.ffn["vision_language"].fc1.weight, layer.ffn["vision"].fc1.weight)
    assert set(report.dropped) == {"head.weight", "head.bias"}
    assert all(not key.startswith("vlmo.encoder") for key in report.fresh)
    again = convert_beit(tmp_path / "beit.pth", tmp_path / "again", expert_modules=["ffn"], image_size=32)
    assert again.fresh == report.fresh
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "init" / weights).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"pos_embed": torch.zeros(1)}), "'pos_embed' is not one of BEiT's"),
        (lambda s: s.pop("blocks.2.gamma_1"), r"nothing for 'encoder\.layers\.2\.layer_scale_1'"),
        (lambda s: s.pop("patch_embed.proj.weight"), "not a BEiT checkpoint"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(change, message, tmp_path):
    source = beit("finetuned", 3, prefix="")
    change(source)
    torch.save(source, tmp_path / "beit.pth")
    with pytest.raises(ValueError, match=message):
        convert_beit(tmp_path / "beit.pth", tmp_path / "init")


def test_a_seed_folder_becomes_a_specific_folder(tmp_path):
    torch.save(beit("pretrained", 3, prefix=""), tmp_path / "beit.pth")
    convert_beit(tmp_path / "beit.pth", tmp_path / "seed")
    specialise_folder(tmp_path / "seed", tmp_path / "specific", ["attention", "ffn", "layer_norm"])
    model, info = VlmoForPreTraining.from_pretrained(tmp_path / "specific", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.expert_modules == ["attention", "ffn", "layer_norm"]
    assert (tmp_path / "specific/preprocessor_config.json").is_file()
