"""A store that holds nothing of an earlier attempt, although torchrun keeps one store for all of them.

torchrun's agent hosts the store at MASTER_ADDR:MASTER_PORT and leaves it as it is when it starts the ranks again (torch
2.13, dynamic_rendezvous.py). A restarted rank would find the addresses of ranks that are gone and connect to those:
gloo then fails with "Connection refused", and spends the restarts that `--max-restarts` allows, or waits for nobody.
TORCHELASTIC_RESTART_COUNT does not tell attempts apart: every agent counts only the failures of its own ranks.
"""

from __future__ import annotations

import datetime
import os
import time
import uuid

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistStoreError

from ..data.errors import UserError

POLL_SECONDS = 0.01


def agent_store(rank: int, world_size: int, timeout: datetime.timedelta) -> Store | None:
    """This attempt's part of the store of torchrun's agent; None where ranks were launched without one.

    Raises:
        UserError: a rank did not come within `timeout`.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    return PrefixStore(_attempt(PrefixStore("ultrarec", store), rank, world_size, timeout), store)


def _attempt(store: Store, rank: int, world_size: int, timeout: datetime.timedelta) -> str:
    """A name that all ranks of this attempt agree on and no earlier one had.

    Every rank but 0 writes a word that nobody wrote before, and waits for the answer to that word. Rank 0 answers every
    word it sees, those of the dead too, until each rank has said, under the new name, that it knows it.
    """
    if rank == 0:
        name = uuid.uuid4().hex
        _tell(store, name, set(range(1, world_size)), time.monotonic() + timeout.total_seconds())
        return name
    word = uuid.uuid4().hex
    store.set(f"word/{rank}", word)
    try:
        name = store.get(f"name/{word}").decode()
    except DistStoreError:
        raise UserError(_late("rank 0")) from None
    store.set(f"{name}/{rank}", "")
    return name


def _tell(store: Store, name: str, missing: set[int], deadline: float) -> None:
    """Answer every rank's word with the name until all of them have it."""
    answered: dict[int, bytes] = {}
    while missing:
        for rank in sorted(missing):
            if store.check([f"word/{rank}"]) and (word := store.get(f"word/{rank}")) != answered.get(rank):
                store.set(f"name/{word.decode()}", name)
                answered[rank] = word
            if store.check([f"{name}/{rank}"]):
                missing.remove(rank)
        if missing and time.monotonic() > deadline:
            raise UserError(_late(f"rank(s) {', '.join(map(str, sorted(missing)))}"))
        time.sleep(POLL_SECONDS if missing else 0)


def _late(ranks: str) -> str:
    return f"{ranks} did not come within trainer.timeout_seconds; look for the first error in their logs"
