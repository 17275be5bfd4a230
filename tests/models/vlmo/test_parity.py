"""Numbers of the original code at tiny size (../shared/goldens/vlmo): outputs, losses, gradients, resolution change."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hf_vlmerge.conversion.vlmo_keys import NAMINGS, key_table
from hf_vlmerge.models.vlmo.modeling_vlmo import (
    VlmoForImageAndTextRetrieval,
    VlmoForPreTraining,
    VlmoForQuestionAnswering,
)
from tests.models.vlmo.tiny import ARCHITECTURES, tiny_config

VARIANTS = {  # name of the reference files -> architecture; this custom layer norm attends jointly everywhere
    "msa": "modality_specific",
    "maa": "modality_agnostic",
    "custom_attn": "custom_attention",
    "custom_ln": "custom_layer_norm",
}
variants = pytest.mark.parametrize("variant", VARIANTS)
implementations = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


class Reference:
    """The reference files of one variant, and our models with its weights."""

    def __init__(self, folder, variant: str, implementation: str = "eager"):
        self.folder, self.variant, self.implementation = folder / "goldens" / "vlmo", variant, implementation
        self.inputs = self.load("inputs")
        self.outputs = self.load(f"{variant}.outputs")
        self.facts = json.loads((self.folder / "goldens.json").read_text())
        self.batch = {
            "input_ids": self.inputs["text_ids"],
            "attention_mask": self.inputs["text_masks"],
            "pixel_values": self.inputs["pixel_values"],
        }

    def load(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def table(self, head: str) -> dict[str, str]:
        return key_table(head, NAMINGS["research"], ARCHITECTURES[VARIANTS[self.variant]], 4, 2)

    def model(self, model_class, head: str, scaled=(), **changes):
        joint = self.variant == "custom_ln"
        config = tiny_config(
            VARIANTS[self.variant],
            attn_implementation=self.implementation,
            joint_attention_in_lower_layers=joint,
            **changes,
        )
        original = self.load(f"{self.variant}.state_dict")
        tensors = {ours: original[name] * (0.001 if name in scaled else 1) for name, ours in self.table(head).items()}
        model = model_class(config).eval()
        model.load_state_dict(tensors)
        return model

    def check(self, found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor] | None = None) -> None:
        reference = self.outputs if reference is None else reference
        differences = {name: (tensor - reference[name]).abs().max().item() for name, tensor in found.items()}
        assert max(differences.values()) < 1e-5, differences

    def check_gradients(self, model, head: str, facts: dict[str, float]) -> None:
        parameters, table = dict(model.named_parameters()), self.table(head)
        assert {table[name] for name in facts} == {name for name, p in parameters.items() if p.grad is not None}
        for name, norm in facts.items():
            assert parameters[table[name]].grad.norm().item() == pytest.approx(norm, rel=1e-4), name


def outputs_of(model, reference, pixel_values=None) -> dict[str, torch.Tensor]:
    """Everything that the reference files name, from a pre-training model."""
    ids, mask = reference.batch["input_ids"], reference.batch["attention_mask"]
    pixels = reference.batch["pixel_values"] if pixel_values is None else pixel_values
    vlmo, itc, text_length = model.vlmo, model.itc, ids.shape[1]
    passes = {"image_only": {"pixel_values": pixels}, "text_only": {"input_ids": ids, "attention_mask": mask}}
    passes["joint"] = passes["image_only"] | passes["text_only"]
    found = {}
    for name, inputs in passes.items():
        output = vlmo(**inputs, output_hidden_states=True)
        found.update({f"{name}.hidden.{i}": states for i, states in enumerate(output.hidden_states[1:])})
        if name != "joint":
            found[f"embeddings.{name.split('_')[0]}"] = output.hidden_states[0]
            found[f"{name}.last_hidden_state"] = output.last_hidden_state
    found["joint.text_last_hidden_state"] = output.last_hidden_state[:, :text_length]
    found["joint.image_last_hidden_state"] = output.last_hidden_state[:, text_length:]
    found["joint.pooler_output"] = output.pooler_output

    heads = model(ids, pixels, mask)
    found["joint.itm_logits"] = heads.itm_logits
    found["itc.logits_per_image"] = heads.logits_per_image
    found["image_only.itc_embeds"], found["text_only.itc_embeds"] = heads.image_embeds, heads.text_embeds
    image = vlmo.upper(vlmo.lower(vlmo.image_stream(pixels)), "vision_language")
    text = vlmo.upper(vlmo.lower(vlmo.text_stream(ids, mask)), "vision_language")
    image = torch.nn.functional.normalize(itc.image_vl_projection(image[:, 0]), dim=-1)
    text = torch.nn.functional.normalize(itc.text_vl_projection(text[:, 0]), dim=-1)
    found["image_only.itc_vl_embeds"], found["text_only.itc_vl_embeds"] = image, text
    found["itc.vl_logits_per_image"] = itc.similarity(image, text, itc.logit_vl_scale)
    masked = reference.inputs["text_ids_mlm"]
    found["joint_mlm.mlm_logits"] = model(masked, pixels, mask).mlm_logits
    found["joint_mlm.text_last_hidden_state"] = vlmo(masked, mask, pixels).last_hidden_state[:, :text_length]
    return found


@implementations
@variants
@torch.no_grad()
def test_outputs(shared, variant, implementation):
    reference = Reference(shared, variant, implementation)
    reference.check(outputs_of(reference.model(VlmoForPreTraining, "pretraining"), reference))


@implementations
@variants
def test_pretraining_step(shared, variant, implementation):
    reference = Reference(shared, variant, implementation)
    model, outputs = reference.model(VlmoForPreTraining, "pretraining"), reference.outputs
    step = model(
        **reference.batch,
        mlm_input_ids=reference.inputs["text_ids_mlm"],
        labels=reference.inputs["text_labels_mlm"],
        negative_image_index=outputs["itm.negative_image_index"],
        negative_text_index=outputs["itm.negative_text_index"],
    )
    reference.check({"itm.logits": step.itm_logits})
    assert step.itc_loss.item() == pytest.approx(outputs["loss.itc_total"].item(), rel=1e-5)
    assert step.itm_loss.item() == pytest.approx(outputs["loss.itm"].item(), rel=1e-5)
    assert 0.25 * step.mlm_loss.item() == pytest.approx(outputs["loss.mlm_times_0.25"].item(), rel=1e-5)
    assert step.loss.item() == pytest.approx(outputs["loss.pretrain_total"].item(), rel=1e-5)
    step.loss.backward()
    reference.check_gradients(model, "pretraining", reference.facts["variants"][variant]["pretrain_grad_l2"])


@variants
def test_question_answering(shared, variant):
    reference = Reference(shared, variant)
    model = reference.model(VlmoForQuestionAnswering, "vqa")
    output = model(**reference.batch, labels=reference.outputs["vqa.targets"])
    reference.check({"vqa.logits": output.logits, "joint.vqa_logits": output.logits})
    assert output.loss.item() == pytest.approx(reference.outputs["loss.vqa"].item(), rel=1e-5)
    output.loss.backward()
    reference.check_gradients(model, "vqa", reference.facts["variants"][variant]["vqa_grad_l2"])


@variants
@torch.no_grad()
def test_retrieval(shared, variant):
    reference = Reference(shared, variant)
    output = reference.model(VlmoForImageAndTextRetrieval, "retrieval")(**reference.batch, return_loss=True)
    reference.check({"irtr.logits_per_image": output.logits_per_image})
    assert output.loss.item() == pytest.approx(reference.outputs["loss.irtr"].item(), rel=1e-5)


@torch.no_grad()
def test_every_layer_norm_epsilon(shared):
    """With inputs scaled down a wrong epsilon shows; with ordinary ones it hides below the tolerance."""
    reference = Reference(shared, "msa")
    expected = reference.load("eps_probe.msa.outputs")
    scaled = reference.facts["eps_probe_scaled_tensors"]
    found = outputs_of(reference.model(VlmoForPreTraining, "pretraining", scaled), reference)
    found["joint.vqa_logits"] = reference.model(VlmoForQuestionAnswering, "vqa", scaled)(**reference.batch).logits
    compared = {name: tensor for name, tensor in found.items() if name in expected}
    assert {"joint.vqa_logits", "joint_mlm.mlm_logits", "joint.pooler_output"} <= compared.keys()
    reference.check(compared, expected)


@torch.no_grad()
def test_resolution_change(shared):
    reference = Reference(shared, "msa")
    expected = reference.load("resize_32_to_48.msa")
    model = reference.model(VlmoForPreTraining, "pretraining")
    model.resize_image_size(48)
    reference.check({"relative_position_bias_table": model.vlmo.encoder.relative_position_bias_table}, expected)
    for name, key in {"input_ids": "input.text_ids", "attention_mask": "input.text_masks"}.items():
        reference.batch[name] = expected[key]
    reference.inputs["text_ids_mlm"] = expected["input.text_ids_mlm"]
    found = outputs_of(model, reference, expected["input.pixel_values"])
    answers = reference.model(VlmoForQuestionAnswering, "vqa")
    answers.resize_image_size(48)
    found["joint.vqa_logits"] = answers(**reference.batch | {"pixel_values": expected["input.pixel_values"]}).logits
    compared = {name: tensor for name, tensor in found.items() if name in expected}
    assert len(compared) == 13
    reference.check(compared, expected)
