"""Methods between a base and its members: Model Stock, SCE, consensus, Arcee Fusion, NearSwap; and passthrough."""

import numpy as np
import pytest
import torch

from hf_vlmerge.merging import MergeError, get_merge_method, merge_tensors
from tests.merging.methods.oracle import agrees, close, elected_mean, top

stock, sce, consensus, fusion, nearswap = map(
    get_merge_method, ("model_stock", "sce", "consensus", "arcee_fusion", "nearswap")
)
BASE = torch.ones(2, 2)


def test_model_stock_by_hand():
    # task vectors (1, 0, 0, 0) and (1, 1, 0, 0): cosine 1 / sqrt 2, t = 2 c / (1 + c)
    a, b = BASE + torch.tensor([[1.0, 0.0], [0.0, 0.0]]), BASE + torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    t = 2 * 0.5**0.5 / (1 + 0.5**0.5)
    close(stock([a, b], base=BASE), [[1 + t, 1 + t / 2], [1.0, 1.0]])
    # by rows: the first has the same cosine, the second does not move
    close(stock([a, b], base=BASE, filter_wise=True), [[1 + t, 1 + t / 2], [1.0, 1.0]])
    close(stock([a, 2 - a], base=BASE), BASE.tolist())  # opposite: 1 + c is zero, and t counts as zero
    with pytest.raises(MergeError, match="model_stock takes at least 2 members, not 1"):
        stock([a], base=BASE)


def t_of(tau, average="cosine"):
    n = len(tau)
    pairs = [(tau[i], tau[j]) for i in range(n) for j in range(i)]
    cosines = [(x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs]
    c = np.mean(cosines) if average == "cosine" else np.cos(np.mean(np.arccos(cosines)))
    return n * c / (1 + (n - 1) * c)


def test_model_stock_is_its_formula():
    def formula(average):
        def whole(m, b):
            tau = [x - b for x in m]
            return b + t_of(tau, average) * sum(tau) / 3

        return whole

    for average in ("cosine", "angle"):
        agrees("model_stock", formula(average), average=average)

    def rows(m, b):
        tau = [x - b for x in m]
        return b + np.stack([t_of([t[i] for t in tau]) * sum(t[i] for t in tau) / 3 for i in range(len(b))])

    agrees("model_stock", rows, filter_wise=True, shape=(3, 400))  # long rows: t stays far from its pole


def test_sce_by_hand():
    # variances 4, 1, 0.25, 0: half of the three that differ is one entry, the upper left
    a = BASE + torch.tensor([[3.0, 1.0], [-1.0, 2.0]])
    b = BASE + torch.tensor([[-1.0, -1.0], [-2.0, 2.0]])
    # there the energies are 9 and 1, the sum of both is positive: a alone
    close(sce([a, b], base=BASE, select_topk=0.5), [[4.0, 1.0], [1.0, 1.0]])
    # selected for the weights only, 0.9 and 0.1: what agrees is averaged with these
    merged = sce([a, b], base=BASE, select_topk=0.5, selection="weights")
    close(merged, [[4.0, 1.0], [1 - 0.9 - 0.2, 3.0]])  # the upper right sums to zero and has no sign
    positive = sce([a, b], base=BASE, select_topk=0.5, selection="weights", zero_sign="positive")
    close(positive, [[4.0, 2.0], [1 - 0.9 - 0.2, 3.0]])
    # all entries: energies 15 and 10
    close(sce([a, b], base=BASE, select_topk=1.0), [[4.0, 1.0], [1 - 0.6 - 0.8, 3.0]])
    close(sce([a, b], base=BASE, select_topk=1.0, floor=100.0)[1, 1], 1 + 4 * 0.5 / 100)
    close(sce([a, b], base=BASE, select_topk=0.0), BASE.tolist())


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_sce_is_its_formula(share):
    def formula(m, b):
        tau = [x - b for x in m]
        variance = np.var(tau, axis=0)
        mask = top(variance, int(share * np.count_nonzero(variance)))
        energy = [np.mean((t * mask) ** 2) for t in tau]
        weights = [e / sum(energy) for e in energy]
        return b + elected_mean([t * mask for t in tau], weights, weights)

    agrees("sce", formula, select_topk=share)


def test_consensus_by_hand():
    a = BASE + torch.tensor([[4.0, 1.0], [1.0, 1.0]])
    b = BASE + torch.tensor([[4.0, 4.0], [1.0, 0.0]])
    c = BASE + torch.tensor([[4.0, 0.0], [-2.0, 0.0]])
    # a mask is |own| > 0.4 |others|: upper left all three, upper right b alone (1 < 1.6), lower left all three
    # (1 > 0.4, 1 > 0.4, 2 > 0.8), lower right a alone
    merged = consensus([a, b, c], base=BASE)
    close(merged, [[13.0, 1.0], [1.0, 1.0]])
    close(consensus([a, b, c], base=BASE, at_least=1, scale=0.5), [[7.0, 3.5], [1.0, 1.5]])
    close(consensus([a, b, c], base=BASE, at_least=3, threshold=[0.6, 0.4, 0.1]), [[1.0, 1.0], [1.0, 1.0]])


def test_consensus_is_its_formula():
    shares = {"a": 0.2, "b": 0.4, "c": 0.6}

    def formula(m, b):
        tau = [x - b for x in m]
        masks = [np.abs(t) > s * np.abs(sum(tau) - t) for t, s in zip(tau, shares.values(), strict=True)]
        return b + 0.7 * sum(tau) * (sum(masks) >= 2)

    agrees("consensus", formula, threshold=shares, scale=0.7)


def importance(x, b):
    p, q = (np.exp(v - v.max(1, keepdims=True)) for v in (x, b))
    p, q = (v / v.sum(1, keepdims=True) + 1e-8 for v in (p, q))
    return np.abs(x - b) * (p * np.log(p / q)).sum(1, keepdims=True)


def test_arcee_fusion_by_hand():
    # six entries do not move: their importance is 0, and so are the quartiles and the threshold
    base, x = torch.zeros(2, 4), torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.01, 0.0, 0.0, 0.0]])
    scores = np.sort(importance(x.double().numpy(), base.double().numpy()).ravel())
    lower, median, upper = (scores[int(share * 7)] for share in (0.25, 0.5, 0.75))
    assert lower == median == upper == 0
    close(fusion([x], base=base), x.tolist())
    assert fusion([x.flatten()], base=base.flatten()).shape == (8,)


def test_arcee_fusion_is_its_formula():
    def formula(m, b):
        score = importance(m[0], b)
        ordered = np.sort(score, axis=None)
        lower, median, upper = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
        chosen = score >= median + 1.5 * (upper - lower)
        assert 0 < chosen.sum() < chosen.size / 4
        return np.where(chosen, m[0], b)

    agrees("arcee_fusion", formula, count=1, shape=(40, 30))


def test_nearswap_by_hand():
    x = BASE + torch.tensor([[0.0005, -0.0005], [0.5, -0.5]])
    close(nearswap([x], base=BASE, t=0.001), [[1.0005, 0.9995], [1.001, 0.999]])
    close(nearswap([x], base=BASE, t=0.0), BASE.tolist())
    weight = lambda d: np.minimum(1, 0.05 / np.maximum(np.abs(d), 1e-6))  # noqa: E731
    agrees("nearswap", lambda m, b: weight(m[0] - b) * m[0] + (1 - weight(m[0] - b)) * b, count=1, ratio=0.05)
    with pytest.raises(MergeError, match="a difference and not negative"):
        nearswap([x], base=BASE, t=-1.0)


def test_passthrough_by_hand():
    passthrough = get_merge_method("passthrough")
    close(passthrough([BASE]), BASE.tolist())
    close(passthrough([BASE], scale=2.5), (2.5 * BASE).tolist())
    with pytest.raises(MergeError, match="passthrough takes exactly 1 members, not 2"):
        passthrough([BASE, BASE])
    recipe = {"merge_method": "passthrough", "models": [{"model": "m", "parameters": {"scale": 0.5}}]}
    close(merge_tensors(recipe, {"m": {"w": BASE}})["w"], (0.5 * BASE).tolist())


def test_wise_ft_is_task_arithmetic_of_one_model():
    x = BASE + torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    wise = get_merge_method("task_arithmetic")([x], base=BASE, scale=0.25)
    close(wise, (0.75 * BASE + 0.25 * x).tolist())
    close(get_merge_method("linear")([BASE, x], weights=[0.75, 0.25]), wise.tolist())
