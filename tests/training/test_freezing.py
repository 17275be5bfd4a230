"""What is frozen stays, whatever puts the model into training."""

import torch
from torch import nn

from hf_vlmerge.training.freezing import freeze_batch_norm, freeze_embeddings


def test_batch_norm_keeps_its_statistics_and_gives_each_row_its_own():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.BatchNorm1d(8))
    freeze_batch_norm(model)
    rows = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    whole, halves = model(rows), torch.cat([model(rows[:2]), model(rows[2:])])
    torch.testing.assert_close(whole, halves)
    whole.sum().backward()
    torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1.0).step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"0.weight", "0.bias"}


def test_embeddings_are_not_trained():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(3, 2), nn.Linear(2, 3)

        def get_input_embeddings(self):
            return self.table

    model = Model()
    freeze_embeddings(model)
    assert [name for name, each in model.named_parameters() if each.requires_grad] == ["head.weight", "head.bias"]
