"""A store for the ranks of one attempt alone: torchrun's outlives attempts, and keeps what earlier ones said in it.

The agent of torch 2.13 makes its store once and hands it to every attempt, under the same names. A restarted rank then
reads where those of the attempt before it listened, unless they have already written their new addresses: its
connections are refused, or, where an old port sorts otherwise than the new one, both ends listen until the time limit.
NCCL's ids are passed on in the same way. Agents' counts of restarts name no attempt: those of several nodes differ.
"""

from __future__ import annotations

import datetime
import json
import time
import uuid

from torch._C._distributed_c10d import PrefixStore, Store

CALL = "ultrarec/call"
POLL_SECONDS = 0.02


def store_of_attempt(store: Store, *, rank: int, size: int, timeout: datetime.timedelta) -> Store:
    """A part of `store` that nobody but these ranks, as they are now, has ever written to; every rank calls it.

    Rank 0 calls by a new name; under it each of the others answers with a new word of its own. Once rank 0 has repeated
    all words, whoever finds its own among them knows that it heard this attempt's call, not an earlier one's.

    Raises:
        TimeoutError: not all ranks came within `timeout`.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    word = uuid.uuid4().hex
    name = _call(store, word, size, deadline) if rank == 0 else _answer(store, word, rank, deadline)
    return PrefixStore(name, store)


def _call(store: Store, name: str, size: int, deadline: float) -> str:
    store.set(CALL, name)
    answers = [f"{name}/{rank}" for rank in range(1, size)]
    while missing := [key for key in answers if not store.check([key])]:
        _wait_a_moment(deadline, f"{len(missing)} of {size} ranks, the first of them {missing[0].rpartition('/')[2]}")
    store.set(f"{name}/all", json.dumps([store.get(key).decode() for key in answers]))
    return name


def _answer(store: Store, word: str, rank: int, deadline: float) -> str:
    while True:
        if store.check([CALL]):
            name = store.get(CALL).decode()
            store.set(f"{name}/{rank}", word)
            if store.check([f"{name}/all"]) and word in json.loads(store.get(f"{name}/all")):
                return name
        _wait_a_moment(deadline, "rank 0")


def _wait_a_moment(deadline: float, for_whom: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"waited for {for_whom} to join the process group, longer than trainer.timeout_seconds")
    time.sleep(POLL_SECONDS)
