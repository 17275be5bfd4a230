"""The Trainer's log of losses, its optimiser groups and schedule, and resuming."""

import json

import pytest
import torch
from torch import nn
from transformers.utils import ModelOutput

from hf_vlmerge.training.arguments import VlmergeTrainingArguments
from hf_vlmerge.training.trainer import VlmergeTrainer


class TwoLosses(nn.Module):
    """loss = near_loss + 3 far_loss; the near loss is the mean of x, so a log line is known in advance."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.norm = nn.LayerNorm(2)
        self.classifier = nn.Linear(2, 1)

    def forward(self, x):
        near = x.mean() + 0 * self.classifier(self.norm(torch.zeros(2))).sum()
        far = (self.weight - 1) ** 2
        return ModelOutput(loss=near + 3 * far, near_loss=near, far_loss=far, logits=x)


ROWS = [{"x": torch.tensor(float(i))} for i in range(16)]


def trainer(folder, model=None, *, parts=None, **kwargs):
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "learning_rate": 0.1,
    }
    arguments = VlmergeTrainingArguments(output_dir=str(folder), **{**settings, **kwargs})
    far_off = [{"x": torch.tensor(1e6)}] * 2
    data = {"train_dataset": ROWS, "eval_dataset": far_off} | (parts or {})
    return VlmergeTrainer(model=model or TwoLosses(), args=arguments, **data)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_each_loss_is_logged_as_the_mean_of_the_window(tmp_path, accumulated):
    run = trainer(tmp_path, max_steps=4, gradient_accumulation_steps=accumulated)
    run.train()
    lines = [line for line in run.state.log_history if "near_loss" in line]
    rows = 4 * accumulated  # of a window of two steps
    expected = [sum(range(i * rows, (i + 1) * rows)) / rows for i in range(2)]
    assert [line["near_loss"] for line in lines] == pytest.approx(expected)
    for line in lines:
        assert line["loss"] == pytest.approx(line["near_loss"] + 3 * line["far_loss"], abs=1e-5)
    assert lines[0]["far_loss"] > lines[1]["far_loss"]


def test_evaluation_leaves_the_window_alone(tmp_path):
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=1)
    run.train()
    assert [line["near_loss"] for line in run.state.log_history if "near_loss" in line] == pytest.approx([1.5, 5.5])


def test_groups_decay_and_head_rate(tmp_path):
    run = trainer(tmp_path, head_learning_rate_factor=10.0)
    optimizer = run.create_optimizer()
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    groups = {
        tuple(sorted(names[id(p)] for p in group["params"])): (group["weight_decay"], group["lr"])
        for group in optimizer.param_groups
        if group["params"]
    }
    assert groups == {
        ("weight",): (0.01, 0.1),
        ("norm.bias", "norm.weight"): (0.0, 0.1),
        ("classifier.weight",): (0.01, 1.0),
        ("classifier.bias",): (0.0, 1.0),
    }
    assert optimizer.defaults["betas"] == (0.9, 0.98)


def test_warm_up_and_decay_are_linear(tmp_path):
    run = trainer(tmp_path, warmup_steps=100, learning_rate=1.0)
    run.create_optimizer()
    factor = run.create_scheduler(1000).lr_lambdas[0]
    assert [factor(step) for step in (0, 1, 10, 50, 100, 500, 999, 1000)] == pytest.approx(
        [0.0, 0.01, 0.1, 0.5, 1.0, 0.5555555555555556, 0.0011111111111110628, 0.0]
    )


def test_the_schedule_is_the_originals(shared, tmp_path):
    stored = json.loads((shared / "goldens/vlmo/goldens.json").read_text())["optimizer_and_metrics"]
    run = trainer(tmp_path, warmup_steps=0.1, learning_rate=1.0)
    run.create_optimizer()
    factor = run.create_scheduler(1000).lr_lambdas[0]
    for step, value in stored["optimizer.msa.vqa"]["lr_factor_at_step"].items():
        assert factor(int(step)) == pytest.approx(value)


def test_resuming_gives_the_same_weights(tmp_path):
    whole = TwoLosses()
    trainer(tmp_path / "whole", whole, save_strategy="steps", save_steps=2).train()
    resumed = TwoLosses()
    run = trainer(tmp_path / "resumed", resumed)
    run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(whole.weight, resumed.weight)


def test_evaluation_may_have_its_own_collator_and_scores(tmp_path):
    seen = []

    def collator(rows):
        seen.extend(row["x"].item() for row in rows)
        return {"x": torch.stack([row["x"] for row in rows])}

    parts = {"eval_collator": collator, "score": lambda model: {"weight": model.weight.item()}}
    run = trainer(tmp_path, parts=parts)
    assert run.evaluate(metric_key_prefix="test")["test_weight"] == 0.0 and seen == [1e6, 1e6]
    run.train()
    assert len(seen) == 2 and run.state.log_history[-2]["near_loss"] == pytest.approx(5.5)
