"""What a merge costs: the plan's figures, the limit of memory, threads."""

import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from hf_vlmerge.merging import MergeError, merge
from hf_vlmerge.merging.program import BLOCK
from hf_vlmerge.merging.ranks import Ranks, shares
from hf_vlmerge.merging.workers import Memory, Workers, available_threads


@pytest.fixture
def recipe(tmp_path):
    for seed, name in enumerate(("a", "b", "base")):
        (tmp_path / name).mkdir()
        tensors = {"layers.0.w": torch.randn(1000, 1000), "embed": torch.randn(10, 7), "steps": torch.tensor(seed)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    models = [str(tmp_path / name) for name in "ab"]
    rules = [{"match": "embed", "keep": "a"}, {"match": "nothing*", "keep": "b"}]
    return {"merge_method": "ties", "models": models, "base_model": str(tmp_path / "base"), "rules": rules}


def test_a_dry_run_tells_bytes_time_memory_and_what_rules_match(recipe):
    report = merge(recipe, None, dry_run=True)
    assert report.estimate.bytes_read == 3 * 4_000_000 + 280 + 8
    assert report.estimate.bytes_written == 4_000_000 + 280 + 8
    assert report.estimate.seconds > 0 and report.estimate.memory > 12_000_000
    text = report.table()
    assert "rule 1 (embed): 1 tensors, such as embed" in text and "rule 2 (nothing*): 0 tensors" in text
    assert "3 tensors: reads 12 MB, writes 4 MB" in text and "of working memory" in text
    assert report.to_dict()["estimate"]["bytes_read"] == report.estimate.bytes_read


def test_a_limit_of_memory_makes_chunks_smaller_then_workers_fewer(recipe):
    free = merge(recipe, None, dry_run=True, threads=2, chunk_size=1 << 22).estimate
    tight = merge(recipe, None, dry_run=True, threads=2, chunk_size=1 << 22, max_memory="80MB").estimate
    tighter = merge(recipe, None, dry_run=True, threads=2, chunk_size=1 << 22, max_memory="14MB").estimate
    assert free.chunk_size == 1 << 22 and tight.chunk_size < free.chunk_size and tight.threads == 2
    assert tighter.chunk_size == BLOCK and tighter.threads == 1 and tighter.memory <= 14e6


def test_whole_matrices_leave_chunks_as_they_are_and_vectors_need_no_matrix(recipe, tmp_path):
    for name in ("a", "b", "base"):
        save_file({"w": torch.randn(300, 300), "v": torch.randn(1 << 16)}, tmp_path / name / "model.safetensors")
    whole = {**recipe, "merge_method": "iso_c", "rules": []}
    limited = merge(whole, None, dry_run=True, threads=8, max_memory="10MB").estimate
    assert 1 <= limited.threads < 8 and limited.chunk_size == merge(whole, None, dry_run=True).estimate.chunk_size
    assert limited.memory <= 10e6


def test_a_limit_below_one_tensor_is_an_error(recipe):
    with pytest.raises(
        MergeError, match=r"layers.0.w needs about .* MB of memory at once, more than the limit of 1 MB"
    ):
        merge(recipe, None, dry_run=True, max_memory="1MB")


def test_threads_must_be_positive(recipe):
    with pytest.raises(MergeError, match="threads must be positive, not -1"):
        merge(recipe, None, dry_run=True, threads=-1)


def test_whoever_needs_more_memory_than_there_is_waits():
    memory, seen, most = Memory(10), [], []

    def work(need):
        with memory.hold(need):
            seen.append(need)
            most.append(memory.used)
            time.sleep(0.02)

    threads = [threading.Thread(target=work, args=(need,)) for need in (6, 6, 3, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [3, 6, 6, 40] and memory.used == 0
    assert all(used <= 10 or used == 40 for used in most)


def test_the_first_error_of_a_worker_stops_the_rest():
    begun = []

    def work(item):
        begun.append(item)
        if item == 3:
            raise MergeError("three")
        time.sleep(0.005)

    with Workers(2) as workers, pytest.raises(MergeError, match="three"):
        workers.each(work, range(1000), lambda item: 0)
    assert len(begun) < 1000


def test_workers_keep_the_order_and_run_torch_with_one_thread():
    with Workers(3) as workers:
        assert list(workers.map(lambda x: x * x, range(20))) == [x * x for x in range(20)]
        assert set(workers.map(lambda _: torch.get_num_threads(), range(9))) == {1}


def test_threads_follow_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert available_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert available_threads() >= 1


def test_shares_are_even_and_units_stay_whole():
    dealt = shares([["a", "b"], ["c"], ["d"], ["e"]], {"a": 3, "b": 2, "c": 4, "d": 2, "e": 1}.__getitem__, 2)
    assert dealt == [["a", "b", "e"], ["c", "d"]]


def test_one_process_alone_needs_no_group():
    alone = Ranks.launched()
    assert alone == Ranks() and alone.exchange(3) == [3] and alone.on_first(lambda: "made") == "made"
