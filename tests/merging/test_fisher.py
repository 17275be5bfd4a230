"""Per-sample squared gradients: against loops over samples and closed forms, labels of each kind, and the file."""

import pytest
import torch
from torch import nn

from hf_vlmerge.merging import MergeError, collect_fisher, merge_tensors, open_source


class Classifier(nn.Module):
    """A linear map to three classes, with the output fields of a transformers model."""

    def __init__(self, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.unused, self.dropout = nn.Linear(width, 3), nn.Linear(2, 2), nn.Dropout(0.5)

    def forward(self, x, labels=None, attention_mask=None):
        logits = self.fc(self.dropout(x))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return type("Output", (), {"logits": logits, "loss": loss})


@pytest.fixture
def model():
    return Classifier()


def batch(rows=6, *between):
    torch.manual_seed(1)
    return {"x": torch.randn(rows, *between, 4), "labels": torch.randint(3, (rows, *between))}


def squares(model, batch):
    """sum over samples and, where given, classes: for a linear map the gradient is (onehot - p) x^T."""
    x = batch["x"].double()
    p = (x @ model.fc.weight.double().T + model.fc.bias.double()).softmax(-1)
    error = nn.functional.one_hot(batch["labels"], 3) - p
    return (error[:, :, None] * x[:, None, :]).square().sum(0), x, p


def test_labels_of_the_data_squared_sample_by_sample(model):
    data = batch()
    model.train().fc.weight.requires_grad_(False)
    fisher = collect_fisher(model, [data], labels="data", progress=False)
    expected, _, _ = squares(model, data)
    torch.testing.assert_close(fisher.sums["fc.weight"], expected.detach(), rtol=1e-5, atol=1e-7)
    assert fisher.samples == 6 and fisher.tokens["fc.bias"] == 6 and not fisher.sums["unused.weight"].any()
    assert model.training and not model.fc.weight.requires_grad and model.fc.weight.grad is None
    alone = [{k: v[i : i + 1] for k, v in data.items()} for i in range(6)]
    split = collect_fisher(model, alone, labels="data", progress=False)
    torch.testing.assert_close(split.sums["fc.weight"], fisher.sums["fc.weight"])


def test_the_square_of_a_batch_gradient_is_another_thing(model):
    """Two samples with opposite gradients: each is sensitive, their mean is not."""
    model.fc.weight.data.zero_(), model.fc.bias.data.zero_()
    x = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    data = {"x": x, "labels": torch.tensor([0, 0])}
    model.eval()(**data).loss.backward()
    assert not model.fc.weight.grad.any()
    model.zero_grad()
    fisher = collect_fisher(model, [data], labels="data", progress=False).sums["fc.weight"]
    torch.testing.assert_close(fisher[:, 0], torch.tensor([8 / 9, 2 / 9, 2 / 9], dtype=torch.float64))


def test_expected_labels_sum_over_classes_and_sampled_ones_come_near(model):
    data = {"x": batch()["x"]}
    exact = collect_fisher(model, [data], labels="expected", progress=False).sums["fc.weight"]
    _, x, p = squares(model, batch())
    error = torch.eye(3, dtype=torch.float64)[None] - p[:, None]  # (samples, classes, outputs)
    expected = torch.einsum("sy,syo,si->oi", p, error.square(), x.square()).detach()
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-7)
    draws = [collect_fisher(model, [data], seed=seed, progress=False).sums["fc.weight"] for seed in range(60)]
    spread = torch.stack(draws).std(0) / 60**0.5
    assert ((torch.stack(draws).mean(0) - exact).abs() < 4 * spread + 1e-9).all()
    again = collect_fisher(model, [data], seed=0, progress=False)
    assert again.sums["fc.weight"].equal(draws[0]) and again.metadata == {"labels": "sampled", "seed": 0}


def test_of_several_predictions_those_count_that_labels_or_mask_choose(model):
    data = batch(2, 5)
    model.fc.weight.data.zero_(), model.fc.bias.data.zero_()
    counted = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]])
    chosen = data["labels"].masked_fill(counted == 0, -100)
    by_mask = {"x": data["x"], "attention_mask": counted}
    fishers = [
        collect_fisher(model, [given], progress=False).sums["fc.weight"]
        for given in ({"x": data["x"], "labels": chosen}, by_mask)
    ]
    assert fishers[0].equal(fishers[1])
    rows = data["x"][counted.bool()].double()  # one prediction a sample: p = 1/3, the drawn class has 2/3
    torch.testing.assert_close(fishers[0].sum(0), rows.square().sum(0) * (4 + 1 + 1) / 9, rtol=1e-5, atol=1e-7)
    everything = collect_fisher(model, [{"x": data["x"]}], progress=False).sums["fc.weight"]
    assert not everything.equal(fishers[0])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


def test_the_file_names_tied_weights_once_and_fisher_divides_by_the_samples(tmp_path, model):
    tied = collect_fisher(Tied(), [{"ids": torch.tensor([[0, 1], [2, 3]])}], progress=False)
    tied.save(tmp_path / "tied.safetensors")
    source = open_source(tmp_path / "tied.safetensors")
    assert list(source) == ["fisher.embed.weight"] and '"head' not in source.metadata["tokens"]
    assert source.metadata["aliases"] == '{"fisher.head.weight": "fisher.embed.weight"}'
    sources, members = {}, []
    for name, rows in (("a", 2), ("b", 6)):
        other = Classifier()
        other.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})
        fisher = collect_fisher(other, [batch(rows)], weights="fc.*", labels="data", progress=False)
        fisher.save(tmp_path / f"{name}.safetensors", dtype=torch.float64)
        sources[name] = {"fc.weight": other.fc.weight.data}
        members.append((other.fc.weight.double().detach(), fisher.sums["fc.weight"] / rows))
    models = [{"model": n, "statistics": str(tmp_path / f"{n}.safetensors")} for n in "ab"]
    recipe = {"merge_method": "fisher", "models": models, "parameters": {"normalize": False, "floor": 0}}
    merged = merge_tensors(recipe, sources)["fc.weight"].double()
    expected = sum(w * f for w, f in members) / sum(f for _, f in members)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (batch(), {"labels": "true"}, "labels is 'data', 'sampled' or 'expected', not 'true'"),
        ({"x": torch.ones(2, 4)}, {"labels": "data"}, "labels 'data' needs a loss"),
        (batch(2, 5), {"labels": "expected"}, "takes one prediction a sample, not 5"),
        ({"x": torch.ones(2, 4), "labels": torch.ones(3).long()}, {}, r"labels \(3,\) has no axis of 2 samples"),
        ({"x": torch.ones(2, 4)}, {"forward": lambda m, b: m(**b).logits[0]}, r"not \(3,\); give a forward"),
        ({"x": torch.ones(2, 4)}, {"forward": lambda m, b: m(**b).logits[:, :1]}, "one logit is no distribution"),
        (batch(), {"weights": "fd.weight"}, r"no weight is called \['fd.weight'\]; did you mean 'fc.weight'"),
    ],
)
def test_what_cannot_be_collected(model, data, options, message):
    with pytest.raises(MergeError, match=message):
        collect_fisher(model, [data], progress=False, **options)


def test_no_sample_is_nothing_to_save(model, tmp_path):
    with pytest.raises(MergeError, match="no sample was seen"):
        collect_fisher(model, [], progress=False).save(tmp_path / "f.safetensors")
