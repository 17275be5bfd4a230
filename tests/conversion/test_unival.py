"""UnIVAL checkpoints of the original code, to our layout and back."""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

from hf_vlmerge import UnivalConfig, UnivalForConditionalGeneration, UnivalModel
from hf_vlmerge.cli import main
from hf_vlmerge.conversion.convert_unival_to_hf import convert_to_hf, convert_to_original, plan_conversion
from hf_vlmerge.conversion.unival_buffers import MEL_MATRIX, recomputed_tensors
from hf_vlmerge.conversion.unival_keys import DROPPED, PREFIX, RECOMPUTED, TIED, original_key, our_key
from hf_vlmerge.models.unival.encoders_unival import mel_matrix
from tests.models.unival.tiny import SIZES, tiny_batch, tiny_config, tiny_model
from tests.models.unival.tiny_processor import tiny_vocabulary

AUDIO = ("audio_hop", "audio_sample_rate", "audio_min_frequency", "audio_max_frequency")
UNSEEN = {name: SIZES[name] for name in (*AUDIO, "code_image_size")}  # what the weights cannot tell
TRAINING = [name for name in SIZES if "drop" in name or "stripe" in name]
SEEN = {name: value for name, value in SIZES.items() if name not in UNSEEN and name not in TRAINING}
CASES = {"text": None, "image_text": "pixel_values", "video_text": "pixel_values_videos", "audio_text": "input_values"}
ORIGINAL_MEDIA = {"pixel_values": "patch_images", "pixel_values_videos": "patch_videos", "input_values": "patch_audios"}


def save_fairseq(tensors: dict, path: Path, ema: dict | None = None, extra: object = None) -> Path:
    """The layout of a fairseq file: weights under `model`, a Namespace in `cfg`, averaged weights in `extra_state`."""
    settings = argparse.Namespace(arch="unival_base", encoder_embed_dim=7, patch_image_size=480)
    content = {
        "args": None,
        "cfg": {"model": settings, "task": argparse.Namespace(_name="caption"), "common": {"fp16": True}},
        "model": tensors,
        "criterion": None,
        "optimizer_history": [{"criterion_name": "AdjustLabelSmoothedCrossEntropyCriterion", "num_updates": 12}],
        "task_state": {},
        "extra_state": {"metrics": [], "previous_training_time": 1.5, "extra": extra},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(3)}}},
    }
    if ema is not None:
        content["extra_state"] |= {"ema": ema, "ema_fp32_params": {"encoder.type_embedding.weight": torch.zeros(2, 32)}}
    torch.save(content, path)
    return path


def stored(weights: dict) -> dict:
    """The weights and what the original stores beside them."""
    return (
        weights | recomputed_tensors(tiny_config()) | {f"{s}coder.version": torch.tensor([3.0]) for s in ("en", "de")}
    )


@pytest.fixture
def original() -> dict:
    """Every tensor of a tiny model under its original name, without index tensors."""
    model = tiny_model(UnivalModel)
    found = {
        original_key(key): tensor
        for key, tensor in model.state_dict().items()
        if key not in model.all_tied_weights_keys
    }
    found |= {second: found[first] for second, first in TIED.items()}
    found |= {"encoder.embed_images.fc.weight": torch.zeros(3, 256), "encoder.embed_images.fc.bias": torch.zeros(3)}
    return found | {MEL_MATRIX: mel_matrix(tiny_config())}


@pytest.fixture(scope="module")
def golden(shared):
    folder = shared / "goldens" / "unival"
    return load_file(folder / "tiny_state_dict.safetensors"), load_file(folder / "tiny_cases.safetensors")


def logits(model, cases: dict, case: str) -> torch.Tensor:
    """What a model says to the inputs of a recorded case."""
    inputs = {"input_ids": cases[f"{case}.in.src_tokens"]}
    if case == "code_all":
        inputs["decoder_code_mask"] = cases[f"{case}.in.code_masks"]
    elif CASES[case]:
        media = cases[f"{case}.in.{ORIGINAL_MEDIA[CASES[case]]}"]
        inputs[CASES[case]] = media.transpose(1, 2) if "video" in case else media
    target = cases[f"{case}.in.prev_output_tokens"]
    mask = (target != 1).long()
    with torch.no_grad():
        return model(**inputs, decoder_input_ids=target, decoder_attention_mask=mask).logits


def load(folder) -> UnivalForConditionalGeneration:
    model, info = UnivalForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("ema", [False, True], ids=["model", "ema"])
def test_a_fairseq_checkpoint_gives_the_recorded_logits(golden, ema, tmp_path):
    weights, cases = golden
    other = {key: value + 1 if value.is_floating_point() else value for key, value in weights.items()}
    path = save_fairseq(stored(other if ema else weights), tmp_path / "x.pt", stored(weights if ema else other))
    report = convert_to_hf(path, tmp_path / "ours", ema=ema, settings=UNSEEN)
    assert ("averaged weights (EMA)" in report.notes) is ema
    model = load(tmp_path / "ours")
    config = model.config.to_dict()
    assert {name: config[name] for name in SEEN | UNSEEN} == SEEN | UNSEEN
    for case in [*CASES, "code_all"]:
        torch.testing.assert_close(
            logits(model, cases, case), cases[f"{case}.out.decoder_logits"], atol=1e-5, rtol=1e-5
        )


def test_half_precision_on_a_gpu_becomes_float32_on_the_cpu(golden, tmp_path, monkeypatch):
    weights, cases = golden
    half = {key: value.half() if value.is_floating_point() else value for key, value in stored(weights).items()}
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    path = save_fairseq(half, tmp_path / "x.pt")
    monkeypatch.undo()
    assert b"cuda:0" in path.read_bytes()
    report = convert_to_hf(path, tmp_path / "ours", settings=UNSEEN)
    assert "float16 in the source, float32 here" in report.notes
    model = load(tmp_path / "ours")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    for ours, tensor in model.state_dict().items():
        if ours not in model.all_tied_weights_keys:
            assert torch.equal(tensor, half[original_key(ours.removeprefix(PREFIX))].to(tensor.dtype)), ours
    assert torch.equal(model.model.encoder.audio_tower.mel, weights[MEL_MATRIX])  # not the rounded one
    for case in [*CASES, "code_all"]:
        expected = cases[f"{case}.out.decoder_logits"]
        difference = (logits(model, cases, case) - expected).abs().max() / expected.abs().max()
        assert difference < 0.01  # of rounding the weights


def test_there_and_back_is_byte_equal(original, tmp_path):
    original = stored(original)
    report = convert_to_hf(save_fairseq(original, tmp_path / "x.pt"), tmp_path / "ours", settings=UNSEEN)
    assert set(report.dropped) == TIED.keys() | RECOMPUTED.keys() | DROPPED.keys()
    assert report.converted == len(original) - len(report.dropped)
    back = convert_to_original(tmp_path / "ours", tmp_path / "back.pt")
    restored = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    assert set(original) - set(restored) == set(back.dropped) == set(DROPPED)
    assert set(back.recomputed) == TIED.keys() | RECOMPUTED.keys()
    for key, tensor in restored.items():
        assert tensor.dtype == original[key].dtype and torch.equal(tensor, original[key]), key


def test_a_model_without_head_goes_back_too(tmp_path):
    model = tiny_model(UnivalModel, towers=["video"])
    model.save_pretrained(tmp_path / "ours")
    report = convert_to_original(tmp_path / "ours", tmp_path / "x.pt")
    assert set(report.dropped) == {"encoder.version", "decoder.version"}
    convert_to_hf(tmp_path / "x.pt", tmp_path / "again", settings={"code_image_size": 32})
    again = load(tmp_path / "again").model.state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())


def test_index_tensors_are_those_of_the_original(shared):
    numbers = load_file(shared / "goldens" / "unival" / "components.safetensors")
    found = recomputed_tensors(tiny_config())
    assert torch.equal(found["encoder.image_rp_bucket"], numbers["buckets.image_8.full"])
    assert torch.equal(found["decoder.token_rp_bucket"][0], numbers["buckets.token_16.first_row"])
    listed = json.loads((shared / "goldens/unival/full_size_state_dict_keys.json").read_text())["keys"]
    for key, tensor in recomputed_tensors(UnivalConfig(code_image_size=128)).items():
        assert [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] == listed[key], key


def test_every_size_of_the_full_model_is_inferred(shared):
    listed = json.loads((shared / "goldens/unival/full_size_state_dict_keys.json").read_text())["keys"]
    plan = plan_conversion({key: tuple(shape) for key, (shape, _) in listed.items()})
    assert plan.config.to_dict() == UnivalConfig().to_dict()
    assert set(plan.table) | set(plan.dropped) == set(listed) and len(plan.table) == 1739 - 12
    assert "audio_hop 200" in plan.notes[0] and "code_image_size 256" in plan.notes[0]


@pytest.mark.parametrize("towers", [["image"], ["image", "video"], ["audio"], []], ids=lambda t: "+".join(t) or "none")
def test_towers_may_be_missing(original, towers, tmp_path):
    names = {"image": "embed_images", "video": "embed_videos", "audio": "embed_audios"}
    gone = tuple(f"encoder.{name}." for tower, name in names.items() if tower not in towers)
    kept = {key: tensor for key, tensor in original.items() if not (gone and key.startswith(gone))}
    settings = UNSEEN if "audio" in towers else {"code_image_size": 32}
    report = convert_to_hf(save_fairseq(kept, tmp_path / "x.pt"), tmp_path / "ours", settings=settings)
    model = load(tmp_path / "ours")
    assert model.config.towers == towers
    if "image" not in towers:
        assert report.dropped["encoder.embed_image_positions.weight"] == "the checkpoint has no image tower"
        assert report.dropped["encoder.image_proj.bias"] == "the checkpoint has no image tower"
    full = UnivalForConditionalGeneration(tiny_config()).eval()
    tensors = {PREFIX + our_key(key): tensor for key, tensor in original.items() if our_key(key)}
    full.load_state_dict(tensors, strict=False)
    batch = tiny_batch(2, towers[0] if towers else None)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, full(**batch).logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda s: s.update({"encoder.layers.0.w_resid": torch.zeros(3)}), {}, "'encoder.layers.0.w_resid' is neither"),
        (lambda s: s.update({"encoder.embed_images.layer4.7.bn1.bias": torch.zeros(3)}), {}, "layer4.7.bn1.bias"),
        (lambda s: s.pop("decoder.layers.1.fc2.bias"), {}, "'decoder.layers.1.fc2.bias' is missing"),
        (lambda s: s.update({"decoder.layer_norm.bias": torch.zeros(9)}), {}, r"has shape \(9,\).*need \(32,\)"),
        (lambda s: s.pop("encoder.embed_tokens.weight"), {}, "not a UnIVAL checkpoint: expected 'encoder.embed_tokens"),
        (lambda s: s.update({"encoder.embed_tokens.weight": torch.zeros(3)}), {}, r"not a UnIVAL .* has shape \(3,\)"),
        (lambda s: s.update({"decoder.embed_tokens.weight": torch.zeros(92, 32)}), {}, "differ; in UnIVAL they"),
        (lambda s: None, {"audio_sample_rate": 48000}, "the stored mel matrix .* at 48000 samples a second"),
        (lambda s: None, {"audio_hops": 100}, "no field 'audio_hops'; nearest: 'audio_hop'"),
        (lambda s: None, {"hidden_size": 63}, "sizes do not agree: hidden_size 63 is not a multiple of num_att"),
        (lambda s: None, {"audio_hop": "many"}, "sizes do not agree: .*audio_hop"),
        (lambda s: None, {"hidden_size": 64}, r"has shape \(92, 32\); these sizes need \(92, 64\)"),
        (lambda s: None, {"model_type": "bart"}, "settings are those of a 'bart' model"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_reason(original, change, settings, message, tmp_path):
    change(original)
    save_fairseq(original, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        convert_to_hf(tmp_path / "x.pt", tmp_path / "ours", settings=UNSEEN | settings)
    assert sorted(os.listdir(tmp_path)) == ["x.pt"]


def test_ofa_is_refused_with_the_difference(original, tmp_path):
    later = ("encoder.embed_images.layer4", "encoder.embed_videos", "encoder.embed_audios")
    others = ("encoder.video_proj", "encoder.audio_proj", "encoder.embed_video_p", "encoder.embed_audio_p")
    ofa = {key: tensor for key, tensor in original.items() if not key.startswith((*later, *others))}
    ofa["encoder.image_proj.weight"] = torch.zeros(32, 128)
    with pytest.raises(ValueError, match="this is an OFA checkpoint: its ResNet has three stages"):
        convert_to_hf(save_fairseq(ofa, tmp_path / "ofa.pt"), tmp_path / "ours")


def test_averaged_weights_that_are_not_there(original, tmp_path):
    with pytest.raises(ValueError, match=r"x.pt has no averaged weights: extra_state\['ema'\] is not there"):
        convert_to_hf(save_fairseq(original, tmp_path / "x.pt"), tmp_path / "ours", ema=True)
    with pytest.raises(ValueError, match="averaged weights stand in a fairseq checkpoint file"):
        convert_to_hf(tmp_path, tmp_path / "ours", ema=True)


class Hostile:
    """A pickle whose loading would call a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch(path):
    """Any function of an installed package that a pickle could name."""
    Path(path).touch()


@pytest.mark.parametrize("ema", [False, True], ids=["model", "ema"])
@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, open], ids=lambda f: f.__name__)
def test_a_hostile_pickle_is_refused_and_nothing_in_it_runs(original, function, ema, tmp_path):
    marker = tmp_path / "marker"
    argument = {os.system: f"touch {marker}", open: str(marker)}.get(function, f"open({str(marker)!r}, 'w')")
    hostile = Hostile(function, *((argument, "w") if function is open else (argument,)))
    save_fairseq(original, tmp_path / "x.pt", original, extra=hostile)
    with pytest.raises(ValueError, match=rf"x\.pt: refused: the checkpoint asks for \w+\.{function.__name__}"):
        convert_to_hf(tmp_path / "x.pt", tmp_path / "ours", ema=ema, settings=UNSEEN)
    assert not marker.exists() and not (tmp_path / "ours").exists()


def test_a_namespace_is_inert_data(original, tmp_path):
    """What a Namespace holds is never executed, called or looked at: not even a class that pretends to be one."""
    marker = tmp_path / "marker"
    hidden = argparse.Namespace(deep=[argparse.Namespace(call=Hostile(touch, str(marker)))])
    convert_to_hf(save_fairseq(original, tmp_path / "x.pt", extra=hidden), tmp_path / "ours", settings=UNSEEN)
    assert not marker.exists() and (tmp_path / "ours").is_dir()
    hidden = argparse.Namespace(call=Hostile(os.system, f"touch {marker}"))
    with pytest.raises(ValueError, match="refused"):
        convert_to_hf(save_fairseq(original, tmp_path / "y.pt", extra=hidden), tmp_path / "again", settings=UNSEEN)
    assert not marker.exists() and not (tmp_path / "again").exists()


def save_tiny_bart(folder: Path) -> tuple[Path, int]:
    """The files of a tiny BART tokenizer; the number of its tokens with 8 192 codes and 1 000 bins."""
    vocab, merges = tiny_vocabulary()
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return folder, len(vocab) + 9192


def test_the_command_writes_model_processor_and_code(tmp_path, capsys):
    bart, tokens = save_tiny_bart(tmp_path / "bart")
    model = tiny_model(UnivalModel, vocab_size=tokens)
    model.save_pretrained(tmp_path / "start")
    start, source, out = str(tmp_path / "start"), str(tmp_path / "x.pt"), str(tmp_path / "ours")
    assert main(["convert", "unival", start, source, "--to-original"]) == 0
    assert "recomputed: decoder.embed_tokens.weight" in capsys.readouterr().out
    (tmp_path / "fields.json").write_text(
        json.dumps({"audio_max_frequency": 5500, "audio_hop": 7, "drop_path_rate": 0})
    )
    options = ["--config", str(tmp_path / "fields.json"), "--audio-hop", "120", "--audio-sample-rate", "12000"]
    options += [
        "--audio-min-frequency",
        "50",
        "--code-image-size",
        "32",
        "--image-size",
        "64",
        "--tokenizer",
        str(bart),
    ]
    assert main(["convert", "unival", source, out, *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["architecture"] == "UnivalForConditionalGeneration" and not report["notes"]
    loaded = load(out)
    assert (loaded.config.audio_hop, loaded.config.drop_path_rate, loaded.dtype) == (120, 0, torch.float32)
    assert torch.equal(loaded.model.shared.weight, model.shared.weight)
    assert type(AutoModelForSeq2SeqLM.from_pretrained(out)) is UnivalForConditionalGeneration
    processor = AutoProcessor.from_pretrained(out)
    batch = processor(text=[" the red"], images=[torch.zeros(3, 40, 50, dtype=torch.uint8)])
    assert batch["pixel_values"].shape == (1, 3, 64, 64) and len(processor.tokenizer) == tokens
    assert processor.feature_extractor.sampling_rate == 12000 and processor.feature_extractor.num_samples == 120000
    assert loaded.generate(**batch, max_new_tokens=3).shape[1] <= 4
    assert {"modeling_unival.py", "processing_unival.py"} <= set(os.listdir(out))
    assert json.loads(Path(out, "config.json").read_text())["auto_map"]["AutoModelForSeq2SeqLM"]

    again = ["convert", "unival", source, str(tmp_path / "again"), "--code-image-size", "32", *options[:2]]
    assert main([*again, "--tokenizer", str(bart)]) == 1
    assert "audio_sample_rate" in capsys.readouterr().err
    assert main(["convert", "unival", source, str(tmp_path / "again"), *options[:-2], "--tokenizer", out]) == 0
    assert len(AutoProcessor.from_pretrained(tmp_path / "again").tokenizer) == tokens
    (tmp_path / "fields.json").write_text("[1]")
    assert main(["convert", "unival", source, str(tmp_path / "more"), *options]) == 1
    assert "fields.json is no JSON object" in capsys.readouterr().err


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(original, tmp_path):
    bart, tokens = save_tiny_bart(tmp_path / "bart")
    save_fairseq(original, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"the tokenizer has {tokens} tokens, but the model's vocabulary is 92"):
        convert_to_hf(tmp_path / "x.pt", tmp_path / "ours", settings=UNSEEN, tokenizer=bart)
