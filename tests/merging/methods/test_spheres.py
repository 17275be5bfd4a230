"""NuSLERP, multi-SLERP and the Karcher mean: by hand and against float64."""

from math import acos, cos, pi, sin, sqrt

import numpy as np
import pytest
import torch

from hf_vlmerge.merging import MergeError, get_merge_method
from tests.merging.methods.oracle import agrees, close

nuslerp, multislerp, karcher = (get_merge_method(name) for name in ("nuslerp", "multislerp", "karcher"))
X, Y = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])  # at a right angle


def test_nuslerp_by_hand():
    half = sin(pi / 4)
    close(nuslerp([X, Y]), [2 * half, 4 * half])
    close(nuslerp([X, Y], weights=[2, 1]), [2 * sin(pi / 3), 4 * sin(pi / 6)])
    base = torch.tensor([1.0, 1.0])
    close(nuslerp([X + 1, Y + 1], base=base), [1 + 2 * half, 1 + 4 * half])
    close(nuslerp([X, 3 * X], weights=[3, 1]), [3.0, 0.0])  # parallel: linear
    close(nuslerp([X, Y], weights=[1, -1]), [2 * half, 4 * half])  # weights that cancel count as equal
    x, y = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    close(nuslerp([x, y], along="row"), [[half, half], [2.0, 0.0]])
    # columns: (1, 2) and (0, 2) at the angle whose cosine is 2 / sqrt 5; (0, 0) and (1, 0), a zero vector
    angle = acos(2 / sqrt(5))
    share = sin(angle / 2) / sin(angle)
    close(nuslerp([x, y], along="column"), [[share, half], [4 * share, 0.0]])


def arc(x, y, t):
    angle = acos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    return (sin((1 - t) * angle) * x + sin(t * angle) * y) / sin(angle)


def test_nuslerp_is_its_formula():
    agrees("nuslerp", lambda m, b: arc(*m, 0.25), count=2, base=False, weights=[3, 1])
    agrees("nuslerp", lambda m, b: b + arc(*(x - b for x in m), 0.25), count=2, weights=[3, 1])
    rows = lambda m, b: b + np.stack([arc(x, y, 0.5) for x, y in zip(*(x - b for x in m), strict=True)])  # noqa: E731
    agrees("nuslerp", rows, count=2, along="row")
    agrees("nuslerp", lambda m, b: rows([x.T for x in m], b.T).T, count=2, along="column")


def test_multislerp_by_hand():
    # u = (1, 0), v = (0, 1), equal weights: m is the diagonal, the tangents cancel, the length is 3
    close(multislerp([X, Y]), [3 / sqrt(2), 3 / sqrt(2)])
    close(multislerp([X]), [2.0, 0.0])
    # weights 0.75, 0.25: m = (3, 1) / sqrt 10, <u, m> = 3 / sqrt 10, <v, m> = 1 / sqrt 10
    m = np.array([3, 1]) / sqrt(10)
    tangent = 0.75 * (np.array([1, 0]) - m[0] * m) + 0.25 * (np.array([0, 1]) - m[1] * m)
    size = np.linalg.norm(tangent)
    close(multislerp([X, Y], weights=[3, 1]), (2.5 * (cos(size) * m + sin(size) * tangent / size)).tolist())
    close(multislerp([X, -X], weights=[1, 1]), [0.0, 0.0])  # no direction: linear
    with pytest.raises(MergeError, match="the weighted directions cancel"):
        multislerp([X, -X, Y], weights=[1, 1, 0])


def directions(members):
    norms = np.array([np.linalg.norm(m) for m in members])
    return norms, [m / n for m, n in zip(members, norms, strict=True)]


def one_step(members, weights):
    norms, units = directions(members)
    m = sum(w * u for w, u in zip(weights, units, strict=True))
    m /= np.linalg.norm(m)
    tangent = sum(w * (u - (u * m).sum() * m) for w, u in zip(weights, units, strict=True))
    size = np.linalg.norm(tangent)
    return (weights @ norms) * (cos(size) * m + sin(size) / size * tangent)


def test_multislerp_is_its_formula():
    weights = np.array([0.5, 0.3, 0.2])
    agrees("multislerp", lambda m, b: one_step(m, weights), base=False, weights=[5, 3, 2])
    agrees("multislerp", lambda m, b: b + one_step([x - b for x in m], weights), weights=[5, 3, 2])


def test_karcher_by_hand():
    close(karcher([X, Y]), [3 / sqrt(2), 3 / sqrt(2)])
    # two directions: the mean divides the angle between them in the ratio of the weights
    close(karcher([X, Y], weights=[2, 1]), [(8 / 3) * cos(pi / 6), (8 / 3) * sin(pi / 6)])
    close(karcher([X, 0 * X]), [1.0, 0.0])  # a zero tensor has no direction but counts in the length
    close(karcher([0 * X, 0 * X]), [0.0, 0.0])
    close(karcher([X, -X]), [2.0, 0.0])  # no mean direction: the first one's


def karcher_mean(members, weights):
    norms, units = directions(members)
    m = sum(w * u for w, u in zip(weights, units, strict=True))
    m /= np.linalg.norm(m)
    for _ in range(50):
        logs = []
        for u in units:
            angle = acos(min(1.0, (u * m).sum()))
            logs.append(angle / sin(angle) * (u - (u * m).sum() * m))
        step = sum(w * v for w, v in zip(weights, logs, strict=True))
        size = np.linalg.norm(step)
        m = cos(size) * m + (sin(size) / size * step if size > 1e-15 else 0)
    return (weights @ norms) * m


def test_karcher_is_the_point_to_which_its_steps_converge():
    weights = np.array([0.5, 0.3, 0.2])
    agrees("karcher", lambda m, b: karcher_mean(m, weights), base=False, weights=[5, 3, 2], tol=1e-9)


def test_near_identical_members_in_bfloat16_lose_nothing():
    base = torch.randn(200, 50).bfloat16()
    members = [(base.float() * (1 + 0.01 * torch.randn(200, 50))).bfloat16() for _ in range(3)]
    expected = karcher_mean([m.double().numpy() for m in members], np.full(3, 1 / 3))
    torch.testing.assert_close(
        karcher([m.float() for m in members]).double(), torch.from_numpy(expected), rtol=1e-6, atol=1e-6
    )
