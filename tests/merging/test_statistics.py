"""Gram collection: sums, tokens, padding, shared entries, and the file."""

import json

import pytest
import torch
from torch import nn

from hf_vlmerge.merging import MergeError, collect_grams, merge_tensors, open_source
from hf_vlmerge.merging.statistics import statistic_key, token_count


class Attention(nn.Module):
    """Three linear layers fed by one tensor, and one fed by their sum."""

    def __init__(self, width=4):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, 2)
        self.unused = nn.Linear(width, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, attention_mask=None):
        x = self.dropout(x)
        return self.out(self.q(x) + self.k(x) + self.v(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Attention()


def batches(*shapes):
    torch.manual_seed(1)
    return [{"x": torch.randn(shape)} for shape in shapes]


def test_sums_and_token_counts(model):
    data = batches((2, 3, 4), (1, 3, 4))
    model.train()
    grams = collect_grams(model, data, progress=False)
    x = torch.cat([b["x"].reshape(-1, 4) for b in data]).double()
    assert grams.sums.keys() == {"q.weight", "k.weight", "v.weight", "out.weight"}
    torch.testing.assert_close(grams.sums["q.weight"], x.T @ x, rtol=1e-6, atol=1e-6)
    hidden = sum(layer(x.float()) for layer in (model.q, model.k, model.v)).double()
    torch.testing.assert_close(grams.sums["out.weight"], hidden.T @ hidden, rtol=1e-6, atol=1e-6)
    assert set(grams.tokens.values()) == {9} and grams.samples == 3
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())


def test_layers_fed_by_one_input_share_an_entry(model, tmp_path):
    grams = collect_grams(model, batches((2, 3, 4)), progress=False, metadata={"data": "noise"})
    assert grams.shared() == {"k.weight": "q.weight", "v.weight": "q.weight"}
    grams.save(tmp_path / "grams.safetensors")
    source = open_source(tmp_path / "grams.safetensors")
    assert set(source) == {"gram.q.weight", "gram.out.weight"} and source.dtype("gram.q.weight") == torch.float32
    key = statistic_key(source, "gram", "v.weight")
    assert key == "gram.q.weight" and token_count(source, key) == 6
    assert statistic_key(source, "gram", "unused.weight") is None
    metadata = {name: json.loads(text) for name, text in source.metadata.items() if name != "format"}
    assert metadata["kind"] == "sum" and metadata["padding"] == "include" and metadata["data"] == "noise"
    grams.save(tmp_path / "grams.safetensors", dtype=torch.float64)
    assert open_source(tmp_path / "grams.safetensors")["gram.q.weight"].equal(grams.sums["q.weight"])
    assert [p.name for p in tmp_path.iterdir()] == ["grams.safetensors"]


def test_an_input_that_is_written_to_is_no_longer_the_same(model):
    def forward(model, batch):
        x = batch["x"]
        model.q(x)
        x.mul_(2)
        model.k(x)

    data = batches((2, 3, 4))
    x = data[0]["x"].clone().double().reshape(-1, 4)
    grams = collect_grams(model, data, forward=forward, progress=False).sums
    torch.testing.assert_close(grams["q.weight"], x.T @ x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grams["k.weight"], 4 * x.T @ x, rtol=1e-6, atol=1e-6)


def test_a_choice_of_modules_and_a_limit(model):
    grams = collect_grams(model, iter(batches((2, 3, 4), (2, 3, 4))), modules=["q", "o*"], limit=1, progress=False)
    assert grams.sums.keys() == {"q.weight", "out.weight"} and grams.samples == 2
    with pytest.raises(MergeError, match=r"no linear layer is called \['ot'\]; did you mean 'out'"):
        collect_grams(model, [], modules="ot")


TEXT = torch.tensor([[1, 1, 1], [1, 0, 0]])


@pytest.mark.parametrize(
    ("rows", "counted"),
    [
        (3, TEXT.bool()),
        (5, torch.ones(2, 5).bool()),
        (8, torch.cat([TEXT, torch.ones(2, 5).long()], 1).bool()),
        (1, None),
    ],
    ids=["text", "image", "joint", "pooled"],
)
def test_padding_is_left_out_by_the_number_of_tokens(model, rows, counted):
    x = torch.randn(2, rows, 4)
    batch = {"x": x, "attention_mask": TEXT}
    grams = collect_grams(model, [batch], padding="exclude", image_tokens=5, progress=False)
    kept = (x.reshape(-1, 4) if counted is None else x[counted]).double()
    torch.testing.assert_close(grams.sums["q.weight"], kept.T @ kept, rtol=1e-6, atol=1e-6)
    assert grams.tokens["q.weight"] == len(kept)
    flat = {"x": x.reshape(-1, 4), "attention_mask": TEXT}
    again = collect_grams(model, [flat], padding="exclude", image_tokens=5, progress=False)
    assert again.tokens == grams.tokens


def test_padding_by_a_mask_of_ones_own(model):
    x = torch.randn(2, 7, 4)
    mask = torch.rand(2, 7) > 0.5
    options = {"padding": "exclude", "progress": False}
    only_q = lambda name, x, batch: mask if name == "q" else None  # noqa: E731
    grams = collect_grams(model, [{"x": x}], token_mask=only_q, **options)
    assert grams.tokens["q.weight"] == int(mask.sum()) and grams.tokens["k.weight"] == 14
    with pytest.raises(MergeError, match=r"q: the token mask is \(2, 6\), the input \(2, 7, 4\)"):
        collect_grams(model, [{"x": x}], token_mask=lambda *_: mask[:, :6], **options)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ({"x": torch.ones(2, 3, 4)}, {"padding": "exclude"}, "needs attention_mask in every batch"),
        (
            {"x": torch.ones(2, 6, 4), "attention_mask": TEXT},
            {"padding": "exclude"},
            "q: 6 tokens a sample are neither text",
        ),
        (
            {"x": torch.ones(2, 3, 4), "attention_mask": TEXT},
            {"padding": "exclude", "image_tokens": 3},
            "cannot be told apart",
        ),
        (
            {"x": torch.ones(4, 3, 4), "attention_mask": TEXT},
            {"padding": "exclude"},
            "q: the input has 4 samples, attention_mask 2",
        ),
        ({"x": torch.ones(2, 3, 4)}, {"padding": "exlude"}, "padding is 'include' or 'exclude', not 'exlude'"),
    ],
)
def test_what_cannot_be_collected(model, batch, options, message):
    with pytest.raises(MergeError) as error:
        collect_grams(model, [batch], progress=False, **options)
    assert message in str(error.value)


def test_what_cannot_be_saved(model, tmp_path):
    grams = collect_grams(model, batches((2, 3, 4)), progress=False)
    with pytest.raises(MergeError, match=r"one \.safetensors file, not 'grams\.pt'"):
        grams.save(tmp_path / "grams.pt")
    grams.sums["out.weight"][0, 0] = float("nan")
    with pytest.raises(MergeError, match=r"the Gram matrix of out\.weight is not finite"):
        grams.save(tmp_path / "grams.safetensors")
    with pytest.raises(MergeError, match="no linear layer received an input"):
        collect_grams(model, [], progress=False).save(tmp_path / "grams.safetensors")
    assert not list(tmp_path.iterdir())


def test_means_use_the_token_counts_of_the_file(tmp_path):
    torch.manual_seed(0)
    models, sources = {}, {}
    for alias, tokens in (("a", 50), ("b", 5)):
        models[alias] = nn.Linear(4, 3, bias=False)
        data = [{"input": torch.randn(tokens, 4)}]
        collect_grams(models[alias], data, progress=False).save(tmp_path / f"{alias}.safetensors")
        sources[alias] = models[alias].state_dict()
    members = [{"model": n, "statistics": str(tmp_path / f"{n}.safetensors")} for n in "ab"]

    def error(**parameters):
        recipe = {"merge_method": "regmean", "models": members, "parameters": {"gamma": 1.0, **parameters}}
        return (merge_tensors(recipe, sources)["weight"] - models["a"].weight).norm()

    assert error(gram="sum") < error(gram="mean")  # the member with more tokens weighs more in sums


def test_one_sum_for_layers_that_are_always_fed_together(model):
    grams = collect_grams(model, batches((2, 3, 4), (1, 3, 4)), progress=False)
    assert grams.sums["k.weight"] is grams.sums["q.weight"] and grams.sums["v.weight"] is grams.sums["q.weight"]


def test_a_view_of_an_input_is_that_input_and_layers_fed_apart_have_their_own_sums(model):
    def forward(model, batch):
        x = batch["x"]
        model.q(x)
        model.k(x.view(x.shape))
        if len(x) == 1:  # in one batch only
            model.v(x.clone())
        else:
            model.v(x)

    data = batches((2, 3, 4), (1, 3, 4))
    grams = collect_grams(model, data, forward=forward, progress=False)
    x = torch.cat([b["x"].reshape(-1, 4) for b in data]).double()
    assert grams.sums["k.weight"] is grams.sums["q.weight"] and grams.sums["v.weight"] is not grams.sums["q.weight"]
    for name in ("q.weight", "v.weight"):
        torch.testing.assert_close(grams.sums[name], x.T @ x, rtol=1e-6, atol=1e-6)
        assert grams.tokens[name] == 9


def test_wide_inputs_and_many_rows_are_exactly_symmetric_and_near_float64():
    torch.manual_seed(0)
    layer, x = nn.Linear(600, 2), torch.randn(5000, 600) + 0.5
    gram = collect_grams(layer, [{"input": x}], progress=False).sums["weight"]
    exact = x.double().T @ x.double()
    assert gram.equal(gram.T) and float((gram - exact).norm() / exact.norm()) < 1e-6


def test_sampled_tokens_are_unbiased_and_their_error_is_the_stated_one():
    """The mean square of the relative error over many draws, against (1 - m / N) (1 + r) / m."""
    torch.manual_seed(0)
    layer, count = nn.Linear(12, 2), 400
    x = torch.randn(count, 12) * torch.linspace(0.3, 2, 12)
    whole = collect_grams(layer, [{"input": x}], progress=False).sums["weight"]
    rank = float(whole.trace() ** 2 / whole.norm() ** 2)
    for amount, taken in ((0.25, 100), (40, 40)):
        draws = [
            collect_grams(layer, [{"input": x}], sample_tokens=amount, seed=seed, progress=False) for seed in range(200)
        ]
        assert all(d.tokens == {"weight": count} for d in draws)
        errors = torch.stack([d.sums["weight"] - whole for d in draws])
        stated = (1 - taken / count) * (1 + rank) / taken
        measured = float(errors.square().sum((1, 2)).mean() / whole.norm() ** 2)
        assert 0.85 < measured / stated < 1.15
        assert float(errors.mean(0).norm() / whole.norm()) < 3 * (stated / 200) ** 0.5
    assert draws[0].metadata["sample_tokens"] == 40 and draws[0].metadata["seed"] == 0
    again = collect_grams(layer, [{"input": x}], sample_tokens=40, seed=0, progress=False)
    assert again.sums["weight"].equal(draws[0].sums["weight"])
    everything = collect_grams(layer, [{"input": x}], sample_tokens=1.0, progress=False)
    assert everything.sums["weight"].equal(whole)


@pytest.mark.parametrize("amount", [0, -1, 0.0, 1.5, True])
def test_what_is_no_number_of_tokens(model, amount):
    with pytest.raises(MergeError, match=r"sample_tokens is a share up to 1\.0 or a whole number of rows"):
        collect_grams(model, batches((2, 3, 4)), sample_tokens=amount)


def test_batches_are_mappings(model):
    with pytest.raises(MergeError, match="a batch is a mapping of a model's arguments, not Tensor"):
        collect_grams(model, [torch.ones(2, 3, 4)], progress=False)
