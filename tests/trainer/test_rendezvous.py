"""Attempts of one job share torchrun's store; none may read what an earlier one left there."""

import datetime
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from process_group import CONTEXT
from torch.distributed import Store, TCPStore

from ultrarec.data.errors import UserError
from ultrarec.trainer.config import TrainerConfig
from ultrarec.trainer.parallel import join, sum_over_ranks
from ultrarec.trainer.rendezvous import agent_store

PATIENCE = datetime.timedelta(seconds=10)


@pytest.fixture
def server(monkeypatch):
    """The store of torchrun's agent, as the ranks find it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def attempt(world_size: int) -> list[Store]:
    with ThreadPoolExecutor(world_size) as ranks:
        stores = list(ranks.map(lambda rank: agent_store(rank, world_size, PATIENCE), range(world_size)))
    assert all(stores)
    return [store for store in stores if store]


@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 1, 2), (1, 4, 3)])
def test_the_ranks_of_an_attempt_share_a_store_that_holds_nothing_of_the_attempts_before(server, sizes):
    for size in sizes:
        stores = attempt(size)
        assert not stores[0].check(["address"])
        stores[-1].set("address", "here")
        assert [store.get("address") for store in stores] == [b"here"] * size


def test_ranks_that_died_while_they_met_do_not_stand_for_those_that_come_after(server):
    with ThreadPoolExecutor(1) as dead:
        # Rank 1 of an attempt whose rank 0 never came.
        alone = dead.submit(agent_store, 1, 2, datetime.timedelta(seconds=0.5))
        assert isinstance(alone.exception(), UserError)
        assert str(alone.exception()).startswith("rank 0 did not come within trainer.timeout_seconds; look for the ")
    with pytest.raises(UserError, match=r"rank\(s\) 1 did not come within trainer.timeout_seconds"):
        agent_store(0, 2, datetime.timedelta(seconds=0.3))
    first, second = attempt(2)
    first.set("key", "value")
    assert second.get("key") == b"value"


def test_without_the_store_of_an_agent_torch_finds_its_own(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert agent_store(0, 2, PATIENCE) is None


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
        sums = CONTEXT.SimpleQueue()
        ranks = [
            CONTEXT.Process(target=join_and_sum, args=(rank, agent.port, seconds_late * (rank == late), sums))
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
