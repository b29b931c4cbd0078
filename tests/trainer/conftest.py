"""Runs that several tests look at, each trained once, whichever of pytest's workers asks first."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from process_group import run_ranks
from small_runs import KINDS, config_of, make_dataset, train_on_ranks

MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What runs in a test's own process adds in the order of the ranks that tests start, which have one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """The folder of a name, filled by the first worker that asks for it, while others that do wait."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def dataset(made_once: MadeOnce) -> Path:
    return made_once("prepared", lambda folder: make_dataset(folder / "dataset")) / "dataset"


@pytest.fixture(scope="session")
def trained(dataset: Path, made_once: MadeOnce) -> Callable[[int], dict[str, Path]]:
    """By world size: the run folders of uninterrupted runs of every kind, without dropout, saved every 5 steps."""

    def train(world_size: int) -> dict[str, Path]:
        def fill(folder: Path) -> None:
            runs = [(config_of(dataset, kind, "checkpoint.every=5"), folder / kind) for kind in KINDS]
            run_ranks(train_on_ranks, runs, world_size=world_size)

        folder = made_once(f"trained-{world_size}", fill)
        return {kind: folder / kind for kind in KINDS}

    return train
