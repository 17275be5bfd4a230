"""The training losses: the original's numbers (../shared/goldens/unival), small ones by hand, and laws."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from hf_vlmerge.models.unival.generation_unival import AnswerTrie, range_mask
from hf_vlmerge.models.unival.losses_unival import mean_loss, target_loss
from hf_vlmerge.models.unival.modeling_unival import UnivalForConditionalGeneration, shift_right
from tests.models.unival.tiny import mixed_batch, tiny_batch, tiny_model

LOGITS = [
    [[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]],
    [[-1.0, 0.0, 4.0], [9.0, 9.0, 9.0]],
]  # two rows, two places, three tokens
LABELS = torch.tensor([[0, 2], [2, -100]])
KEPT = [(0, 0, 0), (0, 1, 2), (1, 0, 2)]  # row, place, label of those that count


def logits(dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(LOGITS, dtype=dtype, requires_grad=True)


def loss_of(values: torch.Tensor, labels: torch.Tensor = LABELS, **options) -> float:
    return mean_loss([values], labels, **options).item()


def log_softmax(values) -> np.ndarray:
    """Of a list; tokens at -inf have no probability."""
    values = np.array(values, dtype=np.float64)
    return values - values.max() - np.log(np.exp(values - values.max()).sum())


# Equal to the original


def golden_rows() -> list[str]:
    """Names of the recorded rows, which the test looks up: the folder may be absent when tests are collected."""
    names = ["ce_eps0", "ce_eps0.1", "ce_eps0.1_conf", "ce_eps0.1_constraint_masks", "ce_eps0.1_constraint_masks_conf"]
    names += ["ce_eps0.1_dropworst0.2", "ce_eps0.1_dropworst0.2_before", "ce_eps0.1_rdrop", "el_eps0", "el_eps0.1"]
    names += ["el_eps0.1_logend0.5", "el_eps0.1_logend1", "el_caption_late", "el_caption_early", "el_drop20"]
    return [*names, "el_eps0.1_constraint_masks"]


@pytest.fixture(scope="module")
def golden(shared):
    folder = shared / "goldens" / "unival"
    facts = json.loads((folder / "components.json").read_text())["losses"]["rows"]
    return load_file(folder / "components.safetensors"), {row["name"]: row for row in facts}


def test_every_recorded_row_is_compared(golden):
    assert set(golden[1]) == set(golden_rows())


@pytest.mark.parametrize("name", golden_rows())
def test_recorded_losses(golden, name):
    numbers, row = golden[0], golden[1][name]
    settings, uses = row["settings"], row["uses"]
    passes = numbers["loss.logits_rdrop"].chunk(2) if settings.get("use_rdrop") else [numbers["loss.logits"]]
    passes = [each.clone().requires_grad_() for each in passes]
    labels = numbers["loss.target"].masked_fill(numbers["loss.target"] == 1, -100)
    dropping = row["update_num"] > settings.get("drop_worst_after", 0)
    total, count = target_loss(
        passes,
        labels,
        smoothing=settings["eps"],
        allowed_tokens=numbers["loss.constraint_mask"] if "constraint_masks" in uses else None,
        confidence=numbers["loss.conf"] if "conf" in uses else None,
        encouraging_log_end=settings.get("log_end", 0.75) if row["kind"] == "encouraging" else None,
        drop_worst_ratio=settings.get("drop_worst_ratio", 0.0) if dropping else 0.0,
        rdrop_alpha=settings.get("reg_alpha", 0.0),
    )
    assert count == row["denominator_ntokens"]
    assert total.item() == pytest.approx(row["loss_sum"], rel=1e-6)
    assert abs(total.item() - row["loss_sum"]) / count < 1e-5
    total.backward()
    assert all(each.grad.isfinite().all() and each.grad.any() for each in passes)


# By hand


def test_smoothed_cross_entropy_by_hand():
    expected = 0.0
    for row, place, label in KEPT:
        scores = log_softmax(LOGITS[row][place])
        target = np.full(3, 0.1 / 2)  # the other two share 0.1
        target[label] = 0.9
        expected -= (target * scores).sum() / 3
    assert loss_of(logits(), smoothing=0.1) == pytest.approx(expected, abs=1e-12)


def test_a_mask_by_hand():
    """Probabilities and smoothing among the allowed; a place with one allowed token costs nothing."""
    mask = torch.tensor([[[1, 1, 0], [0, 1, 1]], [[0, 0, 1], [0, 0, 0]]]).bool()
    first = log_softmax([2.0, -1.0])
    second = log_softmax([3.0, 1.0])
    share = 0.1 / (2 - 1 + 1e-6)
    expected = -(1 - 0.1 - share) * (first[0] + second[1]) - share * (first.sum() + second.sum())
    assert loss_of(logits(), allowed_tokens=mask, smoothing=0.1) * 3 == pytest.approx(expected, abs=1e-12)
    assert loss_of(logits(), allowed_tokens=mask) * 3 == pytest.approx(-first[0] - second[1], abs=1e-12)


def test_confidence_by_hand():
    scores = [log_softmax(LOGITS[row][place])[label] for row, place, label in KEPT]
    expected = -(0.5 * scores[0] + 0.5 * scores[1] + 0.2 * scores[2]) / 3
    confidence = torch.tensor([0.5, 0.2], dtype=torch.float64)
    assert loss_of(logits(), confidence=confidence) == pytest.approx(expected, abs=1e-12)
    assert loss_of(logits(), confidence=confidence.float()) == pytest.approx(expected, abs=1e-7)


def test_the_encouraging_loss_by_hand():
    """Places with a target probability of 0.79 and 0.98, beyond 0.75, and of 0.11, below."""
    total = {0.0: 0.0, 0.1: 0.0}

    def bonus(p, end=0.75):
        return np.log(1 - end) - (p - end) / (1 - end) if p > end else np.log(max(1 - p, 1e-5))

    for row, place, label in KEPT:
        scores = log_softmax(LOGITS[row][place])
        bonuses = [bonus(p) for p in np.exp(scores)]
        total[0.0] += -scores[label] + bonuses[label]
        target = np.where(np.arange(3) == label, 0.9, 0.05)
        total[0.1] += -(target * scores).sum() + 0.9 * bonuses[label] + 0.1 / 3 * sum(bonuses)
    for epsilon, expected in total.items():
        found = loss_of(logits(), encouraging_log_end=0.75, smoothing=epsilon) * 3
        assert found == pytest.approx(expected, abs=1e-12)


def test_r_drop_by_hand():
    """KL in both directions, halved; the cross-entropy of both passes counts."""
    other = [[[1.0, 0.0, 0.0], [2.0, 2.0, 0.0]], [[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]]
    total = 0.0
    for row, place, label in KEPT:
        first, second = log_softmax(LOGITS[row][place]), log_softmax(other[row][place])
        p, q = np.exp(first), np.exp(second)
        total += 3.0 * 0.5 * ((p * (first - second)).sum() + (q * (second - first)).sum())
        total -= first[label] + second[label]
    found, count = target_loss([logits(), torch.tensor(other).double()], LABELS, rdrop_alpha=3.0)
    assert count == 6 and found.item() == pytest.approx(total, abs=1e-12)


def test_the_worst_are_dropped_by_hand():
    losses = sorted(-log_softmax(LOGITS[row][place])[label] for row, place, label in KEPT)
    for ratio, kept in ((0.2, 2), (0.5, 1), (0.9, 0), (0.0, 3)):
        total, count = target_loss([logits()], LABELS, drop_worst_ratio=ratio)
        assert count == kept and total.item() == pytest.approx(sum(losses[:kept]), abs=1e-12)
    # what is dropped is chosen by the cross-entropy, without the bonus
    total, _ = target_loss([logits()], LABELS, drop_worst_ratio=0.5, encouraging_log_end=0.75)
    p = np.exp(-losses[0])
    assert total.item() == pytest.approx(losses[0] + np.log(0.25) - (p - 0.75) / 0.25, abs=1e-12)


# Laws

EVERYTHING = {
    "smoothing": 0.1,
    "encouraging_log_end": 0.75,
    "drop_worst_ratio": 0.3,
    "confidence": torch.tensor([1.0, 0.0]),
    "allowed_tokens": torch.tensor([[[1, 1, 0], [0, 1, 1]], [[0, 0, 1], [0, 0, 0]]]).bool(),
}


def test_nothing_asked_for_is_plain_cross_entropy():
    values = logits()
    assert loss_of(values) == pytest.approx(cross_entropy(values.flatten(0, 1), LABELS.flatten()).item(), abs=1e-12)
    smoothed = cross_entropy(values.flatten(0, 1), LABELS.flatten(), label_smoothing=0.1 * 3 / 2)
    assert loss_of(values, smoothing=0.1) == pytest.approx(smoothed.item(), abs=1e-12)


def test_masks_of_all_tokens_and_confidences_of_one_change_nothing():
    for smoothing in (0.0, 0.1):
        plain = loss_of(logits(), smoothing=smoothing)
        for mask in (torch.ones(3).bool(), torch.ones(2, 2, 3).bool(), torch.ones(1, 1, 3).long()):
            assert loss_of(logits(), smoothing=smoothing, allowed_tokens=mask) == pytest.approx(plain, rel=1e-6)
        assert loss_of(logits(), smoothing=smoothing, confidence=torch.ones(2)) == pytest.approx(plain)


def test_a_tangent_from_one_on_is_none():
    """And one from just below 1 gives almost the same, where no probability is beyond it."""
    one, below = (loss_of(logits(), encouraging_log_end=end, smoothing=0.1) for end in (1.0, 0.999))
    assert one == pytest.approx(below, abs=1e-12)
    assert loss_of(logits(), encouraging_log_end=0.5) != pytest.approx(one, abs=1e-3)


def test_equal_passes_diverge_nowhere_and_count_twice():
    values = logits()
    total, count = target_loss([values, values], LABELS, rdrop_alpha=5.0, smoothing=0.1)
    once, half = target_loss([values], LABELS, smoothing=0.1)
    assert count == 2 * half and total.item() == pytest.approx(2 * once.item(), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("twice", [False, True])
def test_gradients_are_finite_whatever_is_forbidden(dtype, twice):
    values = logits(dtype)
    passes = [values, values.detach() + 1] if twice else [values]
    loss = mean_loss(passes, LABELS, rdrop_alpha=1.0, **EVERYTHING)
    loss.backward()
    assert loss.isfinite() and loss.dtype == torch.promote_types(dtype, torch.float32)
    assert values.grad.isfinite().all() and values.grad.dtype == dtype and values.grad.any()
    assert values.grad[1, 1].eq(0).all() and values.grad[0, 0, 2] == 0  # not counted, and forbidden


def test_gradients_are_those_of_finite_differences():
    options = EVERYTHING | {"confidence": torch.tensor([0.7, 0.4]).double(), "drop_worst_ratio": 0.0}
    other = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    assert torch.autograd.gradcheck(lambda x: mean_loss([x, other], LABELS, rdrop_alpha=0.5, **options), logits())


def test_confident_tokens_learn_more_with_the_encouraging_loss():
    """A target with probability 0.88: the gradient of ln(1 - p) is added to a vanishing one."""
    steps = []
    for end in (None, 0.75):
        values = torch.tensor([[[2.0, 0.0]]], requires_grad=True)
        mean_loss([values], torch.tensor([[0]]), encouraging_log_end=end).backward()
        steps.append(-values.grad[0, 0, 0].item())
    assert steps[1] > 2 * steps[0] > 0


def test_no_label_costs_nothing():
    values = logits()
    loss = mean_loss([values], torch.full((2, 2), -100), num_items_in_batch=7, **EVERYTHING)
    loss.backward()
    assert loss.item() == 0 and not values.grad.any()


@pytest.mark.parametrize("options", [{}, {"smoothing": 0.1, "encouraging_log_end": 0.75, "rdrop_alpha": 1.0}])
def test_shares_of_micro_batches_sum_to_the_whole(options):
    passes, labels = [logits(), logits().detach() - 1], LABELS
    whole = mean_loss(passes, labels, **options)
    parts = [mean_loss([each[i : i + 1] for each in passes], labels[i : i + 1], 3, **options) for i in range(2)]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-12)
    assert mean_loss(passes, labels, torch.tensor(3), **options).item() == pytest.approx(whole.item(), abs=1e-12)


def test_what_is_left_stands_for_all_tokens():
    """Five of six dropped or not: the mean over the kept, times the share of this batch in all labels."""
    kept = loss_of(logits(), drop_worst_ratio=0.5)
    assert loss_of(logits(), drop_worst_ratio=0.5, num_items_in_batch=12) == pytest.approx(kept * 3 / 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": 1.5}, "smoothing is 1.5; expected a number from 0 to below 1"),
        ({"encouraging_log_end": 0.0}, "encouraging_log_end is 0.0; expected a number above 0, up to 1"),
        ({"drop_worst_ratio": -0.1}, "drop_worst_ratio is -0.1; expected a number from 0 to below 1"),
        ({"allowed_tokens": torch.ones(4).bool()}, "allowed_tokens is about 4 tokens; the vocabulary has 3"),
        ({"confidence": torch.ones(2, 1)}, r"confidence has shape \(2, 1\); expected \(2,\)"),
        ({"labels": LABELS[:, :1]}, r"labels have shape \(2, 1\); expected that of the target, \(2, 2\)"),
    ],
)
def test_what_cannot_be_a_loss(options, message):
    with pytest.raises(ValueError, match=message):
        mean_loss([logits()], **{"labels": LABELS, **options})


# Masks from what generation says

ANSWERS = [[10], [10, 11], [12, 13, 14]]


def test_a_trie_masks_answers_after_any_prompt():
    labels = torch.tensor([[-100, 10, 2, -100, -100], [12, 13, 14, 2, -100], [-100, -100, 10, 11, 2]])
    mask = AnswerTrie(ANSWERS).allowed_tokens(labels, 20)
    allowed = [[mask[row, place].nonzero()[:, 0].tolist() for place in range(5)] for row in range(3)]
    every = list(range(20))
    assert allowed[0] == [every, [10, 12], [2, 11], every, every]
    assert allowed[1] == [[10, 12], [13], [14], [2], every]
    assert allowed[2] == [every, every, [10, 12], [2, 11], [2]]


def test_a_label_that_is_no_answer():
    with pytest.raises(ValueError, match=r"the label of row 1 is none of the answers: \[10, 13, 2\]"):
        AnswerTrie(ANSWERS).allowed_tokens(torch.tensor([[10, 2, -100], [10, 13, 2]]), 20)


def test_a_range_keeps_the_special_tokens():
    assert range_mask((6, 8), 9)[0, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 6, 7]
    with pytest.raises(ValueError, match="token_range ends at 10; the vocabulary has 9 tokens"):
        range_mask((6, 10), 9)


@torch.no_grad()
def test_the_loss_among_answers_is_the_score_of_the_candidate():
    """Training and scoring say the same: minus the loss, times its tokens, is the log-probability of the answer."""
    model, trie = tiny_model(UnivalForConditionalGeneration), AnswerTrie(ANSWERS)
    batch = {name: value for name, value in mixed_batch((0, -1, 2)).items() if name != "labels"}
    scores = model.score_candidates(batch, trie)
    for place, answer in enumerate(ANSWERS):
        labels = torch.tensor([[*answer, 2]] * 3)
        loss = model(**batch, labels=labels, allowed_tokens=trie.allowed_tokens(labels, 92), num_items_in_batch=1).loss
        assert loss.item() == pytest.approx(-scores[:, place].sum().item(), abs=1e-4)


# The model


def test_the_model_hands_its_options_to_the_loss():
    model, batch = tiny_model(UnivalForConditionalGeneration), tiny_batch()
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(4, 5, 92, generator=generator) > 0.4
    mask.scatter_(2, batch["labels"].clamp(min=0)[..., None], True)
    options = {
        "smoothing": 0.2,
        "allowed_tokens": mask,
        "confidence": torch.rand(4, generator=generator),
        "encouraging_log_end": 0.6,
        "drop_worst_ratio": 0.2,
    }
    output = model(**batch, **options)
    assert output.loss.item() == pytest.approx(mean_loss([output.logits], batch["labels"], **options).item(), abs=1e-6)
    assert output.loss.item() != pytest.approx(model(**batch).loss.item(), abs=1e-3)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_r_drop_runs_twice_in_training_and_once_in_evaluation():
    model, batch = tiny_model(UnivalForConditionalGeneration, hidden_dropout_prob=0.3, towers=["image"]), tiny_batch()
    runs = []
    model.model.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        plain = model(**batch).loss
        assert torch.equal(model(**batch, rdrop_alpha=1.0).loss, plain) and len(runs) == 2
        model.train()
        losses = []
        for alpha in (1e-9, 1.0):
            torch.manual_seed(0)
            losses.append(model(**batch, rdrop_alpha=alpha).loss.item())
    assert len(runs) == 6 and losses[1] > losses[0] + 1e-3


def test_a_loss_in_bfloat16_is_in_float32():
    model, batch = tiny_model(UnivalForConditionalGeneration, towers=[]).bfloat16(), tiny_batch(4, None)
    output = model(**batch, smoothing=0.1)
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    expected = mean_loss([output.logits.float()], batch["labels"], smoothing=0.1)
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)


# The library's own Trainer


def examples(rows: int = 4) -> list[dict]:
    batch = tiny_batch(rows, None)
    batch["decoder_input_ids"] = shift_right(batch["labels"], 1, 0)
    return [{name: value[i] for name, value in batch.items()} for i in range(rows)]


def trained(folder, rows, **options) -> tuple[torch.Tensor, Trainer]:
    """The embedding after one step over all rows."""
    names = ("compute_loss_func", "eval_dataset")
    more = {name: options.pop(name) for name in names if name in options}
    model = tiny_model(UnivalForConditionalGeneration, towers=[])
    settings = {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "use_cpu": True}
    settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    arguments = TrainingArguments(str(folder), max_grad_norm=0.0, lr_scheduler_type="constant", **settings | options)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, **more)
    trainer.train()
    return model.model.shared.weight.detach(), trainer


HALVES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def own_loss(outputs, labels, num_items_in_batch=None):
    return mean_loss([outputs.logits], labels, num_items_in_batch, encouraging_log_end=0.75)


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}, {"compute_loss_func": own_loss}])
def test_the_librarys_trainer_accumulates_to_the_whole(options, tmp_path):
    whole, trainer = trained(tmp_path, examples(), **options)
    halves, other = trained(tmp_path, examples(), **options, **HALVES)
    assert (whole - halves).abs().max() < 1e-5
    first, second = (each.state.log_history[0]["loss"] for each in (trainer, other))
    assert first == pytest.approx(second, abs=2e-4)
    plain, _ = trained(tmp_path, examples())
    assert ((whole - plain).abs().max() > 1e-4) == bool(options)


def test_a_batch_without_a_target_while_the_trainer_keeps_the_labels(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "decoder_input_ids"} for row in examples()]
    trained(tmp_path, rows)  # makes it from the labels
    for options in ({"label_smoothing_factor": 0.1}, {"compute_loss_func": own_loss}):
        with pytest.raises(ValueError, match="the Trainer keeps the labels to itself with label_smoothing_factor"):
            trained(tmp_path, rows, **options)


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}, {"compute_loss_func": own_loss}])
def test_evaluation_has_a_loss_and_gathers_no_cache(options, tmp_path):
    """The library takes every argument of `forward` with "label" in its name for a kind of labels."""
    _, trainer = trained(tmp_path, examples(), **options)
    assert trainer.label_names == ["labels"]
    found = trainer.predict(examples())
    assert [each.shape for each in found.predictions] == [(4, 5, 92), (4, 7, 32)] and found.label_ids.shape == (4, 5)
    assert 0 < found.metrics["test_loss"] < 10
