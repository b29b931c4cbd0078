"""Runs that several tests look at, each trained once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from process_group import run_ranks
from small_runs import KINDS, config_of, make_dataset, train_on_ranks


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("prepared") / "dataset")


@pytest.fixture(scope="session")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Path]]:
    """By world size: the run folders of uninterrupted runs of every kind, without dropout, saved every 5 steps."""
    done: dict[int, dict[str, Path]] = {}

    def train(world_size: int) -> dict[str, Path]:
        if world_size not in done:
            root = tmp_path_factory.mktemp(f"trained-{world_size}")
            runs = {kind: (config_of(dataset, kind, "checkpoint.every=5"), root / kind) for kind in KINDS}
            run_ranks(train_on_ranks, list(runs.values()), world_size=world_size)
            done[world_size] = {kind: out for kind, (_, out) in runs.items()}
        return done[world_size]

    return train
