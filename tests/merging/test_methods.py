"""Merge methods: facts by hand on 2x2 literals, and laws that hold for every registered method."""

import math

import pytest
import torch

from hf_vlmerge.merging import MergeError, get_merge_method, list_merge_methods, merge_tensors

A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
B = torch.tensor([[5.0, 2.0], [-1.0, 0.0]])
C = torch.tensor([[0.0, 3.0], [6.0, -3.0]])
BASE = torch.tensor([[1.0, 1.0], [1.0, 1.0]])


def close(result, expected):
    torch.testing.assert_close(result, torch.tensor(expected, dtype=result.dtype), rtol=0, atol=1e-6)


def test_linear_divides_by_the_sum_of_the_weights_unless_told_otherwise():
    linear = get_merge_method("linear")
    close(linear([A, B]), [[3.0, 2.0], [1.0, 2.0]])
    close(linear([A, B], weights=[3, 1]), [[2.0, 2.0], [2.0, 3.0]])
    close(linear([A, B], weights=[0.25, 0.25], normalize=False), [[1.5, 1.0], [0.5, 1.0]])


def test_interpolation_gives_a_third_to_the_cross_modal_expert():
    interpolation = get_merge_method("interpolation")
    close(interpolation([A, B], ratio=0.75), [[2.0, 2.0], [2.0, 3.0]])
    close(interpolation([A, B, C], ratio=0.75), [[4 / 3, 7 / 3], [10 / 3, 1.0]])
    close(interpolation([A, B, C], ratio=1.0, fusion_share=0.5), [[0.5, 2.5], [4.5, 0.5]])
    close(interpolation([C]), C.tolist())


def test_task_arithmetic_adds_scaled_weighted_deltas_to_the_base():
    arithmetic = get_merge_method("task_arithmetic")
    close(arithmetic([A, B], base=BASE), [[5.0, 3.0], [1.0, 3.0]])
    close(arithmetic([A, B], base=BASE, scale=0.5, weights=[1, 2]), [[5.0, 2.5], [0.0, 1.5]])
    close(arithmetic([A, B], base=BASE, normalize=True), [[3.0, 2.0], [1.0, 2.0]])


def test_modality_arithmetic_in_the_form_of_the_paper_and_of_its_released_code():
    arithmetic = get_merge_method("modality_arithmetic")
    close(arithmetic([A, B], base=BASE, scale=0.5), [[3.0, 2.0], [1.0, 2.0]])
    moved = BASE + 0.5 * (A - BASE)
    close(arithmetic([A, B], base=BASE, scale=0.5, sequential=True), (moved + 0.5 * (B - moved)).tolist())
    close(arithmetic([A, B], base=BASE, scale=1.0, sequential=True), B.tolist())
    close(arithmetic([C], base=BASE, scale=0.5, sequential=True), C.tolist())
    close(arithmetic([C], base=BASE, scale=0.5), (BASE + 0.5 * (C - BASE)).tolist())


def test_regmean_solves_the_least_squares_of_the_inputs():
    regmean = get_merge_method("regmean")
    g, h = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    # diagonal only: each input feature is an average with weights 2 : 1 and 2 : 4
    close(regmean([A, B], statistics=[g, h], gamma=0.0), [[7 / 3, 2.0], [5 / 3, 4 / 3]])
    # full: (A g + B h) (g + h)^-1 with g + h = [[3, 1], [1, 6]], inverse [[6, -1], [-1, 3]] / 17
    left = A @ g + B @ h
    expected = left @ torch.tensor([[6.0, -1.0], [-1.0, 3.0]]) / 17
    close(regmean([A, B], statistics=[g, h], gamma=1.0), expected.tolist())
    means = regmean([A, B], statistics=[g, h], tokens=[2, 4], gamma=0.0, gram="mean")
    close(means, [[(1 * 1 + 5 * 0.25) / 1.25, 2.0], [(3 * 1 - 1 * 0.25) / 1.25, 2.0]])


def test_regmean_takes_the_mean_where_no_input_was_ever_seen_and_of_biases():
    regmean = get_merge_method("regmean")
    seen = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    close(regmean([A, B], statistics=[seen, 3 * seen]), [[4.0, 2.0], [0.0, 2.0]])
    close(regmean([A[0], B[0]]), [3.0, 2.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no gram of member '0' in the statistics"),
        ({"statistics": [torch.eye(2), torch.zeros(2, 2)]}, "member '1' has an all-zero Gram matrix"),
        ({"statistics": [torch.eye(3)] * 2}, "member '0' has a Gram matrix (3, 3)"),
        ({"statistics": [torch.eye(2)] * 2, "gram": "mean"}, "needs the token count of member '0'"),
    ],
)
def test_regmean_without_usable_statistics_is_an_error(options, message):
    with pytest.raises(MergeError) as error:
        get_merge_method("regmean")([A, B], name="fc.weight", **options)
    assert "fc.weight" in str(error.value) and message in str(error.value)


def test_slerp_keeps_to_the_great_circle_and_turns_linear_when_nearly_parallel():
    slerp = get_merge_method("slerp")
    x, y = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    half = math.sin(math.pi / 4)
    close(slerp([x, y]), [2 * half, 4 * half])
    close(slerp([x, y], ratio=1 / 3), [2 * math.sin(math.pi / 3), 4 * math.sin(math.pi / 6)])
    close(slerp([x, 3 * x], ratio=0.25), [3.0, 0.0])
    close(slerp([x, -x], ratio=0.25), [1.0, 0.0])
    close(slerp([x, 0 * x]), [2 * half, 0.0])  # a zero tensor has no direction and counts as orthogonal
    with pytest.raises(MergeError, match="linear takes at least 1 members, not none"):
        get_merge_method("linear")([])
    with pytest.raises(MergeError, match="slerp takes exactly 2 members, not 3"):
        slerp([A, B, C])


# Laws over the registry. Each method gets two members (or one, if it takes no more), a base, and statistics where it
# wants them.
def call(name, tensors, base, **options):
    method = get_merge_method(name)
    return method(few(method, tensors), base=base, **statistics(method, few(method, tensors)), **options)


def few(method, tensors):
    return tensors[: method.members[1]]


def statistics(method, tensors):
    shape = tensors[0].shape
    if method.statistics == "gram" and len(shape) == 2:
        return {"statistics": [torch.eye(shape[1]) + k for k, _ in enumerate(tensors)]}
    if method.statistics == "fisher":
        return {"statistics": [torch.full(shape, 1.0 + k) for k, _ in enumerate(tensors)]}
    return {}


@pytest.fixture(params=list_merge_methods())
def name(request):
    return request.param


def test_the_registry_knows_the_methods_of_this_room():
    expected = """
        linear slerp nuslerp multislerp karcher interpolation task_arithmetic modality_arithmetic ties dare_linear
        dare_ties della della_linear breadcrumbs breadcrumbs_ties model_stock sce consensus arcee_fusion nearswap
        passthrough regmean
    """
    assert set(expected.split()) <= set(list_merge_methods())


def test_shape_and_dtype_are_kept_and_inputs_untouched(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((4, 6), (6,), (2, 3, 2, 2), (1,), ()):
            tensors = [torch.randn(shape).to(dtype) for _ in range(3)]
            before = [t.clone() for t in tensors]
            result = call(name, tensors[:2], tensors[2])
            assert result.shape == torch.Size(shape) and result.dtype == dtype and result.isfinite().all()
            assert all(t.equal(b) for t, b in zip(tensors, before, strict=True))
            assert all(result.data_ptr() != t.data_ptr() for t in tensors)


def test_a_tensor_without_elements_stays_one(name):
    method = get_merge_method(name)
    if method.unit != "tensor" and not method.statistics:  # there are no statistics of nothing
        for shape in ((0, 6), (6, 0), (0,)):
            assert call(name, [torch.empty(shape)] * 2, torch.empty(shape)).shape == shape


def test_members_equal_to_the_base_give_the_base(name):
    x = torch.randn(5, 6)
    torch.testing.assert_close(call(name, [x, x], x), x, rtol=1e-6, atol=1e-6)


def test_equal_members_give_that_member_unless_the_method_moves_away_from_a_base(name):
    x, method = torch.randn(5, 6), get_merge_method(name)
    if not method.needs_base:
        torch.testing.assert_close(call(name, [x, x], None), x, rtol=1e-6, atol=1e-6)
    elif "scale" in method.parameters:
        assert not torch.allclose(call(name, [x, x], x - 1.0, scale=0.1), x)
    else:  # somewhere on the way
        result = call(name, [x, x], x - 1.0)
        assert ((result > x - 1 - 1e-6) & (result < x + 1e-6)).all()


def test_the_same_call_gives_the_same_bits(name):
    tensors = [torch.randn(40, 60) for _ in range(3)]
    first, second = (call(name, tensors[:2], tensors[2], seed=3) for _ in range(2))
    assert first.equal(second)


def test_a_method_that_needs_a_base_says_so(name):
    if get_merge_method(name).needs_base:
        with pytest.raises(MergeError, match=f"{name} needs a base"):
            call(name, [A, B], None)
    else:
        assert call(name, [A, B], None).shape == A.shape


def test_every_parameter_is_typed_has_a_default_and_is_explained(name):
    method = get_merge_method(name)
    assert method.summary and method.cost
    for parameter in method.parameters.values():
        assert parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
        assert parameter.annotation is not parameter.empty
        assert f"{parameter.name}: " in method.function.__doc__


def test_the_variant_of_another_tool_is_said_in_the_methods_own_parameters(name):
    method = get_merge_method(name)
    bound, _ = method.bind(method.mergekit, ["a"] * method.members[0])
    assert set(method.mergekit) <= set(bound)


def test_unknown_parameters_name_the_nearest_one():
    with pytest.raises(MergeError, match="interpolation has no parameter 'ration'; did you mean 'ratio'"):
        get_merge_method("interpolation")([A, B], ration=0.5)
    with pytest.raises(MergeError, match="unknown merge method 'interpolate'; did you mean 'interpolation'"):
        get_merge_method("interpolate")
    with pytest.raises(MergeError, match="interpolation has no parameter 'weights'"):
        get_merge_method("interpolation")([A, B], weights=[1, 2])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("interpolation", {"ratio": "half"}, "interpolation: ratio must be a finite number, not 'half'"),
        ("interpolation", {"ratio": float("nan")}, "ratio must be a finite number"),
        ("interpolation", {"ratio": True}, "ratio must be a finite number, not True"),
        ("linear", {"normalize": 1}, "linear: normalize must be true or false, not 1"),
        ("linear", {"weights": [1, 2, 3]}, "weights: 3 values for 2 members"),
        ("linear", {"weights": {"0": 1, "2": 1}}, "weights: the mapping lacks '1'"),
        ("linear", {"weights": [1, -1]}, "sum to zero"),
        ("regmean", {"gram": "total"}, "gram must be one of 'sum', 'mean', not 'total'"),
    ],
)
def test_values_that_do_not_fit_the_schema_are_refused(method, options, message):
    with pytest.raises(MergeError) as error:
        call(method, [A, B], BASE, **options)
    assert message in str(error.value)


def test_aliases_of_parameters():
    close(get_merge_method("interpolation")([A, B], t=1.0), A.tolist())
    close(get_merge_method("task_arithmetic")([A, B], base=BASE, **{"lambda": 0.0}), BASE.tolist())
    close(get_merge_method("linear")([A, B], weight=[0, 1]), B.tolist())


def engine_inputs(method, shape):
    """A recipe for the engine, its sources, and the same for a plain call."""
    tensors = {key: {"layer.weight": torch.randn(shape)} for key in ("a", "b", "base")}
    models = few(method, ["a", "b"])
    options = statistics(method, [tensors[m]["layer.weight"] for m in models])
    for key, values in zip(models, options.get("statistics", ()), strict=False):
        tensors[f"{key}-statistics"] = {f"{method.statistics}.layer.weight": values}
    entries = [{"model": m} | ({"statistics": f"{m}-statistics"} if options else {}) for m in models]
    recipe = {"merge_method": method.name, "models": entries, "base_model": "base"}
    return recipe, tensors, [tensors[m]["layer.weight"] for m in models], options


def test_the_engine_and_the_plain_call_agree(name):
    method = get_merge_method(name)
    recipe, sources, inputs, options = engine_inputs(method, (30, 40))
    merged = merge_tensors(recipe, sources)["layer.weight"]
    base = sources["base"]["layer.weight"]
    assert merged.equal(method(inputs, base=base, name="layer.weight", members=few(method, ["a", "b"]), **options))


VARIANTS = [
    *((name, {}) for name in list_merge_methods() if get_merge_method(name).unit != "tensor"),
    *((name, {"compat": "mergekit"}) for name in list_merge_methods() if get_merge_method(name).mergekit),
    ("ties", {"parameters": {"scope": "tensor", "zero_sign": "majority", "rescale": True}}),
    ("ties", {"parameters": {"scope": "global", "zero_sign": "majority"}}),
    ("breadcrumbs", {"parameters": {"ranked_over": "row"}}),
    ("breadcrumbs", {"parameters": {"rescale": True}}),
    ("model_stock", {"parameters": {"filter_wise": True}}),
    ("nuslerp", {"parameters": {"along": "row"}}),
    ("nuslerp", {"parameters": {"along": "column"}}),
    ("della", {"parameters": {"rescale_by": "l1"}}),
    ("dare_ties", {"parameters": {"rescale_by": "l1", "density": 0.3}}),
    ("sce", {"parameters": {"selection": "weights"}}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=lambda v: v if isinstance(v, str) else str(v))
def test_chunks_of_any_size_give_the_same_bits(name, changes):
    recipe, sources, *_ = engine_inputs(get_merge_method(name), (331, 600))  # four blocks
    whole, *chunked = (
        merge_tensors(recipe | changes, sources, chunk_size=size)["layer.weight"] for size in (1 << 20, 1, 3 << 16)
    )
    assert all(each.equal(whole) for each in chunked)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.zeros(2, 2), r"member '1' has an all-zero Gram matrix \(2, 2\)"),
        (torch.full((2, 2), torch.nan), r"member '1' has a NaN or Inf in its Gram matrix \(2, 2\)"),
        (torch.eye(3), r"member '1' has a Gram matrix \(3, 3\)"),
    ],
)
def test_regmean_refuses_a_gram_that_says_nothing(gram, message):
    with pytest.raises(MergeError, match=message):
        get_merge_method("regmean")([torch.eye(2), torch.ones(2, 2)], statistics=[torch.eye(2), gram])
