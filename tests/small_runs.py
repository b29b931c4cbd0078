"""Small real runs for tests of the trainer: a synthetic dataset, recipes over it, and what their folders then hold."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from random_datasets import random_histories, write_dataset
from torch import Tensor

from ultrarec.trainer.config import Config, load_config
from ultrarec.trainer.loop import train
from ultrarec.trainer.manifest import checkpoint_folder, complete_checkpoints, step_of
from ultrarec.trainer.parallel import World
from ultrarec.trainer.pieces import Source
from ultrarec.trainer.run import open_run
from ultrarec.trainer.saved import remember_saved

NUM_ITEMS = 45
# Widths that are no multiple of fbgemm's four, two sharded tables, a feature of every role, and a context token. A
# large eps, since rounding differs with the number of ranks, and dividing a gradient by its tiny size would enlarge it.
COMMON = """
[data]
path = "{path}"
max_history = 12
audit = true
evaluate_rows = 16
shuffle_row_groups = 2

[embeddings]
dim = 6
init_std = 0.1
optimizer.lr = 0.05
optimizer.eps = 1e-3

[model]
width = 12
num_layers = 2
num_heads = 2
qk_dim = 5
value_dim = 4
token_hidden = 16

[optimizer]
lr = 0.003

[checkpoint]
keep_last = 100

[trainer]
epochs = 2
log_every = 1
device = "cpu"
"""
RANKING = (
    COMMON
    + """
[objective]
kind = "ranking"
tasks = ["is_click", "long_view"]
head_hidden = 16
[data.features]
tab = {{ kind = "category", role = "event", num_values = 5 }}
play_time = {{ kind = "bucket", role = "outcome", num_values = 12 }}
user_id = {{ kind = "hash", role = "user", num_values = 30 }}
"""
)
NEXT_ITEM = (
    COMMON
    + """
[objective]
kind = "next_item"
"""
)
KINDS = {
    "ranking": (
        RANKING,
        "data.batch_rows=24",
        "model.position_encoding=from_end",
        "model.time_encoding=log",
        "embeddings.sharding.item=row_wise",
        "embeddings.sharding.user_id=table_wise",
    ),
    "columns": (
        RANKING,
        "data.batch_rows=24",
        "embeddings.dim=254",
        "objective.regressions.play_time.scale=log",
        "objective.regressions.tab.scale=linear",
        "objective.regressions.tab.weight=0.5",
        "objective.num_experts=2",
        "embeddings.sharding.item=column_wise",
        "embeddings.sharding.user_id=row_wise",
    ),
    "full_softmax": (
        NEXT_ITEM,
        "data.batch_rows=7",
        "data.train_targets=recent",
        "trainer.epochs=4",
        "model.relative_bias=position_time",
    ),
    "sampled_softmax": (
        NEXT_ITEM,
        "data.batch_rows=7",
        "data.train_targets=recent",
        "trainer.epochs=4",
        "objective.temperature=0.2",
        "objective.loss=sampled_softmax",
        "objective.num_negatives=16",
    ),
    "adamw_softmax": (
        NEXT_ITEM,
        "data.batch_rows=7",
        "trainer.epochs=4",
        "objective.temperature=0.2",
        "objective.loss=sampled_softmax",
        "objective.num_negatives=8",
        "objective.negatives_shared_by=sample",
        "embeddings.sharding.item=data_parallel",
        "embeddings.optimizer.kind=adamw",
        "embeddings.optimizer.lr=0.01",
        "embeddings.optimizer.weight_decay=0.1",
    ),
}
"""A recipe and settings by kind of run."""


def make_dataset(root: Path, *, num_users: int = 60, mean_events: float = 8.0) -> Path:
    """A prepared dataset of two files, whose users have long, short and empty histories."""
    histories = random_histories(num_users=num_users, num_items=NUM_ITEMS, mean_events=mean_events, seed=5)
    write_dataset(root, histories, num_items=NUM_ITEMS, num_files=2, rows_per_group=7)
    return root


def config_of(dataset: Path, kind: str, *settings: str) -> Config:
    """The configuration of one of KINDS over a dataset, with further settings; its recipe stands beside the dataset."""
    text, *own = KINDS[kind]
    path = dataset.parent / f"{kind}.toml"
    if not path.exists():
        new = path.with_suffix(f".{os.getpid()}")  # other workers of pytest may read or write the recipe now
        new.write_text(text.format(path=dataset))
        new.replace(path)
    return load_config(str(path), [*own, *settings])


def train_on_ranks(runs: Sequence[tuple[Config, Path]]) -> None:
    """What `ultrarec.trainer` does on each rank, for one run after the other in the same process group."""
    world = World(rank=dist.get_rank(), size=dist.get_world_size(), device=torch.device("cpu"))
    for config, out in runs:
        with open_run(config, out, world, fresh=False) as run:
            train(run)


def lines(out: Path, split: str = "train") -> list[dict[str, Any]]:
    """The metrics of a split, without what a clock measured, or what counts from where the process began."""
    parsed = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time", "tokens_per_second", "samples_per_second", "model_tflops", "seconds/")
    return [{k: v for k, v in line.items() if not k.startswith(clocks)} for line in parsed if line["split"] == split]


def losses(out: Path) -> list[float]:
    """Mean training loss of each line."""
    return [line["loss"] for line in lines(out)]


def audit(out: Path) -> dict[int, list[tuple[int, int, int]]]:
    """The (file, row, sample) triples that all ranks together consumed, by epoch, in no order."""
    consumed: dict[int, list[tuple[int, int, int]]] = {}
    for path in out.glob("audit/rank-*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            consumed.setdefault(line["epoch"], []).extend(tuple(row) for row in line["rows"])
    return consumed


def audited_steps(out: Path, rank: int) -> list[dict[str, Any]]:
    """The lines of one rank."""
    return [json.loads(line) for line in (out / f"audit/rank-{rank}.jsonl").read_text().splitlines()]


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, by name."""
    source = Source(folder)
    try:
        return {name: source.tensor(name) for name in source.entries}
    finally:
        source.close()


def final_tensors(out: Path) -> dict[str, Tensor]:
    """Every tensor of a run's newest checkpoint."""
    return checkpoint_tensors(complete_checkpoints(out)[-1])


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not bit for bit equal, or that one side lacks."""
    both = left.keys() & right.keys()
    return sorted([*(left.keys() ^ right.keys()), *(name for name in both if not torch.equal(left[name], right[name]))])


def interrupted(out: Path, copy: Path, *, step: int) -> Path:
    """A copy of a finished run as a kill would leave it some time after the checkpoint of `step`: later lines stand,
    later checkpoints do not.
    """
    shutil.copytree(out, copy)
    for folder in complete_checkpoints(copy):
        if (step_of(folder) or 0) > step:
            shutil.rmtree(folder)
    assert complete_checkpoints(copy)[-1] == checkpoint_folder(copy, step)
    remember_saved(copy, None, step)
    return copy
