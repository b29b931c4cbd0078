"""Memory of a loader by how much it reads, and by how much there is: `python docs/loader_memory.py`, two minutes.

Prints the table of docs/running.md ("Memory follows from the window"); needs half a gigabyte of disk. Linux.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from ultrarec.data.bench import LONGEST_HISTORY, write_histories
from ultrarec.data.config import DataConfig
from ultrarec.data.loader import Loader, NextItemSampler

CASES = ((48, 1), (48, 12), (480, 1), (48, 30))
"""Row groups, and epochs over them."""


def read(path: str, epochs: int) -> None:
    """In a process of its own: read, and print the events read and the peak of memory beside the libraries."""
    config = DataConfig(path=path, batch_tokens=1 << 16, threads=2)
    resident = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    loader = Loader(config, NextItemSampler(LONGEST_HISTORY), split="train", rank=0, world_size=1, epochs=epochs)
    events = sum(batch.timestamps.numel() for batch in loader)
    print(f"{events / 1e6:.0f} million | {status('VmHWM') - resident:.0f} MiB")


def status(name: str) -> float:
    """MiB, by their name in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def main() -> None:
    """Every case in a fresh process, on row groups of 131,072 events."""
    with tempfile.TemporaryDirectory() as folder:
        for number in {groups for groups, _ in CASES}:
            write_histories(Path(folder) / str(number), mean_events=500, row_groups=number, group_events=1 << 17)
        for groups, epochs in CASES:
            command = [sys.executable, __file__, f"{folder}/{groups}", str(epochs)]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            print(f"| {groups} | {epochs} | {found} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        read(sys.argv[1], int(sys.argv[2]))
    else:
        main()
