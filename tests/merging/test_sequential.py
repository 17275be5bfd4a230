"""RegMean++: against a float64 loop on a tiny network, and on tiny transformers."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

from hf_vlmerge.merging import MergeError
from hf_vlmerge.merging.sequential import Replay, averaged, regmean_plus_plus


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, scale):
        return x + self.down(self.up(x).tanh()) * scale


class Network(nn.Module):
    """Three blocks and a head. With ``skip`` the last block receives the first one's output as well."""

    def __init__(self, seed, skip=False):
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.blocks, self.head = nn.Linear(3, 6), nn.ModuleList(Block(6) for _ in range(3)), nn.Linear(6, 2)
        self.skip = skip

    def forward(self, x):
        first = x = self.blocks[0](self.stem(x), scale=0.5)
        x = self.blocks[1](x, scale=0.5)
        return self.head(self.blocks[2](x + first if self.skip else x, scale=0.5))


def data(members, batches=2):
    return [[{"x": torch.randn(4, 5, 3)} for _ in range(batches)] for _ in range(members)]


def oracle(models, batches, gamma):
    """The paper's loop in float64, for Network; gives the merged weights by name."""
    states = [{k: v.double() for k, v in m.state_dict().items()} for m in models]
    merged = {k: sum(s[k] for s in states) / len(states) for k in states[0]}
    x = [torch.cat([b["x"] for b in own]).double().reshape(-1, 3) for own in batches]
    x = [each @ merged["stem.weight"].T + merged["stem.bias"] for each in x]

    def block(w, i, x):
        hidden = (x @ w[f"blocks.{i}.up.weight"].T + w[f"blocks.{i}.up.bias"]).tanh()
        return hidden, x + (hidden @ w[f"blocks.{i}.down.weight"].T + w[f"blocks.{i}.down.bias"]) * 0.5

    first = None
    for i in range(3):
        given = [a + b for a, b in zip(x, first, strict=True)] if i == 2 and models[0].skip else x
        inputs = {"up": given, "down": [block(s, i, g)[0] for s, g in zip(states, given, strict=True)]}
        for layer, own in inputs.items():
            grams = [g.T @ g / len(g) for g in own]
            grams = [gamma * g + (1 - gamma) * torch.diag(g.diagonal()) for g in grams]
            weight = f"blocks.{i}.{layer}.weight"
            left = sum(s[weight] @ g for s, g in zip(states, grams, strict=True))
            merged[weight] = torch.linalg.solve(sum(grams), left.T).T
        x = [block(merged, i, g)[1] for g in given]
        first = x if i == 0 else first
    return merged


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip connection"])
def test_it_is_the_loop_of_the_paper(skip):
    models = [Network(seed, skip) for seed in range(3)]
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    batches = data(3)
    merged = regmean_plus_plus(models, batches, gamma=0.9, progress=False)
    expected = oracle(models, batches, 0.9)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=2e-6, msg=lambda t, n=name: n + t)
    assert all(v.equal(b[k]) for m, b in zip(models, before, strict=True) for k, v in m.state_dict().items())
    assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in merged.modules())


def test_merged_blocks_are_skipped_where_that_changes_nothing():
    for skip, expected in ((False, ["blocks.0", "blocks.1"]), (True, [])):
        model, batches = Network(0, skip), data(1)
        replay = Replay(model, lambda m, b: m(**b), batches)
        with torch.no_grad():
            for name in ("blocks.0", "blocks.1"):
                replay.advance(name, replay.inputs(name))
            assert replay.skippable("blocks.2") == expected


def test_the_input_of_a_later_block_is_that_of_the_merged_prefix():
    """Layer 0 is what RegMean gives; later layers differ, and by more than rounding."""
    models, batches = [Network(seed) for seed in range(2)], data(2)
    merged = regmean_plus_plus(models, batches, progress=False)
    alone = oracle([models[0]] * 2, [batches[0]] * 2, 0.95)
    torch.testing.assert_close(alone["blocks.2.up.weight"].float(), models[0].blocks[2].up.weight.detach())
    assert not torch.allclose(merged.blocks[2].up.weight, averaged(models).blocks[2].up.weight, atol=1e-3)


TEXT = {"vocab_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
IMAGE = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2}
NARROW = {"hidden_size": 8, "intermediate_size": 16}
T5 = {"vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "use_cache": True}


def bert(seed):
    torch.manual_seed(seed)
    model = BertModel(BertConfig(**TEXT, **NARROW, initializer_range=0.3))
    return model, {"input_ids": torch.randint(40, (4, 7)), "attention_mask": torch.ones(4, 7).long()}


def clip(seed):
    torch.manual_seed(seed)
    return CLIPVisionModel(CLIPVisionConfig(**IMAGE, **NARROW)), {"pixel_values": torch.randn(4, 3, 8, 8)}


def t5(seed):
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**T5))
    return model, {"input_ids": torch.randint(40, (3, 6)), "decoder_input_ids": torch.randint(40, (3, 5))}


@pytest.mark.parametrize("make", [bert, clip, t5], ids=lambda make: make.__name__)
def test_tiny_transformers(make):
    made = [make(seed) for seed in range(2)]
    models, batches = [m for m, _ in made], [[b] for _, b in made]
    merged = regmean_plus_plus(models, batches, progress=False)
    mean = averaged(models)
    changed = [k for k, v in merged.state_dict().items() if not v.equal(mean.state_dict()[k])]
    linear = {f"{n}.weight" for n, m in merged.named_modules() if isinstance(m, nn.Linear) and any(map(str.isdigit, n))}
    assert set(changed) == linear
    assert make is not t5 or (models[0].config.use_cache and merged.config.use_cache)
    twins = regmean_plus_plus([models[0]] * 2, [batches[0]] * 2, progress=False)
    with torch.no_grad():
        ours, own = (m.eval()(**batches[0][0])[0] for m in (twins, models[0]))
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_tiny_bert_in_float64():
    """Every linear layer of a merged BERT against the formula, from activations that hooks of this test record."""
    made = [bert(seed) for seed in range(2)]
    models, batches = [m.eval() for m, _ in made], [b for _, b in made]
    merged = regmean_plus_plus(models, [[b] for b in batches], gamma=0.9, progress=False).double()
    for i in range(3):
        given = [recorded(merged, f"encoder.layer.{i}", batch) for batch in batches]
        for layer in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"):
            grams = []
            for model, inputs in zip(models, given, strict=True):
                x = recorded_in_block(model.double().encoder.layer[i], layer, inputs)
                grams.append(0.9 * x.T @ x / len(x) + 0.1 * torch.diag((x.T @ x / len(x)).diagonal()))
            weights = [m.encoder.layer[i].get_submodule(layer).weight.double() for m in models]
            left = sum(w @ g for w, g in zip(weights, grams, strict=True))
            expected = torch.linalg.solve(sum(grams), left.T).T
            own = merged.encoder.layer[i].get_submodule(layer).weight
            assert float((own - expected).abs().max()) < 1e-5


@torch.no_grad()
def recorded(model, name, batch):
    kept = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, a, k: kept.append((a, k)), with_kwargs=True)
    model.eval()(**batch)
    hook.remove()
    return kept[0]


@torch.no_grad()
def recorded_in_block(block, layer, inputs):
    kept = []
    hook = block.get_submodule(layer).register_forward_pre_hook(lambda m, a: kept.append(a[0]))
    block(*inputs[0], **inputs[1])
    hook.remove()
    return kept[0].reshape(-1, kept[0].shape[-1])


def test_what_cannot_be_merged_in_sequence():
    models = [Network(0), Network(1)]
    with pytest.raises(MergeError, match="2 models need as many iterables of batches, not 1"):
        regmean_plus_plus(models, data(1))
    with pytest.raises(MergeError, match="every member needs at least one batch"):
        regmean_plus_plus(models, [data(1)[0], []])
    with pytest.raises(MergeError, match=r"no block is called \['block.*'\]"):
        regmean_plus_plus(models, data(2), blocks="block.*")
    with pytest.raises(MergeError, match=r"no linear layer is called \['downs'\]"):
        regmean_plus_plus(models, data(2), modules="downs")
    with pytest.raises(MergeError, match=r"the block blocks\.0 is called more than once a batch"):
        regmean_plus_plus(models, data(2), forward=lambda m, b: (m(**b), m(**b)))
    with pytest.raises(MergeError, match="is not in all models"):
        regmean_plus_plus([models[0], nn.Linear(2, 2)], data(2))
    other = Network(2)
    other.head = nn.Linear(6, 3)
    with pytest.raises(MergeError, match=r"head.weight: \(2, 6\) in the first model, \(3, 6\) in model 1"):
        regmean_plus_plus([models[0], other], data(2))
