import gc
import subprocess
import sys
import threading
import time

import pytest

from ultrarec.data.prefetch import Prefetcher


def threads(name):
    return [thread for thread in threading.enumerate() if thread.name == name]


def counting(drawn):
    while True:
        drawn.append(len(drawn))
        yield drawn[-1]


def failing():
    yield 1
    raise OSError("the disk is gone")


def test_items_arrive_complete_and_in_order():
    assert list(Prefetcher((number for number in range(100)), depth=3, name="all")) == list(range(100))
    assert threads("all") == []


def test_an_error_is_raised_where_its_item_would_have_come():
    ahead = Prefetcher(failing(), depth=3, name="failing")
    assert next(ahead) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    with pytest.raises(StopIteration):
        next(ahead)
    assert threads("failing") == []


def test_no_more_than_depth_items_wait():
    drawn = []
    ahead = Prefetcher(counting(drawn), depth=3, name="bounded")
    next(ahead)
    deadline = time.monotonic() + 5
    while len(drawn) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    # 1 taken, 3 waiting, 1 in the hand of the thread
    assert len(drawn) == 5
    ahead.close()


def test_closing_ends_the_thread_and_the_iteration():
    ahead = Prefetcher(counting([]), depth=2, name="closed")
    next(ahead)
    ahead.close()
    assert threads("closed") == []
    assert list(ahead) == []


def test_a_consumer_that_waits_is_woken_by_closing():
    release = threading.Event()

    def stuck():
        release.wait(10)
        yield 1

    ahead = Prefetcher(stuck(), depth=2, name="stuck")
    got = []
    consumer = threading.Thread(target=lambda: got.extend(ahead))
    consumer.start()
    closer = threading.Thread(target=ahead.close)
    closer.start()
    consumer.join(timeout=5)
    assert not consumer.is_alive()
    release.set()
    closer.join(timeout=5)
    assert got == []


def test_a_forgotten_iterator_ends_its_thread():
    ahead = Prefetcher(counting([]), depth=2, name="forgotten")
    next(ahead)
    del ahead
    gc.collect()
    assert threads("forgotten") == []


def test_a_program_that_ends_in_the_middle_exits_cleanly():
    program = (
        "import itertools; from ultrarec.data.prefetch import Prefetcher\n"
        "ahead = Prefetcher((k for k in itertools.count()), depth=2, name='x'); print(next(ahead))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "0", "")
