"""What must hold for every UnIVAL model, whatever the numbers are."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from hf_vlmerge.models.unival import modeling_unival
from hf_vlmerge.models.unival.configuration_unival import UnivalConfig
from hf_vlmerge.models.unival.encoders_unival import blank_stripes, fourier_kernels, mel_matrix
from hf_vlmerge.models.unival.modeling_unival import (
    UnivalAttention,
    UnivalDecoderLayer,
    UnivalEncoderLayer,
    UnivalForConditionalGeneration,
    UnivalModel,
    position_scores,
    text_buckets,
)
from tests.models.unival.tiny import MEDIA, mixed_batch, single_row, tiny_batch, tiny_config, tiny_media, tiny_model

kinds = pytest.mark.parametrize("kind", [None, *MEDIA])


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max().item() < tolerance


def model_of(**changes) -> UnivalForConditionalGeneration:
    return tiny_model(UnivalForConditionalGeneration, **changes)


def inputs_of(batch: dict) -> dict:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def targets(rows: int = 4, length: int = 9, seed: int = 5) -> torch.Tensor:
    ids = torch.randint(4, 68, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 0
    return ids


# Attention, padding, mixed batches


@kinds
@torch.no_grad()
def test_eager_equals_sdpa(kind):
    model, batch = model_of(), tiny_batch(kind=kind)
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(**batch)
    model.set_attn_implementation("eager")
    assert model.model.encoder.layers[0].self_attn.config._attn_implementation == "eager"
    close(model(**batch).logits, sdpa.logits)


@torch.no_grad()
def test_biases_lie_as_fused_attention_wants_them(monkeypatch):
    """On a GPU a bias with its last axis strided sends attention the slow way, without a word."""
    strides, forward = set(), UnivalAttention.forward

    def watched(self, hidden_states, bias, *args, **kwargs):
        strides.add(bias.stride(-1) if bias.shape[-1] > 1 else 1)
        return forward(self, hidden_states, bias, *args, **kwargs)

    monkeypatch.setattr(UnivalAttention, "forward", watched)
    model = model_of()
    for batch in (tiny_batch(), mixed_batch(), tiny_batch(kind=None)):
        model(**batch)
        codes = torch.arange(len(batch["input_ids"])) % 2 == 0
        for code_mask in (None, codes, torch.ones_like(codes)):
            model.generate(**inputs_of(batch), decoder_code_mask=code_mask, num_beams=3, max_new_tokens=4)
    assert strides == {1}


@torch.no_grad()
def test_a_mixed_batch_equals_its_rows_alone():
    """Eight rows with images, clips, sounds and none, and texts of different lengths."""
    model, batch = model_of(), mixed_batch()
    together = model(**batch)
    encoded = model.model.encoder(**inputs_of(batch))
    for row in range(8):
        alone = single_row(batch, row)
        close(model(**alone).logits[0], together.logits[row])
        single = model.model.encoder(**inputs_of(alone))
        seen = encoded.attention_mask[row].bool()
        assert seen.sum() == single.attention_mask.sum()
        close(encoded.last_hidden_state[row][seen], single.last_hidden_state[0])
        close(encoded.positions[row][seen], single.positions[0])


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_a_mixed_batch_generates_what_its_rows_generate_alone(beams):
    model, batch = model_of(), mixed_batch()
    options = {"num_beams": beams, "max_new_tokens": 6, "pad_token_id": 1}
    together = model.generate(**inputs_of(batch), **options)
    for row in range(8):
        alone = model.generate(**inputs_of(single_row(batch, row)), **options)[0]
        assert torch.equal(together[row, : len(alone)], alone)
        assert (together[row, len(alone) :] == 1).all()


@torch.no_grad()
def test_one_kind_with_text_only_rows():
    model, batch = model_of(towers=["video"]), mixed_batch((1, -1, 1))
    together = model(**batch).logits
    for row in range(3):
        close(model(**single_row(batch, row)).logits[0], together[row])
    nothing = mixed_batch((-1, -1))
    close(model(**nothing).logits, model(**{k: v for k, v in nothing.items() if k != "media_types"}).logits)


@kinds
@torch.no_grad()
def test_padding_of_the_text_changes_nothing(kind):
    model, batch = model_of(), tiny_batch(kind=kind)
    padded = dict(batch)
    padded["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, 5), value=1)
    padded["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 5))
    close(model(**batch).logits, model(**padded).logits)
    without_mask = {name: tensor for name, tensor in padded.items() if name != "attention_mask"}
    close(model(**batch).logits, model(**without_mask).logits)


@kinds
@torch.no_grad()
def test_padding_of_the_text_on_the_left_changes_nothing(kind):
    """Positions count from the first token; what is returned has the padding on the right."""
    model, batch = model_of(), tiny_batch(kind=kind)
    left = batch | {"input_ids": batch["input_ids"].clone(), "attention_mask": batch["attention_mask"].clone()}
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for name in ("input_ids", "attention_mask"):
            left[name][row] = batch[name][row].roll(7 - length)
    assert not left["attention_mask"][1:, 0].any()
    close(model(**left).logits, model(**batch).logits)
    without_mask = {name: tensor for name, tensor in left.items() if name != "attention_mask"}
    close(model(**without_mask).logits, model(**batch).logits)
    encoded, expected = (model.model.encoder(**inputs_of(each)) for each in (left, batch))
    assert torch.equal(encoded.attention_mask, expected.attention_mask)
    seen = expected.attention_mask.bool()
    close(encoded.last_hidden_state[seen], expected.last_hidden_state[seen])
    options = {"num_beams": 2, "max_new_tokens": 5}
    assert torch.equal(model.generate(**inputs_of(left), **options), model.generate(**inputs_of(batch), **options))


@torch.no_grad()
def test_padding_of_the_target_changes_nothing():
    model, batch, ids = model_of(), inputs_of(tiny_batch()), targets()
    exact = model(**batch, decoder_input_ids=ids).logits
    left, mask = torch.nn.functional.pad(ids, (3, 0), value=1), torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    close(model(**batch, decoder_input_ids=left, decoder_attention_mask=mask).logits[:, 3:], exact)
    right, mask = torch.nn.functional.pad(ids, (0, 3), value=1), torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
    close(model(**batch, decoder_input_ids=right, decoder_attention_mask=mask).logits[:, :9], exact)
    close(model(**batch, decoder_input_ids=right).logits[:, :9], exact)


@torch.no_grad()
def test_prompts_of_unequal_lengths_in_the_decoder():
    """Padded on the left, in one batch, against each row alone."""
    model, batch = model_of(), tiny_batch(3, "image")
    prompts = [targets(1, length, length)[0] for length in (5, 2, 4)]
    padded = torch.stack([torch.nn.functional.pad(prompt, (5 - len(prompt), 0), value=1) for prompt in prompts])
    options = {"num_beams": 2, "max_new_tokens": 5, "pad_token_id": 1}
    together = model.generate(
        **inputs_of(batch), decoder_input_ids=padded, decoder_attention_mask=(padded != 1).long(), **options
    )
    for row, prompt in enumerate(prompts):
        alone = model.generate(**inputs_of(single_row(batch, row)), decoder_input_ids=prompt[None], **options)[0]
        found = together[row, 5 - len(prompt) :]
        assert torch.equal(found[: len(alone)], alone)


@torch.no_grad()
def test_code_rows_and_text_rows_in_one_batch():
    model, batch, ids = model_of(), inputs_of(tiny_batch(4, None)), targets()
    codes = torch.tensor([True, False, True, False])
    mixed = model(**batch, decoder_input_ids=ids, decoder_code_mask=codes).logits
    all_codes = model(**batch, decoder_input_ids=ids, decoder_code_mask=torch.ones_like(codes)).logits
    text = model(**batch, decoder_input_ids=ids).logits
    close(mixed[codes], all_codes[codes])
    close(mixed[~codes], text[~codes])
    assert (all_codes - text).abs().max() > 0.01


# Decoding with the cache


@pytest.mark.parametrize("code_mask", [None, [True] * 4, [True, False, False, True]])
@torch.no_grad()
def test_steps_with_the_cache_equal_one_pass(code_mask):
    """Logits of every step: one token at a time, and a prompt of three tokens first."""
    model, batch, ids = model_of(), mixed_batch((0, 1, 2, -1)), targets()
    options = {} if code_mask is None else {"decoder_code_mask": torch.tensor(code_mask)}
    encoded = model.model.encoder(**inputs_of(batch))
    exact = model(encoder_outputs=encoded, decoder_input_ids=ids, **options).logits
    for first in (1, 3):
        cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
        steps, start = [], 0
        for end in range(first, 10):
            step = model(encoder_outputs=encoded, decoder_input_ids=ids[:, start:end], past_key_values=cache, **options)
            steps.append(step.logits)
            start = end
        close(torch.cat(steps, dim=1), exact)
        assert cache.get_seq_length() == 9


@torch.no_grad()
def test_a_step_of_one_padded_row_with_the_cache():
    model, batch, ids = model_of(), inputs_of(tiny_batch(1)), targets(1, 6, 6)
    exact = model(**batch, decoder_input_ids=ids).logits[:, -1:]
    left, mask = torch.nn.functional.pad(ids, (2, 0), value=1), torch.nn.functional.pad(torch.ones_like(ids), (2, 0))
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    for new, known in ((left[:, :-1], mask[:, :-1]), (left[:, -1:], mask)):
        step = model(**batch, decoder_input_ids=new, decoder_attention_mask=known, past_key_values=cache)
    close(step.logits, exact)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("codes", [False, True])
@torch.no_grad()
def test_generation_with_and_without_the_cache(beams, codes):
    model, batch = model_of(), mixed_batch((2, 0, -1))
    options = {"num_beams": beams, "max_new_tokens": 8, "decoder_code_mask": torch.full((3,), codes)}
    cached, uncached = (model.generate(**inputs_of(batch), **options, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, uncached)


@torch.no_grad()
def test_a_step_computes_one_row_of_every_bias_and_projects_no_position():
    """Base width: a step would pay for a key projection of all positions if it were made."""
    config = {"hidden_size": 256, "intermediate_size": 64, "towers": ["image"]}
    model, batch = model_of(**config), inputs_of(tiny_batch(2))
    shapes, projected = [], []
    decoder = model.model.decoder
    decoder.layers[1].register_forward_hook(lambda _, inputs, __: shapes.append((inputs[1].shape, inputs[3].shape)))
    for name in ("self_position_k_proj", "cross_position_k_proj"):
        getattr(decoder, name).register_forward_hook(lambda *_: projected.append(1))
    model.generate(**batch, max_new_tokens=5, min_new_tokens=5)
    length = 6 + batch["input_ids"].shape[1]
    assert shapes == [((1, 4, 1, step), (2, 4, 1, length)) for step in range(1, 6)]
    assert not projected


@torch.no_grad()
def test_both_ways_to_position_scores_agree():
    torch.manual_seed(0)
    queries, keys, q_proj, k_proj = torch.randn(3, 9, 8), torch.randn(3, 5, 8), *(torch.nn.Linear(8, 8) for _ in "qk")
    whole = position_scores(queries, keys, q_proj, k_proj, 2, 0.3)
    assert whole.shape == (3, 2, 9, 5)
    close(position_scores(queries[:, :3], keys, q_proj, k_proj, 2, 0.3), whole[:, :, :3])
    close(position_scores(queries[:1, :3], keys, q_proj, k_proj, 2, 0.3)[0], whole[0, :, :3])
    close(position_scores(queries[:, :3], keys[:1], q_proj, k_proj, 2, 0.3)[0], whole[0, :, :3])


@torch.no_grad()
def test_towers_run_once_and_beams_copy_no_pixels():
    model, batch = model_of(), inputs_of(tiny_batch(2, "video"))
    calls = []
    model.model.encoder.video_tower.register_forward_hook(lambda *_: calls.append(1))
    _, kept = model._expand_inputs_for_generation(3, True, encoder_outputs={}, **batch)
    assert "pixel_values_videos" not in kept and len(kept["attention_mask"]) == 6
    model.generate(**batch, num_beams=3, max_new_tokens=4)
    assert len(calls) == 1


@torch.no_grad()
def test_the_cache_may_have_either_name_of_the_library():
    """`past_key_values` became `cache` in transformers 5.24."""
    model, batch, ids = model_of(towers=[]), inputs_of(tiny_batch(4, None)), targets()
    exact = model(**batch, decoder_input_ids=ids).logits[:, 5:]
    for name in ("past_key_values", "cache"):
        for head, take in ((model, lambda output: output.logits), (model.model, model.lm_head)):
            first = head(**batch, decoder_input_ids=ids[:, :5], use_cache=True)
            then = head(**batch, decoder_input_ids=ids[:, 5:], **{name: first[modeling_unival.CACHE]})
            close(take(then) if head is model else take(then.last_hidden_state), exact)


# Training


def test_every_parameter_gets_a_gradient():
    model = model_of()
    batch = mixed_batch()
    model(**batch, decoder_code_mask=torch.arange(8) % 2 == 0).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    frozen = "model.encoder.audio_tower.stft."
    assert without == [f"{frozen}conv_real.weight", f"{frozen}conv_imag.weight"]


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = model_of()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            assert model.model.encoder.layers[0].gradient_checkpointing
        model.train()
        model(**mixed_batch()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        close(gradient, gradients[1][name], 1e-4 * max(1.0, gradient.abs().max().item()))


@torch.no_grad()
def test_the_loss_is_a_mean_over_labels_or_a_share_of_the_whole_batch():
    model, batch = model_of(), tiny_batch()
    output = model(**batch)
    labels, kept = batch["labels"], batch["labels"] != -100
    probabilities = output.logits.log_softmax(-1)[kept]
    expected = -probabilities.gather(1, labels[kept][:, None]).mean()
    close(output.loss, expected)
    close(model(**batch, num_items_in_batch=40).loss, expected * kept.sum() / 40)
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    assert shifted[0].tolist() == [0, *labels[0, :-1].tolist()] and (shifted != -100).all()
    close(model(**inputs_of(batch), decoder_input_ids=shifted).logits, output.logits)


def test_the_trainer_may_accumulate():
    """Two halves with the count of both give the gradient of the whole."""
    model = model_of().double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tiny_batch(4, "image").items()}
    model(**batch).loss.backward()
    whole = model.model.shared.weight.grad.clone()
    model.zero_grad()
    count = (batch["labels"] != -100).sum()
    for half in (slice(0, 2), slice(2, 4)):
        model(**{k: v[half] for k, v in batch.items()}, num_items_in_batch=count).loss.backward()
    close(model.model.shared.weight.grad, whole, 1e-9)


def test_stochastic_depth_grows_with_depth_in_each_stack_and_keeps_the_expectation():
    model = UnivalModel(tiny_config(drop_path_rate=0.2, encoder_layers=3, decoder_layers=5, towers=[]))
    assert [layer.drop_path.rate for layer in model.encoder.layers] == pytest.approx([0, 0.1, 0.2])
    assert [layer.drop_path.rate for layer in model.decoder.layers] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    drop = model.encoder.layers[2].drop_path.train()
    torch.manual_seed(0)
    dropped = drop(torch.ones(20000, 1, 1))
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.8)]
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(drop.eval()(torch.ones(3, 1, 1)), torch.ones(3, 1, 1))


def test_stripes_are_blanked_in_training_only():
    torch.manual_seed(0)
    spectrogram = torch.ones(500, 1, 60, 16)
    blanked = blank_stripes(spectrogram, 2, 20)
    assert torch.equal(blanked[..., :1].expand_as(blanked), blanked)  # whole frames
    lengths = (blanked[:, 0, :, 0] == 0).sum(1)
    assert lengths.max() <= 38 and lengths.unique().numel() > 25 and blanked[0].ne(blanked[1]).any()
    assert torch.equal(blank_stripes(spectrogram, 2, 0), spectrogram)
    tower = tiny_model(UnivalModel, audio_time_stripe=64, audio_mel_stripe=8).encoder.audio_tower
    sound = tiny_media("audio", 2)
    with torch.no_grad():
        assert torch.equal(tower(sound), tower(sound))
        tower.train()
        assert not torch.equal(tower(sound), tower(sound))


def test_layers_compile_without_graph_breaks():
    model = model_of(towers=[])
    for layer, biases in ((model.model.encoder.layers[0], [(7, 7)]), (model.model.decoder.layers[0], [(7, 7), (7, 5)])):
        inputs = [torch.randn(2, 7, 32), torch.randn(1, 4, *biases[0])]
        if len(biases) > 1:
            inputs += [torch.randn(2, 5, 32), torch.randn(2, 4, *biases[1])]
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        with torch.no_grad():
            close(compiled(*inputs), layer(*inputs))
    assert isinstance(layer, UnivalDecoderLayer) and isinstance(model.model.encoder.layers[0], UnivalEncoderLayer)


@torch.no_grad()
def test_a_pass_over_one_kind_of_media_is_one_graph():
    model, batch = model_of(towers=["image"], image_depths=[1, 1, 1, 1]), tiny_batch(2)
    close(torch.compile(model, fullgraph=True, backend="eager")(**batch).logits, model(**batch).logits)


@pytest.mark.multiproc
def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "-m", "tests.models.unival.two_ranks", str(tmp_path / "found.pt")], check=True, env=environment
    )
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    model = model_of(towers=["image"])
    loss = model(**tiny_batch()).loss
    loss.backward()
    assert found["count"] == 2
    close(found["loss"], loss)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert found["gradients"][name] is None
        else:
            close(found["gradients"][name], parameter.grad)


# Precision


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_bfloat16_runs_and_stays_near_float32(implementation, tmp_path):
    model, batch = model_of(attn_implementation=implementation), mixed_batch()
    exact = model(**batch).loss.item()
    model.save_pretrained(tmp_path)
    half = UnivalForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation=implementation
    )
    audio = half.model.encoder.audio_tower
    assert audio.stft.conv_real.weight.dtype == torch.float32 and audio.conv_block1.conv1.weight.dtype == torch.bfloat16
    assert torch.equal(audio.mel, mel_matrix(half.config))
    output = half(**batch)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.item() == pytest.approx(exact, rel=0.05)
    assert half.generate(**inputs_of(batch), num_beams=2, max_new_tokens=4).shape[1] <= 5
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**batch).loss.item() == pytest.approx(exact, rel=0.05)


# Saving and loading


def same_tensors(model, loaded):
    for (name, tensor), (other, found) in zip(
        [*model.state_dict().items(), *model.named_buffers()],
        [*loaded.state_dict().items(), *loaded.named_buffers()],
        strict=True,
    ):
        assert name == other and torch.equal(tensor, found), name


@pytest.mark.parametrize("model_class", [UnivalModel, UnivalForConditionalGeneration])
@pytest.mark.parametrize("towers", [["image", "video", "audio"], ["image"], []])
@torch.no_grad()
def test_saved_and_loaded_models_are_equal(model_class, towers, tmp_path):
    """Parameters, BatchNorm statistics and the mel matrix, which no file holds."""
    model = tiny_model(model_class, towers=towers)
    model.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.towers == towers
    same_tensors(model, loaded)
    if "audio" in towers:
        base = loaded if model_class is UnivalModel else loaded.model
        statistics = base.encoder.audio_tower.conv_block2.bn1.running_var
        assert (statistics - 1).abs().max() > 0.01
    kind = towers[0] if towers else None
    batch = inputs_of(tiny_batch(2, kind)) | {"decoder_input_ids": targets(2)}
    assert torch.equal(model(**batch)[0], loaded(**batch)[0])
    if model_class is UnivalForConditionalGeneration:
        stored = json.loads((tmp_path / "generation_config.json").read_text())
        assert (stored["decoder_start_token_id"], stored["eos_token_id"], stored["pad_token_id"]) == (0, 2, 1)


@torch.no_grad()
def test_a_base_model_loads_from_a_head_and_back(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path / "head")
    base = UnivalModel.from_pretrained(tmp_path / "head")
    same_tensors(model.model, base)
    base.save_pretrained(tmp_path / "base")
    same_tensors(model, UnivalForConditionalGeneration.from_pretrained(tmp_path / "base"))


def test_the_embedding_is_one_tensor(tmp_path):
    from safetensors import safe_open

    model = model_of(towers=[])
    assert model.lm_head.weight is model.model.encoder.embed_tokens.weight is model.model.decoder.embed_tokens.weight
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata()["format"] == "pt"
    assert "model.shared.weight" in names
    assert not names & set(model.all_tied_weights_keys) and not any("embed_tokens" in name for name in names)
    loaded = UnivalForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.shared.weight


@torch.no_grad()
def test_the_vocabulary_can_grow():
    model, batch = model_of(towers=[]), tiny_batch(2, None)
    before = model(**batch).logits
    model.resize_token_embeddings(100)
    after = model(**batch).logits
    assert after.shape[-1] == 100 and model.config.vocab_size == 100
    close(after[..., :92], before)
    assert model.lm_head.weight is model.model.encoder.embed_tokens.weight is model.model.shared.weight


def test_missing_tensors_get_their_initial_values_on_loading(tmp_path):
    """Models are built on the meta device: whatever a checkpoint lacks must be filled, not left as memory was found."""
    model_of(towers=[]).save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = UnivalForConditionalGeneration.from_pretrained(tmp_path, towers=["image", "audio"])
    audio, image = model.model.encoder.audio_tower, model.model.encoder.image_tower
    for kernel, expected in zip((audio.stft.conv_real, audio.stft.conv_imag), fourier_kernels(256), strict=True):
        assert torch.equal(kernel.weight[:, 0], expected[:, 0])
    assert torch.equal(audio.mel, mel_matrix(model.config))
    for norm in (audio.bn0, image.layer1[0].bn2):
        assert torch.equal(norm.running_var, torch.ones_like(norm.running_var))
        assert torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))
        assert torch.equal(norm.weight, torch.ones_like(norm.weight)) and norm.num_batches_tracked == 0
    fan_out = 32 * 9
    assert image.layer3[0].conv2.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def test_initial_values():
    torch.manual_seed(0)
    model = UnivalForConditionalGeneration(tiny_config(hidden_size=128, intermediate_size=512, towers=["audio"]))
    encoder = model.model.encoder
    assert torch.equal(encoder.layers[1].self_attn.head_scale, torch.ones(4))
    assert encoder.layers[0].fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.model.shared.weight[1].abs().max() == 0
    assert torch.equal(encoder.audio_tower.stft.conv_real.weight, fourier_kernels(256)[0])
    with torch.no_grad():
        assert model(**tiny_batch(4, "audio")).loss.item() == pytest.approx(4.5, abs=0.3)  # ln 92


def test_the_configuration_survives_a_round_trip(tmp_path):
    config = tiny_config(towers=("audio", "image"), encoder_layers=3)
    config.save_pretrained(tmp_path)
    loaded = UnivalConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert (loaded.towers, loaded.num_hidden_layers, loaded.decoder_layers) == (["audio", "image"], 3, 2)
    assert config.get_text_config(decoder=True).num_hidden_layers == 2


# What users see


@torch.no_grad()
def test_hidden_states_attentions_and_tuples():
    model, batch = model_of(attn_implementation="eager"), tiny_batch(2)
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(output.encoder_hidden_states) == len(output.decoder_hidden_states) == 3
    assert [a.shape for a in output.encoder_attentions] == [(2, 4, 13, 13)] * 2
    assert [a.shape for a in output.decoder_attentions] == [(2, 4, 5, 5)] * 2
    assert [a.shape for a in output.cross_attentions] == [(2, 4, 5, 13)] * 2
    assert output.decoder_attentions[0].triu(1).abs().max() == 0
    assert output.cross_attentions[0][1, :, :, 12].abs().max() == 0  # padding
    loss, logits = model(**batch, return_dict=False)[:2]
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    assert model(**inputs_of(batch)).logits.shape == (2, 1, 92)  # the start token alone


@torch.no_grad()
def test_embeddings_in_place_of_ids():
    model, batch = model_of(), tiny_batch(2)
    embedded = model.get_input_embeddings()(batch["input_ids"])
    replaced = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
    close(model(**replaced, inputs_embeds=embedded).logits, model(**batch).logits)


@torch.no_grad()
def test_the_last_logits_only():
    model, batch = model_of(towers=[]), inputs_of(tiny_batch(2, None))
    ids = targets(2)
    last = model(**batch, decoder_input_ids=ids, logits_to_keep=2).logits
    close(last, model(**batch, decoder_input_ids=ids).logits[:, -2:])


def test_far_text_shares_the_last_bucket():
    place = torch.tensor([0, 1023, 5000])
    assert text_buckets(place, place[:1], 256, 1024)[:, 0].tolist() == [255, 510, 510]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"towers": ["vision"]}, "towers has 'vision'; expected a subset of"),
        ({"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
        ({"text_bucket_size": 15}, "text_bucket_size is 15; expected an even number"),
        (
            {"text_bucket_distance": 9},
            "text_bucket_distance is 9; expected more than half of text_bucket_size 16",
        ),
        ({"code_image_size": 80}, r"code_image_size is 80; expected a multiple of 8, at most 8 \* grid_size = 64"),
        ({"image_depths": [1, 1]}, "image_widths has 4 stages, image_depths has 2"),
        ({"video_widths": [32, 64, 100, 256]}, "expected multiples of 32"),
        ({"hidden_size": "32"}, "hidden_size"),
    ],
)
def test_a_wrong_configuration_is_refused_in_one_sentence(changes, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "expected either input_ids or inputs_embeds"),
        ({"pixel_values_videos": tiny_media("video", 4)}, "were given, but this model has no video tower"),
        ({"input_values": tiny_media("audio", 4)}, "pixel_values and input_values were given without media_types"),
        ({"pixel_values": tiny_media("image", 3)}, "pixel_values has 3 rows for 4 texts"),
        ({"pixel_values": torch.zeros(4, 1, 64, 64)}, r"pixel_values has shape \(4, 1, 64, 64\); expected \(rows, 3,"),
        ({"pixel_values": torch.zeros(4, 3, 64)}, r"\(4, 3, 64\); expected \(rows, 3, height, width\)"),
        ({"pixel_values": torch.zeros(4, 3, 64, 64).byte()}, "pixel_values are torch.uint8; expected floats, as the"),
        ({"input_values": torch.zeros(4, 1, 8000), "pixel_values": None}, r"expected \(rows, samples\)"),
        ({"input_values": torch.zeros(4, 8000).short(), "pixel_values": None}, "input_values are torch.int16"),
        ({"media_types": torch.zeros(3)}, r"media_types has shape \(3,\); expected \(4,\)"),
        ({"media_types": torch.tensor([0, 0, 0, -1])}, "media_types has 3 rows of kind image, pixel_values has 4"),
        ({"media_types": torch.tensor([0, 0, 0, 2])}, "media_types has 3 rows of kind image, pixel_values has 4"),
        ({"pixel_values": torch.zeros(4, 3, 288, 64)}, "image gives 9 x 2 tokens; this model has positions for 8 x 8"),
        ({"input_ids": torch.full((4, 65), 5), "attention_mask": None}, "the text has 65 tokens; .* at most 64"),
        ({"decoder_input_ids": torch.full((4, 65), 5)}, "the target has 65 tokens; this model takes at most 64"),
        (
            {"decoder_input_ids": torch.full((4, 18), 5), "decoder_code_mask": torch.ones(4)},
            "the target has 18 image codes; a start token and 4 x 4 codes is all",
        ),
        (
            {"decoder_input_ids": torch.full((4, 9), 5), "decoder_attention_mask": torch.ones(4, 8)},
            "decoder_attention_mask covers 8 tokens; expected 9",
        ),
        (
            {"decoder_input_ids": torch.full((4, 9), 5), "decoder_attention_mask": torch.ones(4, 1, 9, 9)},
            r"decoder_attention_mask has 4 dimensions; expected \(rows, tokens\)",
        ),
        ({"encoder_outputs": torch.nn.Identity()}, "encoder_outputs has no `positions`"),
        (
            {"input_values": torch.zeros(4, 3000), "pixel_values": None},
            "the sound has 3000 samples; expected at least 3720",
        ),
    ],
)  # fmt: skip
@torch.no_grad()
def test_wrong_inputs_are_refused_in_one_sentence(change, message):
    model = model_of(towers=["image", "audio"])
    with pytest.raises(ValueError, match=message):
        model(**{**inputs_of(tiny_batch()), **change})
