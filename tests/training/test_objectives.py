"""Losses that are decided a run or a step at a time reach the model."""

import pytest
import torch
from torch import nn

from hf_vlmerge.models.unival.losses_unival import mean_loss
from hf_vlmerge.models.unival.modeling_unival import UnivalForConditionalGeneration
from hf_vlmerge.training.arguments import VlmergeTrainingArguments
from hf_vlmerge.training.objectives import loss_options
from hf_vlmerge.training.trainer import VlmergeTrainer
from tests.models.unival.tiny import tiny_batch, tiny_model

BATCH = tiny_batch(4, None)
ROWS = [{name: value[i] for name, value in BATCH.items()} for i in range(4)]
CAPTIONING = {
    "label_smoothing_factor": 0.1,
    "encouraging_log_end": 0.75,
    "drop_worst_ratio": 0.2,
    "drop_worst_after": 1,
}
OWN = {"smoothing": 0.1, "encouraging_log_end": 0.75}


def arguments(folder, **options) -> VlmergeTrainingArguments:
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.0, "logging_steps": 1}
    settings |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return VlmergeTrainingArguments(str(folder), **settings | options)


def trainer(folder, model=None, compute_loss_func=None, **options) -> VlmergeTrainer:
    model = model or tiny_model(UnivalForConditionalGeneration, towers=[])
    data = {"train_dataset": ROWS, "eval_dataset": ROWS}
    return VlmergeTrainer(model=model, args=arguments(folder, **options), compute_loss_func=compute_loss_func, **data)


def losses_of(run: VlmergeTrainer) -> list[float]:
    run.train()
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def expected(**options) -> float:
    with torch.no_grad():
        logits = tiny_model(UnivalForConditionalGeneration, towers=[])(**BATCH).logits
    return mean_loss([logits], BATCH["labels"], **options).item()


def test_the_worst_are_dropped_after_some_steps_and_never_in_evaluation(tmp_path):
    """The learning rate is 0, so that a step's loss says what was dropped: nothing at 0 and 1 steps done."""
    run = trainer(tmp_path, **CAPTIONING)
    before, after = expected(**OWN), expected(**OWN, drop_worst_ratio=0.2)
    assert after < before - 0.01
    assert losses_of(run) == pytest.approx([before, before, after, after], abs=1e-3)
    assert run.evaluate()["eval_loss"] == pytest.approx(before, abs=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing_factor": 0.1}, {"label_smoothing_factor": 0.1, "encouraging_log_end": 0.75}]
)
def test_accumulated_batches_have_the_loss_of_the_whole(options, tmp_path):
    """Halves with 8 and 6 labels."""
    own = {name.replace("label_smoothing_factor", "smoothing"): value for name, value in options.items()}
    for shape in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}):
        assert losses_of(trainer(tmp_path, **options, **shape, max_steps=1)) == pytest.approx(
            [expected(**own)], abs=1e-3
        )


def test_r_drop_reaches_the_model(tmp_path):
    model = tiny_model(UnivalForConditionalGeneration, towers=[], hidden_dropout_prob=0.3)
    runs = []
    model.model.register_forward_hook(lambda *_: runs.append(1))
    losses_of(trainer(tmp_path, model, rdrop_alpha=1.0, max_steps=2))
    assert len(runs) == 4


def test_a_batch_may_have_its_own_options(tmp_path):
    """What the collator gives stands: a mask of allowed tokens, or another smoothing."""
    run = trainer(tmp_path, label_smoothing_factor=0.1)
    batch = BATCH | {"smoothing": 0.3}
    run.model.eval()
    assert run.compute_loss(run.model, batch).item() == pytest.approx(expected(smoothing=0.3), abs=1e-5)


class Plain(nn.Module):
    def forward(self, x):
        return {"loss": x.sum()}


@pytest.mark.parametrize("name", ["encouraging_log_end", "drop_worst_ratio", "rdrop_alpha"])
def test_a_loss_without_the_option_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} is 0.5, but Plain has none; UnivalForConditionalGeneration has"):
        trainer(tmp_path, Plain(), **{name: 0.5})
    with pytest.raises(ValueError, match=f"{name} is 0.5, but compute_loss_func has none"):
        trainer(tmp_path, compute_loss_func=lambda *_: 0, **{name: 0.5})


def test_settings_of_captioning(tmp_path):
    args = arguments(tmp_path, **CAPTIONING | {"drop_worst_after": 6000})
    assert loss_options(args, 6000)["drop_worst_ratio"] == 0
    assert loss_options(args, 6001) == OWN | {"drop_worst_ratio": 0.2, "rdrop_alpha": 0.0}
    assert loss_options(args, 6001, training=False)["drop_worst_ratio"] == 0
