"""The memory of columns and batches is used again, and does not grow with what has passed through it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from random_datasets import random_histories, write_dataset

from ultrarec.data.config import DataConfig
from ultrarec.data.loader import Loader, NextItemSampler
from ultrarec.data.memory import Memory


def place_of(array):
    return array.__array_interface__["data"][0]


def test_what_nobody_holds_is_used_again():
    memory = Memory()
    first = memory.empty(100_000)
    place = place_of(first)
    del first
    assert place_of(memory.empty(100_000)) == place


@pytest.mark.parametrize(
    "part",
    [lambda array: array[5:9], torch.from_numpy, lambda array: torch.from_numpy(array)[7:].view(torch.float64)],
    ids=["slice", "tensor", "part of a tensor"],
)
def test_what_somebody_holds_a_part_of_is_not_used_again(part):
    memory = Memory()
    whole = memory.empty(100_000)
    whole[:] = 3
    place, held = place_of(whole), part(whole)
    del whole
    assert place_of(memory.empty(100_000)) != place
    memory.empty(100_000)[:] = 4
    assert set(np.asarray(held).view(np.int64).tolist()) == {3}


def test_arrays_in_use_at_once_share_no_memory():
    memory = Memory()
    random = np.random.default_rng(0)
    held = {}
    for number in range(600):
        array = memory.empty(int(random.integers(1, 200_000)))
        array[:] = number
        held[number] = array
        if len(held) > 20:
            oldest = min(held)
            assert (held.pop(oldest) == oldest).all()


GROWING = """
import numpy as np, re, sys
from collections import deque
from pathlib import Path
from ultrarec.data.memory import Memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

memory, random, held, begin = Memory(), np.random.default_rng(0), deque(maxlen=20), resident()
# Every size from 100,000 to a million numbers, the small ones first: up to 20 of about the same size are in use.
for length in np.sort(random.integers(100_000, 1_000_000, 2_000)).tolist():
    held.append(memory.empty(length))
    held[-1][:] = 1
print(resident() - begin, sum(array.nbytes for array in held) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux only")
def test_memory_grows_with_what_is_in_use_and_not_with_the_sizes_that_passed():
    shown = subprocess.run([sys.executable, "-c", GROWING], check=True, capture_output=True, text=True).stdout
    resident, in_use = map(float, shown.split())
    # An eighth to spare, an eighth of a block lost to rounding, and 4 MiB of the interpreter's own.
    assert resident < in_use * (9 / 8) ** 2 + 4


def test_a_loader_reads_into_the_memory_of_batches_that_were_dropped(tmp_path):
    histories = random_histories(num_users=900, num_items=50, mean_events=200, seed=3)
    write_dataset(tmp_path / "dataset", histories, num_items=50, rows_per_group=150)
    config = DataConfig(path=str(tmp_path / "dataset"), batch_tokens=20_000, prefetch=1, threads=1)
    loader = Loader(config, NextItemSampler(1000), split="train", rank=0, world_size=1, epochs=30)
    places = [batch.timestamps.data_ptr() for batch in loader if len(batch.timestamps) > 2**14]
    assert len(places) > 150
    assert len(set(places)) < len(places) / 4
