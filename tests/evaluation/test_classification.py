from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_vlmerge.evaluation.classification import clustered_error, evaluate_answers


class Echo(torch.nn.Module):
    """Says what the example tells it to say."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, said):
        assert not self.training
        return SimpleNamespace(logits=torch.nn.functional.one_hot(said, 4) * self.weight)


def collate(examples):
    return {name: torch.tensor([example[name] for example in examples]) for name in ("said", "labels")}


def test_accuracy_counts_the_highest_logit_and_leaves_the_mode():
    said, labels = [0, 1, 2, 3, 0], [0, 1, 2, 0, 3]
    examples = [{"said": s, "labels": x} for s, x in zip(said, labels, strict=True)]
    model = Echo().train()
    scores = evaluate_answers(model, examples, collate, batch_size=2)
    assert scores["accuracy"] == pytest.approx(0.6)
    assert scores["standard_error"] == pytest.approx((0.6 * 0.4 / 5) ** 0.5)
    assert model.training


def test_the_standard_error_counts_groups_not_questions():
    values = np.repeat([1.0, 0.0, 1.0, 1.0], 10)
    alone = clustered_error(values, range(40))
    grouped = clustered_error(values, np.repeat(range(4), 10))
    assert grouped == pytest.approx(alone * 10**0.5)
