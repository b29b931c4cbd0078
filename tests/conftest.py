"""How all tests run, whichever folder they lie in."""

from collections.abc import Callable
from typing import Any

import pytest

HAS_ROOM = pytest.StashKey[bool]()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> object:
    """Run pytest, and each of its workers, with room for its calls in one piece of memory.

    Since 3.11 Python keeps local variables in pieces of 16 KiB, maps a new one when a call does not fit into the last,
    and unmaps it when the call returns. Pytest alone nearly fills the first, so that an inner loop of what is tested
    came to lie at the edge: Triton's interpreter mapped 870,000 pieces in 40 small problems, half of its time.
    """
    if HAS_ROOM in config.stash:
        return None
    config.stash[HAS_ROOM] = True
    return with_room(config.hook.pytest_cmdline_main, config=config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: one that begins last would run alone, while the other workers have no work."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def with_room(function: Callable[..., Any], **arguments: Any) -> Any:
    return function(**arguments)


# A call that asks for 256 KiB gets twice that, to the next power of two: the other half is for what it calls.
with_room.__code__ = with_room.__code__.replace(co_stacksize=2**15)
