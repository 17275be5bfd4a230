"""RegMean and Fisher on a tiny BERT and a tiny CLIP: from batches to a merged folder, against float64."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
)

from hf_vlmerge.merging import collect_fisher, collect_grams, merge, open_source

NARROW = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
TABLES = [{"match": "*embedding*", "method": "linear"}]  # tables have no Gram


def bert(seed):
    torch.manual_seed(seed)
    config = BertConfig(**NARROW, vocab_size=30, max_position_embeddings=12, num_labels=3, initializer_range=0.3)
    ids = torch.randint(30, (10, 9))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(5)]
    return BertForSequenceClassification(config).eval(), batches, lambda m, b: m(**b).logits


TEXTS = {"input_ids": torch.arange(15).reshape(3, 5), "attention_mask": torch.ones(3, 5).long()}


def clip(seed):
    torch.manual_seed(seed)
    text = CLIPTextConfig(**NARROW, vocab_size=30, max_position_embeddings=6, eos_token_id=14)
    vision = CLIPVisionConfig(**NARROW, image_size=8, patch_size=4)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=6)).eval()
    batches = [{"pixel_values": torch.randn(5, 3, 8, 8)} for _ in range(2)]
    return model, batches, lambda m, b: m(**b, **TEXTS).logits_per_image  # three classes, by their texts


MODELS = pytest.mark.parametrize("make", [bert, clip], ids=["bert", "clip"])


def merged_from_files(tmp_path, made, collect, recipe):
    """Save models and statistics, and merge them by a recipe."""
    members = []
    for i, (model, batches, forward) in enumerate(made):
        model.save_pretrained(tmp_path / str(i))
        collect(model, batches, forward=forward, progress=False).save(tmp_path / f"{i}.safetensors")
        members.append({"model": str(tmp_path / str(i)), "statistics": str(tmp_path / f"{i}.safetensors")})
    merge({"models": members, **recipe}, tmp_path / "merged", progress=False)
    return open_source(tmp_path / "merged")


@torch.no_grad()
def inputs_in_float64(model, batches, forward):
    """All input rows of each linear layer."""
    rows: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            keep = lambda m, a, name=name: rows.setdefault(f"{name}.weight", []).append(a[0].flatten(0, -2))  # noqa: E731
            module.register_forward_pre_hook(keep)
    for batch in batches:
        forward(model, {k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
    return {name: torch.cat(own) for name, own in rows.items()}


@MODELS
def test_regmean(make, tmp_path):
    made = [make(seed) for seed in range(2)]
    recipe = {"merge_method": "regmean", "parameters": {"gamma": 0.9}, "rules": TABLES}
    merged = merged_from_files(tmp_path, made, collect_grams, recipe)
    exact = [deepcopy(model).double() for model, _, _ in made]
    inputs = [inputs_in_float64(m, b, f) for m, (_, b, f) in zip(exact, made, strict=True)]
    states = [m.state_dict() for m in exact]
    assert len(inputs[0]) > 12
    for name in merged:
        weights = [s[name] for s in states]
        if name in inputs[0]:
            grams = [x[name].T @ x[name] for x in inputs]
            grams = [0.9 * g + 0.1 * torch.diag(g.diagonal()) for g in grams]
            left = sum(w @ g for w, g in zip(weights, grams, strict=True))
            expected = torch.linalg.solve(sum(grams), left.T).T
        else:
            expected = sum(weights) / 2
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=1e-6, msg=lambda t, n=name: n + t)


@MODELS
def test_fisher(make, tmp_path):
    made = [make(seed) for seed in range(2)]
    merged = merged_from_files(tmp_path, made, expected_fisher, {"merge_method": "fisher"})
    fishers = [fisher_in_float64(deepcopy(m).double(), b, f) for m, b, f in made]
    norms = [sum(float(f.square().sum()) for f in own.values()) ** 0.5 for own in fishers]
    count = sum(f.numel() for f in fishers[0].values())
    states = [m.state_dict() for m, _, _ in made]
    for name, own in fishers[0].items():
        f = [own, fishers[1][name]]
        f = [x.clamp(min=1e-6 * n / count**0.5) / n for x, n in zip(f, norms, strict=True)]
        expected = sum(s[name].double() * x for s, x in zip(states, f, strict=True)) / sum(f)
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=1e-6, msg=lambda t, n=name: n + t)


def expected_fisher(model, batches, **options):
    """Collected in float64: gradients that cancel have few digits in float32."""
    batches = [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches]
    return collect_fisher(deepcopy(model).double(), batches, labels="expected", **options)


def fisher_in_float64(model, batches, forward):
    """E over samples and the model's own labels of the squared gradient of log p."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    samples = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(len(next(iter(b.values()))))]
    for sample in samples:
        sample = {k: v.double() if v.is_floating_point() else v for k, v in sample.items()}
        log_p = forward(model, sample)[0].log_softmax(-1)
        for y, score in enumerate(log_p):
            model.zero_grad()
            score.backward(retain_graph=True)
            for name, p in model.named_parameters():
                if p.grad is not None:
                    sums[name] += log_p[y].detach().exp() * p.grad**2
    return {name: total.detach() / len(samples) for name, total in sums.items()}
