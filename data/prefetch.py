"""An iterator that runs ahead in a background thread, and never leaves its consumer waiting for nothing."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Generic, TypeVar

T = TypeVar("T")


class _End:
    """The last thing to arrive: the source is exhausted, or has failed, or nobody wants more of it."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _Channel(Generic[T]):
    """Where items travel from the thread to the consumer, at most `depth` of them waiting."""

    def __init__(self, depth: int) -> None:
        self._items: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)
        self.is_closed = False

    def put(self, item: T) -> bool:
        """Wait for room; False, and nothing put, if the channel has been closed."""
        self._room.acquire()
        if not self.is_closed:
            self._items.put(item)
        return not self.is_closed

    def end(self, error: BaseException | None = None) -> None:
        self._items.put(_End(error))

    def get(self) -> T | _End:
        item = self._items.get()
        self._room.release()
        return item

    def close(self) -> None:
        """Wake whoever waits, on either side."""
        self.is_closed = True
        self._room.release()
        self.end()


class Prefetcher(Iterator[T], Generic[T]):
    """The items of `source`, at most `depth` of them drawn ahead by a thread, which closes the source in the end.

    An error in the source is raised where its item would have come. The thread ends with the source, on `close`, and
    when the prefetcher is garbage collected or the interpreter exits: it holds no reference to the prefetcher.
    """

    def __init__(self, source: Generator[T, None, None], depth: int, name: str) -> None:
        self._channel: _Channel[T] = _Channel(depth)
        thread = threading.Thread(target=_fill, args=(source, self._channel), name=name, daemon=True)
        thread.start()
        self._finish = weakref.finalize(self, _finish, self._channel, thread)

    def __next__(self) -> T:
        if self._channel.is_closed:
            raise StopIteration
        item = self._channel.get()
        if not isinstance(item, _End):
            return item
        self.close()
        if item.error is not None:
            raise item.error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it; items drawn ahead are dropped."""
        self._finish()


def _finish(channel: _Channel[T], thread: threading.Thread) -> None:
    channel.close()
    thread.join()


def _fill(source: Generator[T, None, None], channel: _Channel[T]) -> None:
    error: BaseException | None = None
    try:
        with closing(source):
            for item in source:
                if not channel.put(item):
                    break
    except BaseException as raised:  # whatever it is, the consumer waits for it
        error = raised
    channel.end(error)
