"""The protocol: reductions over blocks, exact magnitudes, random numbers without state, sums over the whole model."""

import pytest
import torch

from hf_vlmerge.merging._ops import dots
from hf_vlmerge.merging._order import kth_magnitude
from hf_vlmerge.merging.program import BLOCK, Chunk, WholeModel, begin, blocks, complete, shape_for, total
from hf_vlmerge.merging.registry import MergeMethod
from hf_vlmerge.merging.streaming import Job, settle_whole_model


def chunk(x, start=0, **fields):
    members = tuple("abc"[: len(x)])
    return Chunk(x=x, base=None, members=members, weights=torch.ones(len(x)), start=start, **fields)


def cut(x, size):
    """Chunks of ``size`` elements, a multiple of BLOCK."""
    return [chunk(x[:, at : at + size], at) for at in range(0, x.shape[1], size)]


def test_sums_do_not_depend_on_the_chunk_size():
    x = torch.randn(3, 5 * BLOCK + 77)
    whole = total(dots, [chunk(x)], "element")[0]
    for multiple in (1, 2, 3):
        assert total(dots, cut(x, multiple * BLOCK), "element")[0].equal(whole)
    torch.testing.assert_close(whole, x.double() @ x.double().T, rtol=1e-12, atol=1e-9)


def test_blocks_are_elements_whole_rows_or_the_whole_tensor():
    flat = list(blocks(chunk(torch.zeros(2, BLOCK + 5)), "element"))
    assert [(b.start, b.x.shape[1]) for b in flat] == [(0, BLOCK), (BLOCK, 5)]
    rows = list(blocks(chunk(torch.zeros(2, 9, BLOCK // 4), start=BLOCK), "row"))
    assert [(b.start, b.x.shape[1]) for b in rows] == [(BLOCK, 4), (2 * BLOCK, 4), (3 * BLOCK, 1)]
    assert len(list(blocks(chunk(torch.zeros(2, 9, BLOCK)), "tensor"))) == 1
    assert [shape_for(u, (3, 4, 5)) for u in ("element", "row", "tensor")] == [(60,), (3, 20), (3, 4, 5)]
    assert shape_for("row", (7,)) == (1, 7) and shape_for("element", ()) == (1,)


def test_reductions_must_be_exact_or_wide():
    with pytest.raises(TypeError, match="int64 or float64"):
        total(lambda c: (c.x.sum(),), [chunk(torch.ones(1, 4))], "element")


@pytest.mark.parametrize("keep", [0.001, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 7, 1000, BLOCK + 3])
def test_kth_magnitude_is_exact(keep, size):
    x = torch.randn(2, size)
    x[1] = x[1].to(torch.bfloat16).float()  # many ties
    x[0, : size // 3] = 0.0
    program = kth_magnitude([keep, keep], "tensor")
    found = complete(program, begin(program), lambda: cut(x, BLOCK), "element")
    k = max(1, int(keep * size))
    assert found.equal(x.abs().sort(1, descending=True).values[:, k - 1])


def test_what_is_kept_depends_on_seed_name_member_and_index_alone():
    x = torch.zeros(2, 1000)
    whole = chunk(x, seed=5, name="w").keep("a", 0.25)
    assert whole.shape == (1000,) and 180 < int(whole.sum()) < 320
    for start in (1, 2, 3, 4, 400):
        part = Chunk(x[:, start:], None, ("a", "b"), torch.ones(2), name="w", start=start, seed=5)
        assert part.keep("a", 0.25).equal(whole[start:])
    others = [chunk(x, seed=6, name="w"), chunk(x, seed=5, name="v")]
    assert not any(other.keep("a", 0.25).equal(whole) for other in others)
    assert not chunk(x, seed=5, name="w").keep("b", 0.25).equal(whole)


def test_each_entry_may_have_a_probability_of_its_own():
    c = chunk(torch.zeros(1, 100_000), seed=1, name="w")
    p = torch.linspace(0, 1, 100_000)
    assert c.keep("a", torch.full((100_000,), 0.25)).equal(c.keep("a", 0.25))
    assert c.keep("a", 1.0).all() and not c.keep("a", 0.0).any()
    assert c.keep("a", torch.ones(100_000)).all() and not c.keep("a", torch.zeros(100_000)).any()
    assert abs(float(c.keep("a", p)[:50_000].float().mean()) - 0.25) < 0.01


class Group:
    def __init__(self, members, x):
        self.members, self.x, self.parameters = members, x, {}


def job(members, x, function):
    return Job(Group(members, x), MergeMethod("probe", function))


def chunks_of(j):
    yield Chunk(j.group.x, None, j.group.members, torch.ones(len(j.group.members)))


def test_sums_over_the_whole_model_are_taken_member_by_member():
    def program():
        (sums,) = yield WholeModel(lambda c: (c.x.double().sum(1),))
        return sums

    jobs = [
        job(("v", "l"), torch.tensor([[1.0, 2.0], [10.0, 20.0]]), program),
        job(("l", "vl"), torch.tensor([[5.0], [100.0]]), program),
    ]
    settle_whole_model(jobs, chunks_of, lambda j: "one kin")
    assert [j.step.result.tolist() for j in jobs] == [[3.0, 35.0], [35.0, 100.0]]


def test_a_program_asks_for_the_whole_model_first():
    def program():
        yield lambda c: (c.x.double().sum(1),)
        yield WholeModel(lambda c: (c.x.double().sum(1),))

    late = job(("v",), torch.ones(1, 2), program)
    settle_whole_model([late], chunks_of, lambda j: "one kin")
    with pytest.raises(RuntimeError, match="whole model before"):
        complete(late.program, late.step, lambda: chunks_of(late), "element")
