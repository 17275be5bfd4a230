"""What must hold for every architecture, whatever the numbers are."""

import pytest
import torch

from hf_vlmerge.models.vlmo.configuration_vlmo import VlmoConfig
from hf_vlmerge.models.vlmo.modeling_vlmo import (
    VlmoForImageAndTextRetrieval,
    VlmoForImagesAndTextClassification,
    VlmoForPreTraining,
    VlmoForQuestionAnswering,
    VlmoModel,
    draw_negatives,
)
from tests.models.vlmo.separate_passes import separate_passes
from tests.models.vlmo.tiny import ARCHITECTURES, tiny_batch, tiny_config, tiny_model, training_batch

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
HEADS = [VlmoModel, VlmoForPreTraining, VlmoForImageAndTextRetrieval, VlmoForQuestionAnswering]


def close(a, b, tolerance=1e-5):
    assert (a - b).abs().max().item() < tolerance


@architectures
@torch.no_grad()
def test_eager_equals_sdpa(architecture):
    sdpa = tiny_model(VlmoModel, architecture)
    eager = tiny_model(VlmoModel, architecture, attn_implementation="eager")
    assert sdpa.config._attn_implementation == "sdpa" and eager.config._attn_implementation == "eager"
    close(sdpa(**tiny_batch()).last_hidden_state, eager(**tiny_batch()).last_hidden_state)


@architectures
@torch.no_grad()
def test_padding_changes_nothing(architecture):
    model, batch = tiny_model(VlmoModel, architecture), tiny_batch()
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = model(batch["input_ids"][row : row + 1, :length], None, batch["pixel_values"][row : row + 1])
        together = model(**batch)
        close(alone.pooler_output[0], together.pooler_output[row])
        close(alone.last_hidden_state[0, length:], together.last_hidden_state[row, 12:])


@pytest.mark.parametrize("joint_attention", [False, True])
@architectures
@torch.no_grad()
def test_lower_layers_of_a_joint_pass_equal_the_single_passes(architecture, joint_attention):
    model = tiny_model(VlmoModel, architecture, joint_attention_in_lower_layers=joint_attention)
    batch = tiny_batch()
    joint = model(**batch, output_hidden_states=True).hidden_states
    text = model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states
    image = model(pixel_values=batch["pixel_values"], output_hidden_states=True).hidden_states
    assert len(joint) == 5
    same = torch.allclose(joint[2], torch.cat([text[2], image[2]], dim=1), atol=1e-5)
    assert same is not joint_attention


@torch.no_grad()
def test_attention_weights_are_zero_between_modalities_below_the_fusion_layers():
    model = tiny_model(VlmoModel, attn_implementation="eager")
    lower, _, fusion, _ = model(**tiny_batch(), output_attentions=True).attentions
    assert lower.shape == (4, 4, 29, 29)
    assert lower[:, :, :12, 12:].abs().max() == 0 and lower[:, :, 12:, :12].abs().max() == 0
    assert fusion[:, :, :12, 12:].min() > 0
    close(lower.sum(-1), torch.ones(4, 4, 29))


@architectures
def test_every_parameter_gets_a_gradient(architecture):
    model = tiny_model(VlmoForPreTraining, architecture)
    model(**training_batch()).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@architectures
def test_gradient_checkpointing_changes_nothing(architecture):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(VlmoForPreTraining, architecture)
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable()
        model.train()
        model(**training_batch()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        close(gradient, gradients[1][name])


@pytest.mark.parametrize("joint_attention", [False, True])
@architectures
def test_reuse_equals_separate_passes(architecture, joint_attention):
    """The training step against six passes that each start from the pixels and the ids."""
    model = tiny_model(VlmoForPreTraining, architecture, joint_attention_in_lower_layers=joint_attention)
    batch = training_batch()
    shared_step = model(**batch)
    shared_step.loss.backward()
    reused = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    losses = separate_passes(model, batch)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        expected = shared_step[name] * (model.config.mlm_loss_weight if name == "mlm_loss" else 1)
        close(loss, expected)
    for name, parameter in model.named_parameters():
        close(parameter.grad, reused[name])


@pytest.mark.parametrize("model_class", HEADS)
@architectures
def test_saved_and_loaded_models_are_equal(model_class, architecture, tmp_path):
    model = tiny_model(model_class, architecture)
    model.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.expert_modules == ARCHITECTURES[architecture]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


@torch.no_grad()
def test_a_base_model_loads_from_a_head_and_back(tmp_path):
    retrieval = tiny_model(VlmoForImageAndTextRetrieval)
    retrieval.save_pretrained(tmp_path)
    base = VlmoModel.from_pretrained(tmp_path)
    close(base(**tiny_batch()).pooler_output, retrieval.vlmo(**tiny_batch()).pooler_output, 1e-7)


@torch.no_grad()
def test_another_resolution_is_fitted_on_loading(tmp_path):
    model = tiny_model(VlmoModel)
    model.save_pretrained(tmp_path)
    larger = VlmoModel.from_pretrained(tmp_path, image_size=48)
    assert larger.config.image_size == 48
    assert larger.encoder.relative_position_bias_table.shape == (11 * 11 + 5 + 40, 16)
    assert larger(**tiny_batch(image_size=48)).last_hidden_state.shape == (4, 12 + 37, 32)
    larger.save_pretrained(tmp_path / "larger")
    again = VlmoModel.from_pretrained(tmp_path / "larger")
    close(again(**tiny_batch(image_size=48)).pooler_output, larger(**tiny_batch(image_size=48)).pooler_output, 1e-7)
    with pytest.raises(ValueError, match=r"pixel_values are 32 x 32, but this model takes 48 x 48"):
        larger(**tiny_batch())


@torch.no_grad()
def test_two_images_start_from_the_same_modality_embedding(tmp_path):
    tiny_model(VlmoForPreTraining).save_pretrained(tmp_path)
    model = VlmoForImagesAndTextClassification.from_pretrained(tmp_path, num_labels=2).eval()
    types = model.vlmo.embeddings.modality_type_embeddings.weight
    assert types.shape == (3, 32) and torch.equal(types[1], types[2])
    batch = tiny_batch()
    batch["pixel_values"] = torch.stack([batch["pixel_values"], batch["pixel_values"].flip(0)], dim=1)
    output = model(**batch, labels=torch.tensor([0, 1, 0, 1]))
    first, second = (
        model.vlmo(batch["input_ids"], batch["attention_mask"], batch["pixel_values"][:, i]).pooler_output
        for i in (0, 1)
    )
    close(output.logits, model.classifier(torch.cat([first, second], dim=-1)))
    model.save_pretrained(tmp_path / "pairs")
    again = VlmoForImagesAndTextClassification.from_pretrained(tmp_path / "pairs")
    close(again(**batch).logits, output.logits, 1e-7)
    with pytest.raises(ValueError, match=r"expected pixel_values of shape \(B, 2, 3, H, W\)"):
        model(**tiny_batch())


@torch.no_grad()
def test_initial_values():
    torch.manual_seed(0)
    model = VlmoForPreTraining(tiny_config(hidden_size=128, intermediate_size=512))
    layer = model.vlmo.encoder.layers[3]
    assert layer.attention["vision"].qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for weight in (
        layer.ffn["vision"].fc1.weight,
        layer.ffn["language"].fc2.weight,
        layer.attention["vision"].proj.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert model.vlmo.encoder.relative_position_bias_table.abs().max() == 0
    assert model.vlmo.embeddings.text.word_embeddings.weight[0].abs().max() > 0
    assert torch.equal(layer.layer_scale_1, torch.full((128,), 0.1))
    assert model.itc.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_missing_tensors_get_their_initial_values_on_loading(tmp_path):
    """Models are built on the meta device: whatever a checkpoint lacks must be filled, not left as memory was found."""
    tiny_model(VlmoModel).save_pretrained(tmp_path)
    model = VlmoForPreTraining.from_pretrained(tmp_path)
    assert model.itc.logit_vl_scale.item() == pytest.approx(model.config.logit_scale_init_value)
    assert model.mlm_head.bias.abs().max() == 0
    assert model.mlm_head.decoder.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_stochastic_depth_grows_with_depth_and_keeps_the_expectation():
    model = VlmoModel(tiny_config(drop_path_rate=0.3))
    assert [round(layer.drop_path.rate, 6) for layer in model.encoder.layers] == [0.0, 0.1, 0.2, 0.3]
    drop = model.encoder.layers[3].drop_path.train()
    torch.manual_seed(0)
    dropped = drop(torch.ones(20000, 1, 1))
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(drop.eval()(torch.ones(3, 1, 1)), torch.ones(3, 1, 1))


@torch.no_grad()
def test_bfloat16_runs_and_stays_near_float32():
    model, batch = tiny_model(VlmoForPreTraining), training_batch()
    exact = model(**batch).loss
    assert model.to(torch.bfloat16)(**batch).loss.item() == pytest.approx(exact.item(), rel=0.05)


def test_negatives_are_other_rows_even_when_the_softmax_saturates():
    torch.manual_seed(0)
    logits = torch.full((5, 5), -1e4).fill_diagonal_(1e4)
    logits[0, 3] = 0
    for _ in range(20):
        drawn = draw_negatives(logits)
        assert (drawn != torch.arange(5)).all() and drawn[0] == 3
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        draw_negatives(logits[:1, :1])


@torch.no_grad()
def test_an_answer_id_is_a_one_hot_soft_target():
    model, batch = tiny_model(VlmoForQuestionAnswering), tiny_batch()
    ids = torch.tensor([3, 0, 12, 5])
    soft = torch.nn.functional.one_hot(ids, 13).float()
    assert torch.equal(model(**batch, labels=ids).loss, model(**batch, labels=soft).loss)


@torch.no_grad()
def test_tuples_on_request():
    model = tiny_model(VlmoModel)
    states, pooled = model(**tiny_batch(), return_dict=False)
    assert states.shape == (4, 29, 32) and pooled.shape == (4, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_modules": ["ffm"]}, "expert_modules has 'ffm'"),
        ({"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
        ({"image_size": 33}, "image_size 33 is not a multiple of patch_size 8"),
        ({"num_fusion_layers": 5}, "num_fusion_layers is 5; expected 0 to 4"),
    ],
)
def test_a_wrong_configuration_is_refused_in_one_sentence(changes, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**changes)


def test_wrong_inputs_are_refused_in_one_sentence():
    model = tiny_model(VlmoModel)
    with pytest.raises(ValueError, match="expected input_ids, pixel_values or both; got neither"):
        model()
    with pytest.raises(ValueError, match="the text has 21 tokens, but this model takes at most 20"):
        model(torch.ones(1, 21, dtype=torch.long))
    with pytest.raises(ValueError, match="labels were given without mlm_input_ids"):
        tiny_model(VlmoForPreTraining)(**tiny_batch(), labels=torch.zeros(4, 12, dtype=torch.long))


def test_the_default_configuration_is_the_papers_base_size():
    config = VlmoConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_lower_layers) == (768, 12, 10)
    assert config.expert_layout["config"] == {"expert_modules": []}
