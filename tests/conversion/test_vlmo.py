"""Checkpoints of the released research code and of Microsoft's VLMo, to our layout and back."""

import json
import os
import subprocess
import sys
import textwrap
import types

import pytest
import torch
from safetensors.torch import load_file

from hf_vlmerge import VlmoConfig, VlmoForPreTraining
from hf_vlmerge.conversion.convert_vlmo_to_hf import convert_to_hf, convert_to_original, plan_conversion
from hf_vlmerge.conversion.vlmo_keys import (
    CLASSES,
    HEADS,
    INDEX_BUFFERS,
    NAMINGS,
    UNUSED_PARAMETERS,
    key_table,
)
from hf_vlmerge.conversion.write import make_fresh

VARIANTS = {
    "msa": ["attention", "ffn", "layer_norm"],
    "custom_attn": ["attention"],
    "custom_ffn": ["ffn"],
    "custom_ln": ["layer_norm"],
    "maa": [],
}
TINY = {
    "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12,
    "image_size": 16, "patch_size": 8, "max_text_length": 5, "num_text_positions": 6, "num_fusion_layers": 1,
}  # fmt: skip


def save_lightning(tensors: dict, path) -> None:
    """The layout of a Lightning file: weights under `state_dict`, and hyper-parameters of a class the reader lacks."""
    module = types.ModuleType("package_that_is_not_here")
    module.Settings = type("Settings", (), {"__module__": module.__name__})
    sys.modules[module.__name__] = module
    settings = module.Settings()
    settings.image_size = 224
    content = {"epoch": 3, "global_step": 10, "state_dict": tensors, "hyper_parameters": {"config": settings}}
    try:
        torch.save(content, path)
    finally:
        del sys.modules[module.__name__]


@pytest.fixture
def tiny_folder(tmp_path):
    def make(expert_modules):
        torch.manual_seed(0)
        model = VlmoForPreTraining(VlmoConfig(**TINY, expert_modules=expert_modules))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        model.save_pretrained(tmp_path / "ours")
        return tmp_path / "ours", model

    return make


@pytest.mark.parametrize("variant", ["msa", "maa", "custom_attn", "custom_ln"])
def test_a_released_checkpoint_goes_there_and_back(variant, shared, tmp_path):
    original = load_file(shared / f"goldens/vlmo/{variant}.state_dict.safetensors")
    save_lightning(original, tmp_path / "original.ckpt")
    report = convert_to_hf(tmp_path / "original.ckpt", tmp_path / "ours")
    _, info = VlmoForPreTraining.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    config = json.loads((tmp_path / "ours/config.json").read_text())
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_fusion_layers": 2, "num_attention_heads": 4}
    sizes |= {"image_size": 32, "patch_size": 8, "max_text_length": 12, "num_text_positions": 20, "vocab_size": 97}
    assert {name: config[name] for name in sizes} == sizes
    assert config["expert_modules"] == VARIANTS[variant]

    unused = {*UNUSED_PARAMETERS, *(key for key in original if key.startswith("vqa_classifier"))}
    assert set(report.dropped) == unused | set(INDEX_BUFFERS)
    assert report.converted == len(original) - len(report.dropped)

    back = convert_to_original(tmp_path / "ours", tmp_path / "back.ckpt")
    restored = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert set(back.dropped) == set(UNUSED_PARAMETERS)
    assert set(original) - set(restored) == unused
    assert set(restored) <= set(original)
    for key, tensor in restored.items():  # index buffers too
        assert tensor.dtype == original[key].dtype, key
        assert torch.equal(tensor, original[key]), key


@pytest.mark.parametrize("head", ["vqa", "retrieval", "base"])
def test_another_head_of_the_same_checkpoint(head, shared, tmp_path):
    original = load_file(shared / "goldens/vlmo/msa.state_dict.safetensors")
    save_lightning(original, tmp_path / "original.ckpt")
    report = convert_to_hf(tmp_path / "original.ckpt", tmp_path / "ours", head=head)
    import hf_vlmerge

    model, info = getattr(hf_vlmerge, CLASSES[head]).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert report.dropped["itm_score.fc.bias"] == "belongs to another head"
    if head == "vqa":
        assert model.config.num_labels == 13
        assert torch.equal(model.classifier.decoder.bias, original["vqa_classifier.3.bias"])


def test_a_converted_checkpoint_gives_the_original_outputs(shared, tmp_path):
    golden = shared / "goldens/vlmo"
    save_lightning(load_file(golden / "custom_ln.state_dict.safetensors"), tmp_path / "original.ckpt")
    convert_to_hf(tmp_path / "original.ckpt", tmp_path / "ours", joint_attention_in_lower_layers=True)
    model = VlmoForPreTraining.from_pretrained(tmp_path / "ours").eval()
    inputs, outputs = load_file(golden / "inputs.safetensors"), load_file(golden / "custom_ln.outputs.safetensors")
    with torch.no_grad():
        ours = model(inputs["text_ids"], inputs["pixel_values"], inputs["text_masks"])
    torch.testing.assert_close(ours.logits_per_image, outputs["itc.logits_per_image"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize(
    ("name", "head"), [("pretrain224", "pretraining"), ("vqa480", "vqa"), ("coco384", "retrieval")]
)
def test_every_key_of_the_full_size_checkpoints_has_its_place(variant, name, head, shared):
    listed = json.loads((shared / "goldens/vlmo/full_size_keys.json").read_text())["keys"][variant][name]
    shapes = {}
    for key, (shape, _, *blocks) in listed.items():
        first, last = (int(i) for i in blocks[0].removeprefix("i=").split("..")) if blocks else (0, 0)
        shapes.update({key.replace("<i>", str(i)): tuple(shape) for i in range(first, last + 1)})
    plan = plan_conversion(shapes)
    assert plan.head == head
    assert set(plan.table) | set(plan.dropped) == set(shapes)
    assert not set(plan.table) & set(plan.dropped)
    assert set(plan.dropped) <= set(UNUSED_PARAMETERS) | set(INDEX_BUFFERS)
    config = plan.config
    assert (config.num_hidden_layers, config.num_fusion_layers, config.num_attention_heads) == (12, 2, 12)
    assert (config.hidden_size, config.intermediate_size, config.num_text_positions) == (768, 3072, 196)
    assert config.image_size == int(name[-3:])
    assert config.expert_modules == VARIANTS[variant]


@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize("expert_modules", VARIANTS.values())
def test_the_tables_name_exactly_the_tensors_of_each_model(head, expert_modules):
    config = VlmoConfig(**TINY, expert_modules=expert_modules)
    for naming in NAMINGS.values():
        table = key_table(head, naming, expert_modules, config.num_hidden_layers, config.num_fusion_layers)
        assert len(set(table.values())) == len(table)
        assert set(table.values()) == set(make_fresh(CLASSES[head], config, seed=None))


def test_microsofts_naming_goes_there_and_back(tiny_folder, tmp_path):
    folder, model = tiny_folder(["ffn"])
    convert_to_original(folder, tmp_path / "microsoft.pt", naming="microsoft")
    state = torch.load(tmp_path / "microsoft.pt", weights_only=True)["state_dict"]
    block = {key.removeprefix("transformer.blocks.2.") for key in state if key.startswith("transformer.blocks.2.")}
    assert block == {
        "gamma_1", "gamma_2", "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.q_bias", "attn.v_bias",
        "attn.proj.weight", "attn.proj.bias", "norm2_text.weight", "norm2_text.bias", "norm2_imag.weight",
        "norm2_imag.bias", "norm2_vl.weight", "norm2_vl.bias", "mlp_text.fc1.weight", "mlp_text.fc1.bias",
        "mlp_text.fc2.weight", "mlp_text.fc2.bias", "mlp_imag.fc1.weight", "mlp_imag.fc1.bias", "mlp_imag.fc2.weight",
        "mlp_imag.fc2.bias", "mlp_vl.fc1.weight", "mlp_vl.fc1.bias", "mlp_vl.fc2.weight", "mlp_vl.fc2.bias",
    }  # fmt: skip
    assert "itc_text_proj.fc.weight" in state
    assert not set(INDEX_BUFFERS) & set(state)
    report = convert_to_hf(tmp_path / "microsoft.pt", tmp_path / "again", num_text_positions=6)
    again = VlmoForPreTraining.from_pretrained(tmp_path / "again")
    assert again.config.joint_attention_in_lower_layers
    assert again.config.expert_modules == ["ffn"]
    assert not report.dropped
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update({"transformer.blocks.0.attn.v.k_bias": torch.zeros(8)}),
            "'transformer.blocks.0.attn.v.k_bias'",
        ),
        (lambda s: s.pop("transformer.norm.bias"), "'transformer.norm.bias' is missing"),
        (lambda s: s.pop("text_embeddings.word_embeddings.weight"), "not a VLMo checkpoint"),
        (
            lambda s: s.update({"pooler.dense.bias": torch.zeros(9)}),
            r"pooler.dense.bias has shape \(9,\).* need \(8,\)",
        ),
        (lambda s: s.pop("relative_position_index"), "--num-text-positions"),
        (lambda s: [s.pop(k) for k in list(s) if ".mlp." in k], "not a VLMo checkpoint: .*mlp.fc1.weight' is missing"),
        (
            lambda s: s.update({"relative_position_bias_table": torch.zeros(9)}),
            r"'relative_position_bias_table' has shape \(9,\), not 2 axes",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_key(change, message, tiny_folder, tmp_path):
    folder, _ = tiny_folder(VARIANTS["msa"])
    convert_to_original(folder, tmp_path / "original.ckpt")
    state = torch.load(tmp_path / "original.ckpt", weights_only=True)["state_dict"]
    change(state)
    save_lightning(state, tmp_path / "changed.ckpt")
    with pytest.raises(ValueError, match=message):
        convert_to_hf(tmp_path / "changed.ckpt", tmp_path / "ours2")
    assert not (tmp_path / "ours2").exists()


def test_wrong_arguments_are_named(tiny_folder, tmp_path):
    folder, _ = tiny_folder([])
    with pytest.raises(ValueError, match="naming is 'msft'; expected research or microsoft"):
        convert_to_original(folder, tmp_path / "x.ckpt", naming="msft")
    report = convert_to_original(folder, tmp_path / "x.ckpt")
    assert "recomputed: relative_position_index" in report.text()
    with pytest.raises(FileExistsError, match="exists"):
        convert_to_original(folder, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="head is 'vqqa'; expected auto"):
        convert_to_hf(tmp_path / "x.ckpt", tmp_path / "y", head="vqqa")
    with pytest.raises(ValueError, match=r"no vqa head: 'vqa_classifier\.0\.weight' is missing"):
        convert_to_hf(tmp_path / "x.ckpt", tmp_path / "y", head="vqa")
    assert convert_to_hf(tmp_path / "x.ckpt", tmp_path / "y", num_fusion_layers=1).config["num_fusion_layers"] == 1


def test_a_malicious_checkpoint_is_refused_and_nothing_in_it_runs(tmp_path):
    witness = tmp_path / "witness"

    class Malicious:
        def __reduce__(self):
            return (open, (str(witness), "w"))

    torch.save({"state_dict": {"pooler.dense.bias": torch.zeros(2)}, "x": Malicious()}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError):
        convert_to_hf(tmp_path / "bad.ckpt", tmp_path / "out")
    assert not witness.exists()
    assert not (tmp_path / "out").exists()


def test_the_way_back_makes_its_folder(tiny_folder, tmp_path):
    folder, _ = tiny_folder([])
    convert_to_original(folder, tmp_path / "new/deeper/x.ckpt")
    assert os.listdir(tmp_path / "new/deeper") == ["x.ckpt"]


FULL_DISK = """
    import resource, sys
    from hf_vlmerge.conversion.convert_vlmo_to_hf import convert_to_original
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # as if the disk ended there
    try:
        convert_to_original(sys.argv[1], sys.argv[2], overwrite=True)
    except ValueError as error:
        print(error)
"""


def test_no_space_left_on_the_way_back(tiny_folder, tmp_path):
    folder, _ = tiny_folder([])
    (tmp_path / "x.ckpt").write_text("old")
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(folder), str(tmp_path / "x.ckpt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("no space left while writing 'x.ckpt'") and done.stdout.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["ours", "x.ckpt"] and (tmp_path / "x.ckpt").read_text() == "old"
