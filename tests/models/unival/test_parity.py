"""Numbers of the original code at tiny size (../shared/goldens/unival): features, biases, logits, hypotheses."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LogitsProcessor, LogitsProcessorList

from hf_vlmerge.conversion.unival_keys import PREFIX, RECOMPUTED, our_key
from hf_vlmerge.models.unival.configuration_unival import UnivalConfig
from hf_vlmerge.models.unival.encoders_unival import UnivalAudioTower, fourier_kernels, mel_matrix
from hf_vlmerge.models.unival.modeling_unival import (
    UnivalForConditionalGeneration,
    code_ids,
    grid_buckets,
    grid_ids,
    text_buckets,
)
from tests.models.unival.tiny import MEDIA, tiny_config

CASES = ["text", "image_text", "video_text", "audio_text", "code_all"]
ORIGINAL_MEDIA = {"patch_images": "image", "patch_videos": "video", "patch_audios": "audio"}
TOWERS = {"image": "embed_images", "video": "embed_videos", "audio": "embed_audios"}
MEL = "encoder.embed_audios.logmel_extractor.melW"
PLAIN = {  # hypotheses that need no constraint -> the case whose inputs they have
    "greedy_text": "text",
    "greedy_image": "image_text",
    "beam5_text": "text",
    "beam5_image_norepeat3": "image_text",
    "beam3_video": "video_text",
    "beam3_audio": "audio_text",
}


class Reference:
    """The reference files, and our model with their weights."""

    def __init__(self, shared):
        self.folder = shared / "goldens" / "unival"
        self.weights = load_file(self.folder / "tiny_state_dict.safetensors")
        self.cases = load_file(self.folder / "tiny_cases.safetensors")
        self.components = load_file(self.folder / "components.safetensors")
        self.facts = json.loads((self.folder / "components.json").read_text())
        self.generation = json.loads((self.folder / "generation.json").read_text())

    def model(self, **changes) -> UnivalForConditionalGeneration:
        model = UnivalForConditionalGeneration(tiny_config(**changes)).eval()
        tensors = {PREFIX + our_key(name): tensor for name, tensor in self.weights.items() if our_key(name)}
        info = model.load_state_dict(tensors, strict=False)
        assert not info.unexpected_keys
        assert set(info.missing_keys) == set(model.all_tied_weights_keys)
        return model

    def case(self, case: str, part: str) -> dict[str, torch.Tensor]:
        start = f"{case}.{part}."
        return {name.removeprefix(start): tensor for name, tensor in self.cases.items() if name.startswith(start)}

    def inputs(self, case: str) -> dict[str, torch.Tensor]:
        """Inputs of our encoder."""
        original = self.case(case, "in")
        kind = case.removesuffix("_text")
        inputs = {"input_ids": original["src_tokens"]}
        for name, media in ORIGINAL_MEDIA.items():
            if media == kind:
                inputs[MEDIA[kind]] = original[name].transpose(1, 2) if kind == "video" else original[name]
        return inputs


@pytest.fixture(scope="module")
def reference(shared):
    return Reference(shared)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5):
    """Within the tolerance of the values' scale."""
    assert found.shape == expected.shape
    scale = max(1.0, expected.abs().max().item())
    assert (found - expected).abs().max().item() < tolerance * scale


def recorded(model, inputs, target, **options) -> dict[str, torch.Tensor]:
    """Everything that the reference files name, under their names."""
    found, hooks = {}, []
    for stack in ("encoder", "decoder"):
        for i, layer in enumerate(getattr(model.model, stack).layers):

            def record(module, positional, named, output, stack=stack, i=i):
                found[f"{stack}.layers.{i}.self_attn_bias"] = positional[1]
                if stack == "decoder":
                    found[f"{stack}.layers.{i}.cross_attn_bias"] = positional[3]
                elif i == 0:
                    found["encoder_embedding_output_BTC"], found["encoder_layer0_output_BTC"] = positional[0], output

            hooks.append(layer.register_forward_hook(record, with_kwargs=True))
    encoded = model.model.encoder(**inputs)
    found["encoder_out_BTC"], found["encoder_position_embeddings_after_ln"] = (
        encoded.last_hidden_state,
        encoded.positions,
    )
    found["encoder_padding_mask"] = encoded.attention_mask == 0
    mask = (target != 1).long()
    found["decoder_logits"] = model(
        encoder_outputs=encoded, decoder_input_ids=target, decoder_attention_mask=mask, **options
    ).logits
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_states_biases_and_logits(reference, case, implementation):
    model = reference.model(attn_implementation=implementation)
    original = reference.case(case, "in")
    options = {"decoder_code_mask": original["code_masks"]} if "code_masks" in original else {}
    found = recorded(model, reference.inputs(case), original["prev_output_tokens"], **options)
    expected = reference.case(case, "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        ours = found[name].expand_as(tensor)
        if name == "encoder_padding_mask":
            assert torch.equal(ours, tensor)
        elif name.endswith("bias"):
            seen = ours > -1e30  # masks are part of our biases, not of those
            assert seen.any(-1).all()
            close(ours[seen], tensor[seen])
        else:
            close(ours, tensor)


@pytest.mark.parametrize("kind", MEDIA)
@torch.no_grad()
def test_features_of_the_towers(reference, kind):
    tower = getattr(reference.model().model.encoder, f"{kind}_tower")
    values = reference.cases[f"features.{kind}.in"]
    close(tower(values.transpose(1, 2) if kind == "video" else values), reference.cases[f"features.{kind}.out"])


@torch.no_grad()
def test_steps_of_the_audio_front_end(reference):
    tower = reference.model().model.encoder.audio_tower
    values, names = reference.cases["features.audio.in"], "features.audio."
    close(tower.stft(values)[:, None], reference.cases[names + "power_spectrogram"], 1e-6)
    log_mel = tower.log_mel(values)
    close(log_mel, reference.cases[names + "logmel"], 1e-6)
    close(tower.bn0(log_mel.transpose(1, 3)).transpose(1, 3), reference.cases[names + "bn0_out"])
    assert MEL in RECOMPUTED and torch.equal(mel_matrix(tiny_config()), reference.weights[MEL])


@pytest.mark.parametrize("hop", [200, 480])
@torch.no_grad()
def test_log_mel_front_end_at_full_size(reference, hop):
    """48 kHz, window 1024. With the stored kind of kernels (powers of a root of unity) to the last digits; ours, more
    exact, differ from those by 1e-13, which shows in bins that are silent."""
    expected, waveform = reference.components[f"frontend.hop{hop}.logmel"], reference.components["frontend.waveform"]
    tower = UnivalAudioTower(UnivalConfig(audio_hop=hop, audio_widths=[1, 1]))
    assert torch.equal(tower.mel, reference.components["frontend.melW"])
    ours = fourier_kernels(1024)
    place = np.arange(1024)
    roots = np.power(np.exp(-2j * np.pi / 1024), place[:513, None] * place)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * place / 1024)
    theirs = [torch.tensor(part * window, dtype=torch.float32)[:, None] for part in (roots.real, roots.imag)]
    for kernels, quiet in ((theirs, 1e-5), (ours, 1e-3)):
        for name, kernel in zip(("real", "imag"), kernels, strict=True):
            stored = reference.components[f"frontend.stft_{name}_rows_0_1_100"]
            assert (kernel[[0, 1, 100], 0] - stored).abs().max() < 1e-7
            getattr(tower.stft, f"conv_{name}").weight.copy_(kernel)
        difference = (tower.log_mel(waveform) - expected).abs()
        assert difference[expected > -60].max() < 1e-5 and difference.max() < quiet
    if hop == 480:
        first = reference.components["frontend.hop480.power_first4frames"]
        close(tower.stft(waveform)[:, None, :4], first, 1e-6)


def test_bucket_tables(reference):
    numbers = reference.components
    place = torch.arange(1024)
    for size in (256, 16):
        table = text_buckets(place, place, size, 1024)
        assert torch.equal(table[:, 0], numbers[f"buckets.token_{size}.first_col"])
        assert torch.equal(table[0], numbers[f"buckets.token_{size}.first_row"])
    assert torch.equal(grid_buckets(torch.arange(65), torch.arange(65), 8), numbers["buckets.image_8.full"])
    cells = torch.arange(42 * 42 + 1)
    table = grid_buckets(cells, cells, 42)
    assert torch.equal(table[:4], numbers["buckets.image_42.first4rows"])
    assert torch.equal(table[900], numbers["buckets.image_42.row900"])
    assert torch.equal(table[:50, 0], numbers["buckets.image_42.col0_first50"])
    facts = reference.facts["buckets"]
    assert (table.sum().item(), list(table.shape)) == (facts["image_42_sum"], facts["image_42_shape"])
    assert table.max() + 1 == 6892


def test_position_ids():
    assert grid_ids((2, 3), "image", 42).tolist() == [1, 2, 3, 43, 44, 45]
    assert grid_ids((2, 2, 2), "video", 42).tolist() == [1, 2, 43, 44] * 2
    assert grid_ids((5, 2), "audio", 42).tolist() == [1, 2, 3, 4, 43, 44, 45, 46, 85, 86]
    assert grid_ids((75, 2), "audio", 42)[-1] == 11 * 42 + 6 + 1  # 150 tokens in a square of 13
    assert code_ids(torch.arange(7), 4, 8).tolist() == [0, 1, 2, 3, 4, 9, 10]
    assert code_ids(torch.tensor([1024]), 32, 42).item() == 31 * 42 + 32


class EndKeepsItsScore(LogitsProcessor):
    """At the length limit only the end token is left, with its own log-probability."""

    def __init__(self, last: int):
        self.last = last

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] != self.last:
            return scores
        return torch.full_like(scores, -torch.inf).index_copy_(1, torch.tensor([2]), scores[:, 2:3])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_hypotheses_without_constraints(reference, name, use_cache):
    entry, settings = reference.generation[name], reference.generation[name]["settings"]
    beams, limit = settings["beam_size"], settings["max_len_b"]
    model = reference.model()
    found = model.generate(
        **reference.inputs(PLAIN[name]),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=limit + 1,
        min_new_tokens=settings["min_len"],
        no_repeat_ngram_size=settings.get("no_repeat_ngram_size", 0),
        early_stopping=True if beams > 1 else None,
        logits_processor=LogitsProcessorList([EndKeepsItsScore(limit + 1)]),
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row, hypotheses in enumerate(entry["hypotheses"]):
        tokens = found.sequences[row * beams, 1:].tolist()
        assert tokens[: tokens.index(2) + 1] == hypotheses[0]["tokens"]
        if beams > 1:
            assert found.sequences_scores[row * beams].item() == pytest.approx(hypotheses[0]["score"], abs=1e-5)
