"""TIES and Model Breadcrumbs: by hand, against float64, and against peft."""

import numpy as np
import pytest
import torch

from hf_vlmerge.merging import MergeError, get_merge_method, merge_tensors
from tests.merging.methods.oracle import agrees, close, elected_mean, inputs, peft_merge_utils, top

ties, breadcrumbs = get_merge_method("ties"), get_merge_method("breadcrumbs")
BASE = torch.ones(2, 2)
A = BASE + torch.tensor([[4.0, -1.0], [2.0, 0.5]])
B = BASE + torch.tensor([[-2.0, -3.0], [1.0, 0.25]])
C = BASE + torch.tensor([[-1.0, 5.0], [6.0, 0.0]])


def test_ties_by_hand():
    # half of the entries: A keeps 4 and 2, B -3 and -2, C 6 and 5
    # upper left: 4 - 2 elects +, mean 4; upper right: -3 + 5 elects +, mean 5; lower left: (2 + 6) / 2; nobody
    close(ties([A, B, C], base=BASE, density=0.5), [[5.0, 6.0], [5.0, 1.0]])
    close(ties([A, B, C], base=BASE, density=0.5, scale=0.5), [[3.0, 3.5], [3.0, 1.0]])
    close(ties([A, B, C], base=BASE, density=0.5, normalize=False), [[5.0, 6.0], [9.0, 1.0]])
    # weights 1, 3, 1: in the election -6 + 4 elects -, -9 + 5 elects -
    weighted = {"base": BASE, "density": 0.5, "weights": [1, 3, 1], "elect": "weighted"}
    close(ties([A, B, C], mean="weights", **weighted), [[-1.0, -2.0], [5.0, 1.0]])
    close(ties([A, B, C], mean="counts", **weighted), [[-5.0, -8.0], [5.0, 1.0]])
    # weights without a say in the election: 4 and 5 win there, and keep their weight of 1
    close(ties([A, B, C], base=BASE, density=0.5, weights=[1, 3, 1]), [[5.0, 6.0], [5.0, 1.0]])


def test_the_trim_keeps_the_largest_entry_and_all_that_tie_at_the_threshold():
    close(ties([A], base=BASE, density=0.01), [[5.0, 1.0], [1.0, 1.0]])
    close(ties([A], base=BASE, density=0.0), BASE.tolist())
    tied = BASE + torch.tensor([[3.0, -3.0], [3.0, 1.0]])
    close(ties([tied], base=BASE, density=0.25), [[4.0, -2.0], [4.0, 1.0]])


def test_a_sum_of_zero_has_no_sign_or_the_positive_or_the_majoritys():
    x, y = BASE + torch.tensor([[2.0, -1.0], [-3.0, -1.0]]), BASE + torch.tensor([[-2.0, -1.0], [-1.0, -2.0]])
    options = {"base": BASE, "density": 1.0, "scope": "tensor"}
    rest = [-1.0, -0.5]
    close(ties([x, y], **options), [[1.0, 0.0], rest])
    close(ties([x, y], zero_sign="positive", **options), [[3.0, 0.0], rest])
    close(ties([x, y], zero_sign="majority", **options), [[-1.0, 0.0], rest])


def test_the_share_is_taken_of_the_model_or_of_each_tensor():
    large, small = torch.tensor([8.0, 7.0, 6.0, 5.0]), torch.tensor([4.0, 3.0, 2.0, 1.0])
    sources = {"m": {"a": large, "b": small}, "base": {"a": torch.zeros(4), "b": torch.zeros(4)}}
    recipe = {"merge_method": "ties", "models": ["m"], "base_model": "base", "parameters": {"density": 0.5}}
    merged = merge_tensors(recipe, sources)
    close(merged["a"], large.tolist())
    close(merged["b"], [0.0] * 4)
    recipe["parameters"]["scope"] = "tensor"
    merged = merge_tensors(recipe, sources)
    close(merged["a"], [8.0, 7.0, 0.0, 0.0])
    close(merged["b"], [4.0, 3.0, 0.0, 0.0])


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_its_formula(density):
    def formula(members, base):
        tau = [m - base for m in members]
        tau = [t * top(t, max(1, int(density * t.size))) for t in tau]
        return base + 0.7 * elected_mean(tau, divide_by=[1.0] * 3)

    agrees("ties", formula, density=density, scale=0.7)


def test_rescaling_gives_the_trimmed_vector_the_norm_of_the_whole():
    result = ties([A], base=BASE, density=0.5, rescale=True) - BASE
    close(result, [[4 * 7.5 / 6, 0.0], [2 * 7.5 / 6, 0.0]])


def test_breadcrumbs_by_hand():
    # of four entries one is dropped from above and two stay: A keeps 2 and -1, B -2 and 1, C 5 and -1
    options = {"base": BASE, "density": 0.5, "gamma": 0.25}
    close(breadcrumbs([A, B, C], **options), [[-2.0, 5.0], [4.0, 1.0]])
    close(breadcrumbs([A, B, C], scale=0.5, weights=[1, 2, 0], normalize=True, **options), [[1 / 3, 5 / 6], [5 / 3, 1]])
    # the density comes first: with three to be kept there is one left to drop, and it is the largest
    close(breadcrumbs([A], base=BASE, density=0.75, gamma=0.5), [[1.0, 0.0], [3.0, 1.5]])
    close(breadcrumbs([A], base=BASE, density=1.0, gamma=0.5), A.tolist())
    close(breadcrumbs([A], base=BASE, density=0.1, gamma=0.0), BASE.tolist())
    close(breadcrumbs([A, B], base=BASE, density=[0.1, 0.0], gamma=0.25), BASE.tolist())  # outliers go even so
    # within rows of two: the smaller one of each
    close(breadcrumbs([A], ranked_over="row", **{**options, "gamma": 0.5}), [[1.0, 0.0], [1.0, 1.5]])


def test_breadcrumbs_ties_by_hand():
    # kept, as above: upper left -2 and -1, upper right -1 and 5, lower left 2 and 1
    both = get_merge_method("breadcrumbs_ties")
    close(both([A, B, C], base=BASE, density=0.5, gamma=0.25), [[-0.5, 6.0], [2.5, 1.0]])


def crumbs(tau, density, gamma):
    kept = int(density * tau.size)
    dropped = min(int(gamma * tau.size), tau.size - kept)
    largest = np.sort(np.abs(tau), axis=None)[-(dropped + 1)] if dropped else np.inf
    return tau * (top(tau, dropped + kept) & (np.abs(tau) <= largest))


@pytest.mark.parametrize(("density", "gamma"), [(0.15, 0.02), (0.5, 0.1), (0.95, 0.2)])
def test_breadcrumbs_are_their_formulas(density, gamma):
    options = {"density": density, "gamma": gamma}

    def plain(members, base):
        tau = [crumbs(m - base, density, gamma) for m in members]
        return base + 0.4 * (tau[0] + 2 * tau[1] - tau[2])

    def elected(members, base):
        return base + elected_mean([crumbs(m - base, density, gamma) for m in members], divide_by=[1.0] * 3)

    agrees("breadcrumbs", plain, scale=0.4, weights=[1, 2, -1], shape=(11, 12), **options)
    agrees("breadcrumbs_ties", elected, shape=(11, 12), **options)


def test_breadcrumbs_within_rows_are_their_formula():
    def formula(members, base):
        return base + sum(np.stack([crumbs(row, 0.4, 0.2) for row in m - base]) for m in members)

    agrees("breadcrumbs", formula, density=0.4, gamma=0.2, ranked_over="row")


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "dare_linear", "della"])
def test_a_density_is_a_share(name):
    with pytest.raises(MergeError, match=r"density is a share from 0 to 1, not 1\.5"):
        get_merge_method(name)([A], base=BASE, density=1.5)


@pytest.mark.parametrize("density", [0.25, 0.6])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 1.5, -0.2]])
def test_peft_makes_the_same_of_task_vectors(density, weights):
    merge_utils = peft_merge_utils()
    members, base = inputs()
    tau, scales = [m - base for m in members], torch.tensor(weights)
    options = {"base": base, "density": density, "weights": weights}
    theirs = merge_utils.ties(tau, scales, density)
    ours = ties(members, scope="tensor", zero_sign="positive", **options)
    torch.testing.assert_close(ours - base, theirs, rtol=1e-5, atol=1e-6)
    theirs = merge_utils.magnitude_prune(tau, scales, density)  # breadcrumbs that drop nothing from above
    torch.testing.assert_close(breadcrumbs(members, gamma=0.0, **options) - base, theirs, rtol=1e-5, atol=1e-6)
    arithmetic = get_merge_method("task_arithmetic")(members, base=base, weights=weights)
    torch.testing.assert_close(arithmetic - base, merge_utils.task_arithmetic(tau, scales), rtol=1e-5, atol=1e-6)
