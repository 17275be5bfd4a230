"""Every merge of a checkpoint of the research code, there and back through the command, against formulas in NumPy.

The formulas are written anew here, in float64, over the original's names: experts are `v`, `l`, `vl`, and the merged
name has no such component (arXiv 2304.14933, section 4; RegMean: arXiv 2212.09849, equation 2).
"""

import re

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from hf_vlmerge import VlmoConfig, VlmoForPreTraining
from hf_vlmerge.cli import main
from hf_vlmerge.conversion.convert_vlmo_to_hf import convert_to_hf, convert_to_original, plan_conversion

VARIANTS = {
    "modality_specific": ["attention", "ffn", "layer_norm"],
    "custom_attention": ["attention"],
    "custom_ffn": ["ffn"],
    "custom_layer_norm": ["layer_norm"],
}
TINY = {
    "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12,
    "image_size": 16, "patch_size": 8, "max_text_length": 5, "num_text_positions": 6, "num_fusion_layers": 1,
}  # fmt: skip
FUSION = 2  # the first fusion layer
CHOICES = {  # experts of fusion layers, and the rule that says so
    "all": (["v", "l", "vl"], None),
    "retrieval": (["v", "l"], ["vision", "language"]),
    "questions": (["vl"], ["vision_language"]),
}
EXPERT = re.compile(r"(transformer\.blocks\.(\d+)\.(?:norm1|norm2|attn|mlp))\.(v|l|vl)\.(.*)")


def interpolation(ratio):
    def merge(name, w, base, grams):
        if len(w) == 1:
            return w["vl"]
        pair = ratio * w["v"] + (1 - ratio) * w["l"]
        return 2 / 3 * pair + 1 / 3 * w["vl"] if "vl" in w else pair

    return merge


def arithmetic(scale):
    return lambda name, w, base, grams: base + scale * sum(x - base for x in w.values())


def sequential(scale):
    """The released code: the running sum is the central weight itself; of a lone expert the factor is 1."""

    def merge(name, w, base, grams):
        if len(w) == 1:
            return w["vl"]
        for x in w.values():
            base = base + scale * (x - base)
        return base

    return merge


def regmean(gamma):
    def merge(name, w, base, grams):
        if w["v" if "v" in w else "vl"].ndim != 2:
            return sum(w.values()) / len(w)
        scaled = {e: gamma * grams[name, e] + (1 - gamma) * np.diag(np.diag(grams[name, e])) for e in w}
        return sum(w[e] @ scaled[e] for e in w) @ np.linalg.inv(sum(scaled.values()))

    return merge


MERGES = [
    ("interpolation", {"ratio": 0.25}, interpolation(0.25)),
    ("modality_arithmetic", {"lambda": 1.0}, arithmetic(1.0)),
    ("modality_arithmetic", {"lambda": 0.25, "sequential": True}, sequential(0.25)),
    ("regmean", {"gamma": 0.1}, regmean(0.1)),
]


def research_checkpoint(expert_modules, path, seed):
    """A checkpoint in the research code's layout, with values of ordinary size; its tensors in float64."""
    torch.manual_seed(seed)
    model = VlmoForPreTraining(VlmoConfig(**TINY, expert_modules=expert_modules))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(path.with_suffix(".ours"))
    convert_to_original(path.with_suffix(".ours"), path)
    return {key: value.double().numpy() for key, value in torch.load(path)["state_dict"].items()}


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    path = tmp_path_factory.mktemp("seed") / "seed.ckpt"
    tensors = research_checkpoint([], path, seed=0)
    convert_to_hf(path, path.with_suffix(""), num_fusion_layers=1)
    return path.with_suffix(""), tensors


@pytest.fixture(scope="module", params=VARIANTS)
def specific(request, tmp_path_factory):
    """The converted folder, the original's tensors, and Grams of every linear layer by merged name and expert."""
    path = tmp_path_factory.mktemp("specific") / "specific.ckpt"
    tensors = research_checkpoint(VARIANTS[request.param], path, seed=1)
    convert_to_hf(path, path.with_suffix(""))
    random = np.random.default_rng(0)
    grams, keys = {}, {}
    ours = plan_conversion({key: value.shape for key, value in tensors.items()}).table
    for key, value in tensors.items():
        if (found := EXPERT.match(key)) and value.ndim == 2:
            x = random.normal(size=(197 if found[3] == "v" else 40, value.shape[1]))
            grams[f"{found[1]}.{found[4]}", found[3]] = x.T @ x
            keys[f"{found[1]}.{found[4]}", found[3]] = ours[key]
    return path.with_suffix(""), tensors, grams, keys


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("method", "parameters", "formula"), MERGES, ids=lambda p: "" if callable(p) else str(p))
def test_a_merge_is_its_formula(specific, seed, method, parameters, formula, choice, tmp_path):
    folder, tensors, grams, keys = specific
    experts, members = CHOICES[choice]
    # as collected: for retrieval by an image and a text pass (no vl), for questions by a joint pass
    used = {key for key in grams if key[1] in experts or f"blocks.{FUSION}" not in key[0]}
    save_file(
        {f"gram.{keys[key]}": torch.from_numpy(grams[key]) for key in used} or {"none": torch.zeros(1)},
        tmp_path / "grams.safetensors",
    )
    recipe = {
        "merge_method": method,
        "experts_of": str(folder),
        "base_model": str(seed[0]),
        "statistics": str(tmp_path / "grams.safetensors"),
        "parameters": parameters,
        "rules": [{"has": "vision_language", "members": members}] if members else [],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "merged"), "--no-fsync"]) == 0
    assert main(["convert", "vlmo", str(tmp_path / "merged"), str(tmp_path / "back.ckpt"), "--to-original"]) == 0

    expected, members_of = {}, {}
    for key, value in tensors.items():
        if found := EXPERT.match(key):
            if int(found[2]) < FUSION or found[3] in experts:
                members_of.setdefault(f"{found[1]}.{found[4]}", {})[found[3]] = value
        else:
            expected[key] = value
    for name, found in members_of.items():
        in_order = {expert: found[expert] for expert in ("v", "l", "vl") if expert in found}
        expected[name] = formula(name, in_order, seed[1][name], grams)
    written = torch.load(tmp_path / "back.ckpt")["state_dict"]
    assert written.keys() == expected.keys()
    assert max(np.abs(written[key].double().numpy() - expected[key]).max() for key in written) < 1e-6
