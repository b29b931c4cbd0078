"""Attempts of one job share torchrun's store, and must not hear each other."""

import datetime
import multiprocessing
import os
import threading
import time

import pytest
import torch
from torch.distributed import TCPStore

from ultrarec.trainer.config import TrainerConfig
from ultrarec.trainer.meeting import store_of_attempt
from ultrarec.trainer.parallel import join, sum_over_ranks

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["ultrarec.trainer.parallel"])
SHORT = datetime.timedelta(seconds=20)


def join_and_sum(rank: int, port: int, seconds_late: float, sums) -> None:
    """A rank as torchrun starts it, which may be late, and which never leaves its group in an orderly way."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    time.sleep(seconds_late)
    with join(TrainerConfig(epochs=1, device="cpu", timeout_seconds=8)):
        sums.put(sum_over_ranks(torch.tensor([1.0 + rank])).item())
        time.sleep(60)


@pytest.mark.parametrize("late", [0, 1])
def test_a_restarted_rank_waits_for_the_others_where_their_predecessors_are_gone(late):
    """The store is an agent's: it lives on, with the addresses of ranks that were killed."""
    agent = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for seconds_late in (0.0, 0.5, 0.5):
        sums = _CONTEXT.SimpleQueue()
        ranks = [
            _CONTEXT.Process(target=join_and_sum, args=(rank, agent.port, seconds_late * (rank == late), sums))
            for rank in (0, 1)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + 30
        heard: list[float] = []
        while len(heard) < 2 and all(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            time.sleep(0.01)
            heard += [] if sums.empty() else [sums.get()]
        for process in ranks:
            process.kill()
            process.join()
        assert heard == [3.0, 3.0]


def meet(port: int, rank: int, size: int, names: dict, *, timeout: datetime.timedelta = SHORT) -> None:
    store = TCPStore("localhost", port, is_master=False)
    try:
        store_of_attempt(store, rank=rank, size=size, timeout=timeout).set("who", f"rank {rank}")
        names[rank] = store.get("ultrarec/call").decode()
    except TimeoutError as error:
        names[rank] = str(error)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_all_ranks_of_an_attempt_agree_on_a_name_that_no_earlier_attempt_had_whoever_comes_first(order):
    agent = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    seen = set()
    for _ in range(4):
        names: dict[int, str] = {}
        threads = [threading.Thread(target=meet, args=(agent.port, rank, 3, names)) for rank in order]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join()
        (name,) = set(names.values())
        seen.add(name)
    assert len(seen) == 4


@pytest.mark.parametrize(("rank", "said"), [(0, "2 of 3 ranks, the first of them 1"), (2, "rank 0")])
def test_who_does_not_come_is_named(rank, said):
    agent = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    names: dict[int, str] = {}
    meet(agent.port, rank, 3, names, timeout=datetime.timedelta(seconds=0.1))
    assert names[rank] == f"waited for {said} to join the process group, longer than trainer.timeout_seconds"
