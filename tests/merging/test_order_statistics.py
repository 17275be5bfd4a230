"""Values of given ranks, exactly: whatever the sample said, over chunks of any size, over one tensor or the model."""

from dataclasses import replace

import pytest
import torch

from hf_vlmerge.merging import _order
from hf_vlmerge.merging._order import delta_magnitudes, kth_largest, magnitudes
from hf_vlmerge.merging.program import BLOCK, Chunk, Reads, begin, complete
from hf_vlmerge.merging.registry import MergeMethod
from hf_vlmerge.merging.streaming import Job, settle_whole_model

N = 3 * BLOCK + 77
RANKS = (1, 2, 77, N // 5, N // 2, N - 1, N)


def chunks(x, size, base=None):
    def make(at):
        own = None if base is None else base[at : at + size]
        return Chunk(x[:, at : at + size], own, tuple("abc"[: len(x)]), torch.ones(len(x)), start=at)

    return [make(at) for at in range(0, max(1, x.shape[1]), size)]


def found(x, ranks, size=BLOCK, values=magnitudes, base=None, sample=lambda c: c):
    """``sample`` makes of the whole tensor the chunk that the engine would show for it."""
    program = kth_largest(values, lambda row, entries: list(ranks))
    (whole,) = chunks(x, max(1, x.shape[1]), base)
    reads = Reads([lambda c=c: [c] for c in chunks(x, size, base)], lambda: sample(whole))
    return complete(program, begin(program), lambda: reads, "element")


CASES = {
    "normal": lambda: torch.randn(2, N),
    "few values": lambda: torch.randint(-3, 4, (2, N)).float(),
    "one value": lambda: torch.full((2, N), -0.25),
    "zeros": lambda: torch.zeros(2, N),
    "beyond the bins": lambda: torch.cat([torch.randn(2, N // 2) * 1e-30, torch.randn(2, N - N // 2) * 1e30], 1),
    "subnormal": lambda: torch.randn(2, N) * 1e-42,
    "with infinities": lambda: torch.randn(2, N).masked_fill(torch.rand(2, N) < 0.001, torch.inf),
    "mostly zeros": lambda: torch.randn(2, N) * (torch.rand(2, N) < 0.1),
    "sorted": lambda: torch.randn(2, N).sort(1).values,
}
SAMPLES = {
    "all": lambda c: c,
    "one of 64": lambda c: replace(c, x=c.x[:, ::64], stands_for=c.x.shape[1]),
    "one": lambda c: replace(c, x=c.x[:, :1], stands_for=c.x.shape[1]),
    "all too large": lambda c: replace(c, x=c.x.abs()[:, ::64] * 1e6 + 1, stands_for=c.x.shape[1]),
    "all zero": lambda c: replace(c, x=torch.zeros_like(c.x[:, ::64]), stands_for=c.x.shape[1]),
}


@pytest.mark.parametrize("gathered", [1 << 22, 100])
@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("case", CASES)
def test_ranks_are_exact_whatever_the_sample_says(case, sample, gathered, monkeypatch):
    """By selection and, where that would hold too much, by counting."""
    monkeypatch.setattr(_order, "GATHERED", gathered)
    x = CASES[case]()
    expected = x.abs().sort(1, descending=True).values[:, [rank - 1 for rank in RANKS]]
    for size in (BLOCK, 4 * BLOCK):
        assert found(x, RANKS, size, sample=SAMPLES[sample]).equal(expected)


def test_of_no_rank_or_no_entries_the_answer_is_infinite():
    assert found(torch.ones(1, 5), [0, 1]).tolist() == [[torch.inf, 1.0]]
    assert found(torch.ones(2, 0), [1]).tolist() == [[torch.inf], [torch.inf]]


def test_magnitudes_of_differences():
    x, base = torch.randn(3, N), torch.randn(N)
    expected = (x - base).abs().sort(1, descending=True).values[:, [99]]
    assert found(x, [100], values=delta_magnitudes, base=base).equal(expected)


def test_over_the_model_each_member_has_the_tensors_that_have_it():
    class Group:
        def __init__(self, members, x):
            self.members, self.x, self.parameters = members, x, {}

    def program():
        return (yield from kth_largest(magnitudes, lambda row, entries: [entries // 4], "global"))

    a, b, c = torch.randn(2, 5000), torch.randn(2, 70000), torch.randn(1, 300)
    jobs = [
        Job(Group(members, x), MergeMethod("probe", program))
        for members, x in ((("v", "l"), a), (("l", "vl"), b), (("vl",), c))
    ]
    settle_whole_model(
        jobs, lambda j: [Chunk(j.group.x, None, j.group.members, torch.ones(len(j.group.members)))], lambda j: "kin"
    )
    pools = {"v": a[0], "l": torch.cat([a[1], b[0]]), "vl": torch.cat([b[1], c[0]])}
    expected = {m: pool.abs().sort(descending=True).values[len(pool) // 4 - 1] for m, pool in pools.items()}
    for job in jobs:
        assert job.step.result[:, 0].tolist() == [expected[m].item() for m in job.group.members]
