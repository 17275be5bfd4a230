"""Initial weights of UnIVAL from BART and from trained convolutional networks."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, ResNetConfig, ResNetForImageClassification

from hf_vlmerge import UnivalForConditionalGeneration, UnivalModel
from hf_vlmerge.cli import main
from hf_vlmerge.conversion.unival_init import convert_initial
from hf_vlmerge.conversion.unival_keys import original_key
from hf_vlmerge.models.unival.configuration_unival import UnivalConfig
from hf_vlmerge.models.unival.encoders_unival import mel_matrix
from tests.models.unival.tiny import SIZES, tiny_media, tiny_model

TOKENS, WIDTH = 60, 32
GRID = {"grid_size": 8, "text_bucket_size": 16, "code_image_size": 32, "vocab_size": 92}
OF = {"image": "encoder.embed_images.", "video": "encoder.embed_videos.", "audio": "encoder.embed_audios."}


@pytest.fixture(scope="module")
def bart(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=TOKENS, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=40,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("parts") / "bart"
    BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained() -> UnivalModel:
    """A model whose towers serve as the trained ones."""
    return tiny_model(UnivalModel)


def tower(model: UnivalModel, kind: str) -> dict[str, torch.Tensor]:
    """A tower under the names of its own code base."""
    names = {original_key(key): tensor for key, tensor in model.state_dict().items() if f".{kind}_tower." in key}
    return {key.removeprefix(OF[kind]): tensor for key, tensor in names.items()}


def load(folder) -> UnivalForConditionalGeneration:
    model, info = UnivalForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def test_all_parts(bart, trained, tmp_path):
    torch.save(
        tower(trained, "image") | {"fc.weight": torch.zeros(5, 256), "fc.bias": torch.zeros(5)}, tmp_path / "i.pth"
    )
    clips = {f"module.{key}": tensor for key, tensor in tower(trained, "video").items() if "num_batches" not in key}
    torch.save({"arch": "resnext-101", "state_dict": clips | {"module.fc.bias": torch.zeros(4)}}, tmp_path / "v.pth")
    sounds = tower(trained, "audio") | {"logmel_extractor.melW": torch.ones(129, 64), "fc1.bias": torch.zeros(4)}
    torch.save({"iteration": 7, "model": sounds}, tmp_path / "a.pth")
    parts = {"image": tmp_path / "i.pth", "video": tmp_path / "v.pth", "audio": tmp_path / "a.pth"}
    report = convert_initial(tmp_path / "ours", bart=bart, **parts, settings=GRID)
    model = load(tmp_path / "ours")
    for name in ("image_widths", "image_depths", "video_widths", "video_depths", "video_cardinality", "audio_widths"):
        assert getattr(model.config, name) == SIZES[name]
    assert (model.config.num_attention_heads, model.config.intermediate_size) == (4, 64)
    assert (model.config.max_position_embeddings, model.config.audio_sample_rate) == (40, 48000)

    ours, theirs = model.state_dict(), trained.state_dict()
    for key, tensor in theirs.items():
        if "_tower." in key and not ("video" in key and "num_batches" in key):
            assert torch.equal(ours[f"model.{key}"], tensor), key
    config = UnivalConfig(audio_window=256)
    assert torch.equal(model.model.encoder.audio_tower.mel, mel_matrix(config))  # of the new sample rate

    given = BartForConditionalGeneration.from_pretrained(bart).model
    layer, bart_layer = model.model.decoder.layers[1], given.decoder.layers[1]
    assert torch.equal(layer.cross_attn.q_proj.weight, bart_layer.encoder_attn.q_proj.weight)
    assert torch.equal(layer.ffn_norm.bias, bart_layer.final_layer_norm.bias)
    assert torch.equal(model.model.shared.weight[:TOKENS], given.shared.weight)
    for ours_of, theirs_of in ((model.model.encoder, given.encoder), (model.model.decoder, given.decoder)):
        positions = torch.arange(40)
        asked = theirs_of.embed_positions(torch.zeros(1, 40, dtype=torch.long))[0]  # BART adds its offset of two itself
        assert torch.equal(ours_of.text_positions(positions), asked)

    fresh = set(report.fresh)
    assert {"model.shared.weight[60:]", "model.encoder.text_positions.weight[40:]"} <= fresh
    assert {"model.encoder.layers.0.self_attn.head_scale", "model.encoder.image_connector.weight"} <= fresh
    whole = {name for name in fresh if "[" not in name}
    assert len(whole) + report.converted == len([k for k in ours if k not in model.all_tied_weights_keys])
    assert set(report.dropped) == {
        "final_logits_bias", "fc.weight", "fc.bias", "module.fc.bias", "fc1.bias", "logmel_extractor.melW"
    }  # fmt: skip


def test_new_rows_are_drawn_by_seed_with_the_deviation_of_the_original(bart, tmp_path):
    sizes = GRID | {"vocab_size": 5000}
    folders = {(seed, copy): tmp_path / f"{seed}{copy}" for seed, copy in ((0, 0), (0, 1), (1, 0))}
    for (seed, _), folder in folders.items():
        convert_initial(folder, bart=bart, settings=sizes, seed=seed)
    first, again, other = (load(folder).state_dict() for folder in folders.values())
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
    new = first["model.shared.weight"][TOKENS:]
    assert new.std().item() == pytest.approx(WIDTH**-0.5, rel=0.01) and abs(new.mean().item()) < 0.002
    assert not torch.equal(new, other["model.shared.weight"][TOKENS:])
    assert torch.equal(first["model.shared.weight"][:TOKENS], other["model.shared.weight"][:TOKENS])


def test_by_default_there_is_room_for_codes_and_bins(bart, tmp_path):
    report = convert_initial(tmp_path / "ours", bart=bart, settings={"grid_size": 8})
    assert report.config["vocab_size"] == TOKENS + 9192 and report.config["towers"] == []


def test_a_resnet_of_transformers(bart, tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[32, 64, 128, 256], depths=[2, 1, 2, 1], layer_type="bottleneck", num_labels=3
    )
    resnet = ResNetForImageClassification(config).eval()
    for name, buffer in resnet.named_buffers():
        if "running" in name:
            buffer.add_(0.1 * torch.rand_like(buffer))
    resnet.save_pretrained(tmp_path / "resnet")
    out = tmp_path / "ours"
    (tmp_path / "fields.json").write_text(json.dumps(GRID))
    command = ["convert", "unival-init", str(out), "--bart", str(bart), "--image", str(tmp_path / "resnet")]
    assert main([*command, "--config", str(tmp_path / "fields.json")]) == 0
    model = load(out)
    assert (out / "modeling_unival.py").is_file() and model.config.towers == ["image"]
    pixels = tiny_media("image", 2)
    with torch.no_grad():
        expected = resnet.resnet(pixels).last_hidden_state
        torch.testing.assert_close(model.model.encoder.image_tower(pixels), expected, atol=1e-5, rtol=1e-5)


def test_the_start_trains(bart, tmp_path):
    convert_initial(tmp_path / "ours", bart=bart, settings=GRID)
    model = load(tmp_path / "ours").train()
    loss = model(input_ids=torch.tensor([[0, 5, 2]]), labels=torch.tensor([[7, 70, 2]])).loss
    loss.backward()
    assert loss.isfinite() and model.model.shared.weight.grad[70].abs().sum() > 0


EMBEDDING = {"shared.weight": torch.zeros(9, 32)}


@pytest.mark.parametrize(
    ("part", "tensors", "settings", "message"),
    [
        ("bart", EMBEDDING | {"head.bias": torch.zeros(3)}, {}, "bart .* tensor 'head.bias'"),
        ("bart", {"encoder.layers.0.fc1.bias": torch.zeros(3)}, {}, "BART checkpoint has no embedding"),
        ("bart", EMBEDDING | {"encoder.foo": torch.zeros(1)}, {"num_attention_heads": 4}, "'encoder.foo', which"),
        ("bart", EMBEDDING | {"lm_head.weight": torch.ones(9, 32)}, {}, "two different tensors"),
        ("bart", None, {"vocab_size": 50}, "vocab_size is 50, but BART has 60 tokens"),
        ("bart", EMBEDDING, {}, "hidden_size 32 is not a multiple of num_attention_heads 12"),
        ("bart", None, {"intermediate_size": 65}, r"fc1.bias has shape \(64,\); these sizes need \(65,\)"),
        ("image", {"conv1.weight": torch.zeros(8, 3, 7, 7), "norm.bias": torch.zeros(3)}, {}, "image .* 'norm.bias'"),
        ("video", {"layer1.0.conv2.weight": torch.zeros(8)}, {}, r"has shape \(8,\)"),
    ],
)  # fmt: skip
def test_a_part_that_does_not_fit_is_refused(part, tensors, settings, message, bart, tmp_path):
    parts = {"bart": bart}
    if tensors is not None:
        torch.save(tensors, tmp_path / "x.pt")
        parts[part] = tmp_path / "x.pt"
    with pytest.raises(ValueError, match=message):
        convert_initial(tmp_path / "ours", **parts, settings=GRID | settings)
    assert not (tmp_path / "ours").exists()
