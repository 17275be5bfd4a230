"""Workers that are copies of the process: what they tell each other, and how they end."""

import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from hf_vlmerge.merging import MergeError, merge
from hf_vlmerge.merging.forks import can_fork, together

pytestmark = pytest.mark.skipif(not can_fork(), reason="workers are copies on Linux only")


def run(count, work):
    with together(count, work):
        pass


def test_everybody_hears_everybody():
    def work(team):
        first = team.exchange(team.index * 10)
        second = team.exchange(torch.full((3,), team.index))
        return team.index, team.first, first, torch.stack(second).sum().item()

    with together(3, work) as results:
        assert results == [(i, i == 0, [0, 10, 20], 9) for i in range(3)]


def test_every_item_is_taken_once_and_who_is_slow_takes_less():
    def work(team):
        turns = team.turns(range(300))
        if team.first:
            taken = [*islice(turns, 1)]
            team.exchange(None)  # until the others have nothing left
            return taken + list(turns)
        taken = list(turns)
        team.exchange(None)
        return taken

    with together(3, work) as results:
        assert sorted(item for taken in results for item in taken) == list(range(300))
        assert all(taken == sorted(taken) for taken in results)
        assert len(results[0]) <= 1


@pytest.mark.parametrize("who", [0, 1, 2])
def test_the_error_of_any_is_raised_and_nobody_is_left(who):
    def work(team):
        if team.index == who:
            raise MergeError(f"process {who} failed")
        team.exchange(None)
        return os.getpid()

    with pytest.raises(MergeError, match=f"process {who} failed"):
        run(3, work)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # no child is left


def test_an_error_that_cannot_travel_is_told_in_words():
    class Local(Exception):
        pass

    def work(team):
        if not team.first:
            raise Local("of a class that others do not know")

    with pytest.raises(MergeError, match="Local: of a class that others do not know"):
        run(2, work)


def test_a_worker_that_is_killed_is_one_sentence():
    def work(team):
        if not team.first:
            os.kill(os.getpid(), signal.SIGKILL)
        return team.exchange(None)

    with pytest.raises(MergeError, match="a worker process ended before its work was done"):
        run(2, work)


@pytest.mark.parametrize("killed", [1, 2])
def test_one_of_several_workers_that_was_killed_is_an_error(killed):
    def work(team):
        if team.index == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return team.exchange(team.index)

    with pytest.raises(MergeError, match="a worker process ended before its work was done"):
        run(3, work)


def test_an_error_in_a_worker_leaves_no_output(tmp_path):
    good = {name: {f"w{i}": torch.randn(50, 50) for i in range(6)} for name in "ab"}
    good["b"]["w3"][0, 0] = torch.nan
    with pytest.raises(MergeError, match="w3 of memory"):
        merge(
            {"merge_method": "linear", "models": ["a", "b"]},
            tmp_path / "out",
            sources=good,
            threads=3,
            processes=True,
            progress=False,
        )
    assert not os.listdir(tmp_path)


ENDLESS = """
import os, sys, time
from pathlib import Path
from hf_vlmerge.merging.forks import together

def work(team):
    Path(sys.argv[1], str(os.getpid())).touch()
    while True:
        time.sleep(0.05)

with together(3, work):
    pass
"""


def test_workers_end_with_the_process_that_made_them(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)])
    deadline = time.monotonic() + 60
    while len(os.listdir(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(name) for name in os.listdir(tmp_path)]
    process.kill()
    process.wait()
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 3 and not any(map(is_running, pids))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
