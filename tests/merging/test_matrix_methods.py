"""Matrix methods and Fisher: by hand on 2x2 literals, against a float64 oracle, and where spectra are degenerate."""

import math

import numpy as np
import pytest
import torch

from hf_vlmerge.merging import MergeError, get_merge_method, merge_tensors

ONES = torch.ones(2, 2)


def close(result, expected, tolerance=1e-6):
    torch.testing.assert_close(result, torch.tensor(expected, dtype=result.dtype), rtol=0, atol=tolerance)


def update(name, tasks, **options):
    """What a method adds to a base of ones for task matrices."""
    members = [ONES + torch.tensor(task) for task in tasks]
    return get_merge_method(name)(members, base=ONES, **options) - 1


DIAGONALS = [[[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 5.0]]]


def test_iso_c_gives_every_direction_of_the_sum_the_mean_singular_value():
    close(update("iso_c", [[[0.0, 3.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]]), [[0.0, 3.0], [3.0, 0.0]])
    close(update("iso_c", DIAGONALS, scale=0.5), [[2.5, 0.0], [0.0, 2.5]])
    close(update("iso_c", DIAGONALS, weights=[2, 0]), [[4.0, 0.0], [0.0, 4.0]])


def test_tsv_merge_takes_leading_triplets_and_orthogonalises_them():
    close(update("tsv_merge", DIAGONALS), [[3.0, 0.0], [0.0, 5.0]])
    # Leading vectors (1, 0) and (.6, .8): the nearest orthonormal pair is (3, -1) and (1, 3) over the root of 10.
    oblique = [[[2.0, 0.0], [0.0, 0.0]], [[1.8, 2.4], [2.4, 3.2]]]  # 2 e e^T and 5 u u^T
    close(update("tsv_merge", oblique), [[2.3, 0.9], [0.9, 4.7]])
    close(update("tsv_merge", oblique, scale=2.0, weights=[0.5, 0.2]), [[2.0, 0.0], [0.0, 2.0]])


def test_iso_cts_shares_the_rank_between_the_sum_and_the_tasks():
    close(update("iso_cts", DIAGONALS, common_share=0.0), [[4.0, 0.0], [0.0, 4.0]])  # 3 and 5, one of each task
    close(update("iso_cts", DIAGONALS, common_share=1.0), [[5.0, 0.0], [0.0, 5.0]])  # 4 and 6, both of the sum
    # One common direction of the sum diag(4, 2), one of what it leaves of the only task.
    close(update("iso_cts", [[[4.0, 0.0], [0.0, 2.0]]], common_share=0.5), [[3.0, 0.0], [0.0, 3.0]])
    with pytest.raises(MergeError, match=r"common_share must lie between 0 and 1, not 1\.5"):
        update("iso_cts", DIAGONALS, common_share=1.5)


def test_wudi_disturbs_no_task():
    apart = [[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 4.0]]]
    close(update("wudi", apart), [[2.0, 0.0], [0.0, 4.0]])  # nothing to settle: the sum
    same_input = [[[2.0, 0.0], [0.0, 0.0]], [[6.0, 0.0], [0.0, 0.0]]]
    close(update("wudi", same_input), [[4.0, 0.0], [0.0, 0.0]])
    # Half the way (1 - exp(-2 time) = 1/2) from the sum 8, or from the mean 4, to 4.
    half = {"spectral": True, "time": math.log(2) / 2, "share": 0.5}
    close(update("wudi", same_input, **half), [[6.0, 0.0], [0.0, 0.0]])
    close(update("wudi", same_input, start="mean", **half), [[4.0, 0.0], [0.0, 0.0]])
    with pytest.raises(MergeError, match=r"share must lie above 0 and up to 1, not 0\.0"):
        update("wudi", apart, share=0.0)


def test_optmerge_takes_the_steps_of_gradient_descent_with_momentum():
    tasks = [[[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 3.0]]]
    # Truncated to diag(2, 0) and diag(0, 3): C = diag(4/5, 9/10), D = diag(8/5, 27/10), from the mean diag(1.5, 2).
    close(update("optmerge", tasks, steps=0), [[1.5, 0.0], [0.0, 2.0]])
    close(update("optmerge", tasks, steps=1, rate=0.5), [[1.9, 0.0], [0.0, 2.9]])
    close(update("optmerge", tasks, steps=2, rate=0.5, momentum=0.5), [[2.18, 0.0], [0.0, 3.44]])
    close(update("optmerge", tasks, steps=0, start="sum"), [[3.0, 0.0], [0.0, 4.0]])


A, B = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 2.0], [-1.0, 0.0]])
F, G = torch.tensor([[1.0, 0.0], [3.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])


def test_fisher_weighs_each_entry_by_its_sensitivity():
    fisher = get_merge_method("fisher")
    plain = {"statistics": [F, G], "normalize": False, "floor": 0.0}
    close(fisher([A, B], **plain), [[3.0, 2.0], [2.0, 4.0]])
    close(fisher([A, B], weights=[3, 1], **plain), [[2.0, 2.0], [2.6, 4.0]])
    close(fisher([A, B], **{**plain, "statistics": [4 * F, G]}, tokens=[4, 1]), [[3.0, 2.0], [2.0, 4.0]])
    a, b = 1 / math.sqrt(11), 1 / math.sqrt(3)
    norms = {**plain, "normalize": True}
    close(fisher([A, B], **norms), [[(a + 5 * b) / (a + b), 2.0], [(9 * a - b) / (3 * a + b), 4.0]])
    nobody = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    close(fisher([A, B], **{**plain, "statistics": [nobody, nobody]}), [[3.0, 2.0], [1.0, 2.0]])  # 0 / 0: the mean


def test_the_floor_of_fisher_in_its_three_variants():
    fisher = get_merge_method("fisher")
    zero = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    options = {"statistics": [zero, 2 * zero], "normalize": False, "floor": 0.5}
    # Root mean squares 1 and 2: at least 0.5 and 1.
    close(fisher([A, B], **options), [[(2 + 4 * 5) / 6, 2.0], [(1.5 - 1) / 1.5, 4 / 3]])
    close(fisher([A, B], variant="first", **options), [[(2 + 4 * 5) / 6, 2.0], [3.0, 4.0]])
    close(fisher([A, B], variant="add", **options), [[(2.5 + 4.5 * 5) / 7, 2.0], [1.0, 2.0]])


def test_fisher_values_that_say_nothing():
    fisher = get_merge_method("fisher")
    close(fisher([A[0], B[0]], weights=[3, 1]), [2.0, 2.0])  # no matrix, no values: the weighted mean
    for statistics, message in (
        ([F, None], "no fisher of member '1'"),
        ([F, torch.zeros(2, 2)], "member '1' has Fisher values that are all zero"),
        ([-F, G], "member '0' has Fisher values that are negative or not finite"),
        ([F, G * math.nan], "member '1' has Fisher values that are negative or not finite"),
        ([F, torch.ones(3)], r"fc.weight \(2, 2\): the statistics of fisher have the shape \(3,\)"),
    ):
        with pytest.raises(MergeError, match=message):
            fisher([A, B], statistics=statistics, name="fc.weight")
    with pytest.raises(MergeError, match=r"fc\.bias: member '1' has no Fisher values, which others have"):
        fisher([A[0], B[0]], statistics=[F[0], None], name="fc.bias")


def test_fisher_norms_run_over_the_whole_model():
    values = {"fisher.one": torch.ones(4), "fisher.two": torch.full((4,), 7.0)}
    member = [{"one": torch.zeros(4), "two": torch.zeros(4)}, {"one": torch.ones(4), "two": torch.ones(4)}]
    recipe = {
        "merge_method": "fisher",
        "models": [{"model": "a", "statistics": "s"}, {"model": "b", "statistics": "t"}],
    }
    other = {"fisher.one": torch.ones(4), "fisher.two": torch.ones(4)}
    merged = merge_tensors(recipe, {"a": member[0], "b": member[1], "s": values, "t": other})
    norms = math.sqrt(4 + 4 * 49), math.sqrt(8)
    close(merged["one"], [(1 / norms[1]) / (1 / norms[0] + 1 / norms[1])] * 4)
    close(merged["two"], [(1 / norms[1]) / (7 / norms[0] + 1 / norms[1])] * 4)


# The same in NumPy, float64, by singular value decompositions and explicit inverses.
def polar(x):
    u, _, v = np.linalg.svd(x, full_matrices=False)
    return u @ v


def svd(x, count):
    u, s, v = np.linalg.svd(x, full_matrices=False)
    return u[:, :count], s[:count], v[:count]


def joined(parts):
    return np.concatenate([p[0] for p in parts], 1), np.concatenate([p[1] for p in parts]), np.concatenate(
        [p[2] for p in parts], 0
    )  # fmt: skip


def oracle_iso_c(tasks):
    return polar(sum(tasks)) * svd(sum(tasks), None)[1].mean()


def oracle_tsv_merge(tasks):
    u, s, v = joined([svd(t, min(t.shape) // len(tasks)) for t in tasks])
    return polar(u) * s @ polar(v)


def oracle_iso_cts(tasks):
    rank = min(tasks[0].shape)
    own = round((rank - int(rank * 0.8)) / len(tasks))
    common = svd(sum(tasks), rank - own * len(tasks))
    u, s, v = joined([common, *(svd(t - common[0] @ (common[0].T @ t), own) for t in tasks)])
    return polar(u) @ polar(v) * s.mean()


def oracle_wudi(tasks):
    grams = [t.T @ t / (t**2).sum() for t in tasks]
    return sum(t @ g for t, g in zip(tasks, grams, strict=True)) @ np.linalg.pinv(sum(grams), rcond=1e-10)


def oracle_swudi(tasks):
    grams = [t.T @ t / (t**2).sum() for t in tasks]
    values, v = np.linalg.eigh(sum(grams))
    width, d = len(values), sum(t @ g for t, g in zip(tasks, grams, strict=True))
    values, v = np.maximum(values, 1e-8)[-math.ceil(0.65 * width) :], v[:, -math.ceil(0.65 * width) :]
    g = 1 - np.exp(-300 * values)
    return sum(tasks) - sum(tasks) @ v * g @ v.T + d @ v * (g / values) @ v.T


def oracle_optmerge(tasks):
    parts = [svd(t, min(t.shape) // len(tasks)) for t in tasks]
    t, speed = sum(tasks) / len(tasks), 0.0
    for _ in range(300):
        pairs = zip(tasks, parts, strict=True)
        gradient = sum(2 * (t - u * s @ v) @ v.T * s**2 @ v / (task**2).sum() for task, (u, s, v) in pairs)
        speed = 0.9 * speed + gradient
        t = t - 1e-2 * speed
    return t


ORACLES = {
    "iso_c": (oracle_iso_c, {}),
    "iso_cts": (oracle_iso_cts, {}),
    "tsv_merge": (oracle_tsv_merge, {}),
    "wudi": (oracle_wudi, {}),
    "swudi": (oracle_swudi, {"spectral": True}),
    "optmerge": (oracle_optmerge, {"rate": 1e-2}),
}
SHAPES = [(24, 16), (16, 56), (18, 18)]  # (16, 56): the task matrices together do not span the inputs


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", ORACLES)
def test_the_float64_oracle(case, shape):
    oracle, parameters = ORACLES[case]
    method = get_merge_method("wudi" if case == "swudi" else case)
    torch.manual_seed(len(case))
    tasks = [torch.randn(shape) for _ in range(3)]
    own = method(tasks, base=torch.zeros(shape), **parameters)
    expected = torch.from_numpy(oracle([t.double().numpy() for t in tasks]))
    torch.testing.assert_close(own.double(), expected, rtol=1e-6, atol=1e-6)
    base = torch.randn(shape).bfloat16()
    members = [(base + t).bfloat16() for t in tasks]
    exact = base.double() + torch.from_numpy(oracle([(m.double() - base.double()).numpy() for m in members]))
    own = method(members, base=base, **parameters)
    assert own.dtype == torch.bfloat16
    assert within_one_rounding(own, exact)


def within_one_rounding(own, exact):
    """Half a unit in the last place of bfloat16, and what float32 leaves open at a tie."""
    return bool(((own.double() - exact).abs() <= exact.abs() * 2**-8 * (1 + 1e-4) + 1e-6).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_regmean_and_fisher_against_numpy(dtype):
    torch.manual_seed(0)
    weights = [torch.randn(10, 6).to(dtype) for _ in range(3)]
    inputs = [np.random.default_rng(i).normal(size=(30, 6)) for i in range(3)]
    grams = [x.T @ x for x in inputs]
    fishers = [np.random.default_rng(i).gamma(0.5, size=(10, 6)) for i in range(3)]
    exact = [w.double().numpy() for w in weights]
    shrunk = [0.9 * g + 0.1 * np.diag(np.diag(g)) for g in grams]
    regmean = sum(w @ g for w, g in zip(exact, shrunk, strict=True)) @ np.linalg.inv(sum(shrunk))
    scaled = [np.maximum(f, 1e-6 * np.sqrt((f**2).mean())) / np.linalg.norm(f) for f in fishers]
    fisher = sum(w * f for w, f in zip(exact, scaled, strict=True)) / sum(scaled)
    for name, statistics, expected in (("regmean", grams, regmean), ("fisher", fishers, fisher)):
        own = get_merge_method(name)(weights, statistics=[torch.from_numpy(s) for s in statistics])
        expected = torch.from_numpy(expected)
        if dtype == torch.float32:
            torch.testing.assert_close(own.double(), expected, rtol=1e-6, atol=1e-6)
        else:
            assert within_one_rounding(own, expected)


DELTA_METHODS = ["iso_c", "iso_cts", "optmerge", "tsv_merge", "wudi"]


@pytest.mark.parametrize("name", DELTA_METHODS)
def test_task_matrices_of_low_rank_keep_to_their_span(name):
    """As adapters make them: directions that no task has do not appear, and nothing depends on arbitrary ones."""
    torch.manual_seed(1)
    left, right = torch.linalg.qr(torch.randn(30, 4))[0], torch.linalg.qr(torch.randn(40, 4))[0]
    tasks = [left @ torch.randn(4, 4) @ right.T for _ in range(2)]
    own = get_merge_method(name)(tasks, base=torch.zeros(30, 40))
    assert own.isfinite().all() and own.norm() > 0.1
    torch.testing.assert_close(left @ (left.T @ own) @ right @ right.T, own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", DELTA_METHODS)
def test_a_member_that_equals_the_base_and_members_that_are_equal(name):
    torch.manual_seed(2)
    base, task = torch.randn(8, 12), torch.randn(8, 12)
    method = get_merge_method(name)
    idle = method([base, base + task], base=base)
    assert idle.isfinite().all() and not torch.allclose(idle, base)
    twins = method([base + task] * 2, base=base)
    assert twins.isfinite().all()
    if name == "wudi":
        torch.testing.assert_close(twins, base + task, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(method([base, base], base=base), base, rtol=0, atol=0)


@pytest.mark.parametrize("name", DELTA_METHODS)
def test_what_is_no_matrix_takes_the_mean_of_the_task_vectors(name):
    for shape in ((5,), (2, 3, 2, 2), (), (1, 6)):
        if shape == (1, 6) and name not in ("tsv_merge", "optmerge"):
            continue
        base, a, b = (torch.randn(shape) for _ in range(3))
        own = get_merge_method(name)([a, b], base=base, scale=0.5)
        torch.testing.assert_close(own, base + 0.5 * ((a + b) / 2 - base), rtol=1e-6, atol=1e-6)


def test_regmean_where_few_tokens_do_not_determine_the_weights():
    """Outputs are fitted by the least correction of the mean, each input in units of its size."""
    torch.manual_seed(3)
    weights = [torch.randn(5, 12) for _ in range(2)]
    inputs = [torch.randn(3, 12, dtype=torch.float64) for _ in range(2)]
    own = get_merge_method("regmean")(weights, statistics=[x.T @ x for x in inputs], gamma=1.0).double()
    for w, x in zip(weights, inputs, strict=True):
        torch.testing.assert_close(x @ own.T, x @ w.double().T, rtol=1e-4, atol=1e-4)
    both = torch.cat(inputs)
    size = both.norm(dim=0)
    span = torch.linalg.qr((both / size).T)[0]
    correction = (own - sum(weights).double() / 2) * size
    torch.testing.assert_close(correction @ span @ span.T, correction, rtol=1e-4, atol=1e-4)


def test_regmean_with_inputs_of_very_different_size():
    """Outlier features: 1e5 times larger inputs, and one that was never seen."""
    torch.manual_seed(4)
    sizes = torch.tensor([1e5, 1.0, 1e-3, 0.0], dtype=torch.float64)
    weights = [torch.randn(3, 4) for _ in range(2)]
    inputs = [torch.randn(50, 4, dtype=torch.float64) * sizes for _ in range(2)]
    own = get_merge_method("regmean")(weights, statistics=[x.T @ x for x in inputs], gamma=1.0).double()
    a, b = ((x[:, :3].T @ x[:, :3]) for x in inputs)
    left = weights[0][:, :3].double() @ a + weights[1][:, :3].double() @ b
    torch.testing.assert_close(own[:, :3], torch.linalg.solve(a + b, left.T).T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own[:, 3], (weights[0] + weights[1])[:, 3].double() / 2)


def test_values_that_are_not_finite_name_the_tensor():
    bad = torch.full((3, 3), torch.nan)
    with pytest.raises(MergeError, match=r"fc.weight: a matrix method cannot take the NaN or Inf of member '1'"):
        get_merge_method("iso_c")([torch.eye(3), bad], base=torch.zeros(3, 3), name="fc.weight")
