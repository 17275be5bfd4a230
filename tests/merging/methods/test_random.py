"""DARE and DELLA: by hand where nothing is dropped, by their masks, and by their expectation where something is.

No reference draws the same numbers: theirs come from one generator in the order of their work, ours from seed, name
and index of each entry. What can be compared is what is done with a mask, how many entries it keeps, and the mean over
seeds.
"""

import numpy as np
import pytest
import torch

from hf_vlmerge.merging import MergeError, get_merge_method
from tests.merging.methods.oracle import MEMBERS, agrees, close, elected_mean, inputs, peft_merge_utils

BASE = torch.ones(2, 2)
A = BASE + torch.tensor([[4.0, -1.0], [2.0, 0.5]])
B = BASE + torch.tensor([[-2.0, -3.0], [1.0, 0.0]])
NAMES = ("dare_linear", "dare_ties", "della", "della_linear")


def test_by_hand_where_everything_is_kept():
    close(get_merge_method("dare_linear")([A, B], base=BASE, density=1.0, scale=0.5), [[2.0, -1.0], [2.5, 1.25]])
    close(get_merge_method("della_linear")([A, B], base=BASE, density=1.0, weights=[1, 2]), [[1.0, -6.0], [5.0, 1.5]])
    for name in ("dare_ties", "della"):  # + with a mean of 4, - with a mean of 2, + with 1.5, A alone
        close(get_merge_method(name)([A, B], base=BASE, density=1.0), [[5.0, -1.0], [2.5, 1.5]])
        close(get_merge_method(name)([A, B], base=BASE, density=1.0, normalize=False), [[5.0, -3.0], [4.0, 1.5]])


@pytest.mark.parametrize("name", NAMES)
def test_by_hand_where_everything_is_dropped(name):
    close(get_merge_method(name)([A, B], base=BASE, density=0.0), BASE.tolist())


def kept_by(name, members, base, **options):
    """Each member's task vector after dropping, as the linear form of the method shows it."""
    method = get_merge_method(name)
    return [
        method([m], base=base, members=[alias], **options) - base for m, alias in zip(members, MEMBERS, strict=True)
    ]


def pairs(name, members, base, **options):
    """Task vectors, whole and after dropping."""
    return zip([m - base for m in members], kept_by(name, members, base, **options), strict=True)


def test_dare_divides_what_is_kept_by_its_probability():
    members, base = inputs(shape=(60, 70))
    for density in (0.1, 0.5, 0.9):
        for tau, sparse in pairs("dare_linear", members, base, density=density):
            mask = sparse.abs() > 1e-6
            assert abs(float(mask.float().mean()) - density) < 0.03
            torch.testing.assert_close(sparse[mask], tau[mask] / density, rtol=1e-4, atol=2e-6)


def test_della_keeps_larger_entries_more_often_and_divides_by_their_probability():
    base, random = torch.zeros(400, 9), torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(9, generator=random) for _ in range(400)])
    tau = (order + 1.0) * torch.where(torch.rand(400, 9, generator=random) < 0.5, -1.0, 1.0)  # magnitudes 1 to 9
    sparse = get_merge_method("della_linear")([tau], base=base, density=0.5, epsilon=0.4)
    probability = 0.1 + 0.8 * order / 8
    mask = sparse != 0
    torch.testing.assert_close(sparse[mask], (tau / probability)[mask])
    for rank in range(9):
        assert abs(float(mask[order == rank].float().mean()) - (0.1 + 0.1 * rank)) < 0.08  # three standard deviations


def test_ranks_are_exact_and_equal_magnitudes_rank_in_order():
    from hf_vlmerge.merging._ops import by_rank

    rows = torch.randn(5, 1000).bfloat16().float()
    order = torch.argsort(rows.abs(), dim=1, stable=True)
    expected = torch.empty(5, 1000).scatter_(1, order, torch.linspace(0.2, 0.8, 1000).double().float().expand(5, -1))
    torch.testing.assert_close(by_rank(rows, 0.2, 0.8), expected)
    assert by_rank(torch.tensor([[-3.0, 1.0, 1.0, 2.0]]), 0.0, 3.0).tolist() == [[3.0, 0.0, 1.0, 2.0]]
    assert by_rank(torch.ones(2, 1), 0.25, 0.75).tolist() == [[0.5], [0.5]]  # a row of one entry has the middle rank


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_the_mean_over_seeds_approaches_what_was_there(name):
    members, base = inputs(count=2)
    options = {"base": base, "density": 0.4, "weights": [0.5, 1.5]}
    merged = torch.stack([get_merge_method(name)(members, seed=seed, **options) for seed in range(800)])
    expected = get_merge_method("task_arithmetic")(members, base=base, weights=[0.5, 1.5])
    error = merged.std(0) / 800**0.5
    assert ((merged.mean(0) - expected).abs() < 4.5 * error + 1e-4).all()


@pytest.mark.parametrize(("linear", "elected"), [("dare_linear", "dare_ties"), ("della_linear", "della")])
def test_the_election_is_that_of_ties_on_what_was_kept(linear, elected):
    def formula(members, base):
        vectors = [torch.from_numpy(m).float() for m in members]
        tau = kept_by(linear, vectors, torch.from_numpy(base).float(), density=0.5)
        tau = [np.where(np.abs(t.double().numpy()) < 1e-6, 0, t.double().numpy()) for t in tau]
        return base + elected_mean(tau, divide_by=[1.0] * 3)

    agrees(elected, formula, density=0.5)


def test_rescaling_by_norm_keeps_the_l1_norm_of_each_tensor():
    members, base = inputs(shape=(40, 50))
    for name in ("dare_linear", "della_linear"):
        for tau, sparse in pairs(name, members, base, rescale_by="l1"):
            torch.testing.assert_close(sparse.abs().sum(), tau.abs().sum(), rtol=1e-4, atol=0)
        for tau, sparse in pairs(name, members, base, rescale=False):
            mask = sparse.abs() > 1e-6
            torch.testing.assert_close(sparse[mask], tau[mask], rtol=1e-4, atol=1e-6)


def test_members_seeds_and_tensors_are_dropped_differently():
    members, base = inputs(count=1, shape=(30, 30))
    dare = get_merge_method("dare_linear")
    merged = [
        dare(members, base=base, seed=s, name=n, members=[m])
        for s, n, m in [(0, "w", "a"), (1, "w", "a"), (0, "v", "a"), (0, "w", "b")]
    ]
    assert all(not merged[0].equal(other) for other in merged[1:])


def test_probabilities_lie_between_0_and_1():
    with pytest.raises(
        MergeError, match=r"density - epsilon and density \+ epsilon are probabilities, not -0.1 and 0.3"
    ):
        get_merge_method("della")([A], base=BASE, density=0.1, epsilon=0.2)


def test_peft_makes_the_same_of_task_vectors_where_nothing_is_dropped():
    merge_utils = peft_merge_utils()
    members, base = inputs()
    tau, weights = torch.stack([m - base for m in members]), [0.5, 1.5, -0.2]
    mask = merge_utils.calculate_majority_sign_mask(tau)  # peft's dare_ties warns at density 1; these are its steps
    theirs = merge_utils.disjoint_merge(tau * torch.tensor(weights)[:, None, None], mask)
    ours = get_merge_method("dare_ties")(members, base=base, density=1.0, weights=weights, zero_sign="positive")
    torch.testing.assert_close(ours - base, theirs, rtol=1e-5, atol=1e-6)
