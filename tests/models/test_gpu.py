"""On a GPU both models, the collectors of statistics and the Trainer give what they give on the CPU."""

import copy

import pytest
import torch

from hf_vlmerge.merging import collect_fisher, collect_grams, regmean_plus_plus
from hf_vlmerge.models.unival.generation_unival import AnswerTrie
from hf_vlmerge.models.unival.modeling_unival import UnivalForConditionalGeneration
from hf_vlmerge.models.vlmo.modeling_vlmo import (
    VlmoForImageAndTextRetrieval,
    VlmoForPreTraining,
    VlmoForQuestionAnswering,
    VlmoModel,
)
from hf_vlmerge.training.arguments import VlmergeTrainingArguments
from hf_vlmerge.training.trainer import VlmergeTrainer
from tests.models.unival import tiny as unival
from tests.models.unival.test_image_codes import small
from tests.models.vlmo import tiny as vlmo

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def all_digits(monkeypatch):
    """No convolutions in TensorFloat-32, which has 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def there(batch: dict) -> dict:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.is_cuda and found.dtype == expected.dtype
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=5e-5 * scale)


def gradients_agree(model: torch.nn.Module, batch: dict) -> None:
    """Losses and the gradient of every parameter."""
    other = copy.deepcopy(model).cuda()
    loss, found = model(**batch).loss, other(**there(batch)).loss
    close(found, loss)
    loss.backward()
    found.backward()
    for (name, parameter), same in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (parameter.grad is None) == (same.grad is None), name
        if parameter.grad is not None:
            close(same.grad, parameter.grad)


# UnIVAL


def unival_model(**changes) -> UnivalForConditionalGeneration:
    return unival.tiny_model(UnivalForConditionalGeneration, **changes)


def inputs(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_unival_on_a_mixed_batch(attention):
    gradients_agree(unival_model(attn_implementation=attention), unival.mixed_batch())


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_unival_says_the_same(beams):
    model, batch = unival_model(), inputs(unival.mixed_batch())
    options = {"num_beams": beams, "max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}
    expected = model.generate(**batch, **options)
    found = model.cuda().generate(**there(batch), **options)
    assert found.sequences.tolist() == expected.sequences.tolist()
    if beams > 1:
        close(found.sequences_scores, expected.sequences_scores)


@torch.no_grad()
def test_unival_chooses_the_same_answers():
    model, batch = unival_model(), inputs(unival.mixed_batch((0, 1, 2, -1)))
    trie = AnswerTrie([[10], [10, 11], [12, 13, 14], [20, 21], [33], [12, 13]])
    scores, said = model.score_candidates(batch, trie), model.generate(**batch, answer_trie=trie, num_beams=2)
    model.cuda()
    close(model.score_candidates(there(batch), trie), scores)
    assert model.generate(**there(batch), answer_trie=trie, num_beams=2).tolist() == said.tolist()


@torch.no_grad()
def test_unival_in_bfloat16():
    model, batch = unival_model().cuda(), there(unival.mixed_batch())
    expected = model(**batch).logits
    with torch.autocast("cuda", torch.bfloat16):
        mixed = model(**batch).logits
    half = model.bfloat16()(**batch).logits
    for found in (mixed, half):
        assert (found.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@torch.no_grad()
def test_image_codes():
    model, pixels = small(), torch.rand(2, 3, 32, 32) * 2 - 1
    codes = model.encode(pixels)
    images = model.decode(codes)
    model.cuda()
    assert model.encode(pixels.cuda()).tolist() == codes.tolist()
    close(model.decode(codes.cuda()), images)


# VLMo


@pytest.mark.parametrize("architecture", vlmo.ARCHITECTURES)
def test_vlmo_pretraining(architecture):
    gradients_agree(vlmo.tiny_model(VlmoForPreTraining, architecture), vlmo.training_batch())


@pytest.mark.parametrize("model_class", [VlmoModel, VlmoForImageAndTextRetrieval, VlmoForQuestionAnswering])
@torch.no_grad()
def test_vlmo_heads(model_class):
    model, batch = vlmo.tiny_model(model_class), vlmo.tiny_batch()
    expected = model(**batch)
    found = model.cuda()(**there(batch))
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            close(found[name], value)


# Statistics and training


def test_statistics():
    model, batches = vlmo.tiny_model(VlmoForQuestionAnswering), [vlmo.tiny_batch(seed=i) for i in range(2)]
    other = copy.deepcopy(model).cuda()
    for collect in (collect_grams, collect_fisher):
        expected, found = (collect(each, batches, progress=False) for each in (model, other))
        assert found.sums.keys() == expected.sums.keys() and found.tokens == expected.tokens
        for key, value in expected.sums.items():
            torch.testing.assert_close(found.sums[key].cpu(), value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))


@torch.no_grad()
def test_regmean_plus_plus():
    models = [vlmo.tiny_model(VlmoModel, seed=seed) for seed in range(2)]
    batches = [[{"input_ids": vlmo.tiny_batch(64, seed)["input_ids"]}] for seed in range(2)]
    expected = regmean_plus_plus(models, batches, progress=False).state_dict()
    found = regmean_plus_plus([model.cuda() for model in models], batches, progress=False).state_dict()
    for key, value in expected.items():
        if value.is_floating_point():
            close(found[key], value)


def test_the_trainer(tmp_path):
    rows = [{name: value[0] for name, value in unival.single_row(unival.tiny_batch(), 0).items()}] * 8
    settings = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    losses = {}
    for name, own in {"cpu": {"use_cpu": True}, "cuda": {}, "bf16": {"bf16": True}}.items():
        arguments = VlmergeTrainingArguments(str(tmp_path / name), learning_rate=1e-3, **settings, **own)
        run = VlmergeTrainer(model=unival_model(), args=arguments, train_dataset=rows)
        run.train()
        assert next(run.model.parameters()).is_cuda == (name != "cpu")
        losses[name] = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert len(losses["cpu"]) == 3 and losses["cpu"][-1] < losses["cpu"][0]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)
    assert losses["bf16"] == pytest.approx(losses["cpu"], rel=5e-2)
