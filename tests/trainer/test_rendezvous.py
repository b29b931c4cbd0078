"""Attempts of one job share torchrun's store; none may read what an earlier one left there."""

import datetime
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import Store, TCPStore

from ultrarec.data.errors import UserError
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
        assert alone.exception() is not None
    with pytest.raises(UserError, match=r"rank\(s\) 1 did not come within trainer.timeout_seconds"):
        agent_store(0, 2, datetime.timedelta(seconds=0.3))
    first, second = attempt(2)
    first.set("key", "value")
    assert second.get("key") == b"value"


def test_without_the_store_of_an_agent_torch_finds_its_own(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert agent_store(0, 2, PATIENCE) is None
