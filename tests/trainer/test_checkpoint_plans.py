"""A checkpoint written by any plan on any number of ranks is loaded by any other: weights and optimizer state."""

# R = rows of a table, D = its stored columns

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
import torch.distributed as dist
from process_group import run_ranks
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ultrarec.data.config import FeatureConfig
from ultrarec.data.errors import UserError
from ultrarec.embeddings.config import EmbeddingOptimizerConfig, EmbeddingsConfig
from ultrarec.embeddings.lookup import Lookup, init_tables
from ultrarec.embeddings.plan import make_plan
from ultrarec.embeddings.shards import TableShard, local_shards
from ultrarec.embeddings.tables import build_tables
from ultrarec.trainer.canonical import load_table, table_pieces
from ultrarec.trainer.checkpoint import Trainable, load, load_start
from ultrarec.trainer.config import CheckpointConfig, OptimizerConfig
from ultrarec.trainer.manifest import Manifest, Position, complete_checkpoints
from ultrarec.trainer.optimizer import Optimizer
from ultrarec.trainer.parallel import World
from ultrarec.trainer.pieces import Image, Piece, Source, write_index
from ultrarec.trainer.saver import Saver
from ultrarec.trainer.state import TrainState

DIM, STORED = 254, 256
ROWS = {"item": 46, "user_id": 31}
PLANS = {
    "row": {"item": "row_wise", "user_id": "row_wise"},
    "table": {"item": "table_wise", "user_id": "table_wise"},
    "column": {"item": "column_wise", "user_id": "column_wise"},
    "replicated": {"item": "data_parallel", "user_id": "data_parallel"},
}
WORLD_SIZES = (1, 2, 3, 4)
CPU = torch.device("cpu")


Held: TypeAlias = SimpleNamespace
"""A shard of a table: table, row, column, and as arrays, which outlive the process that sends them, weight_RD and
squares_R.
"""


class Tables(nn.Module):
    """What checkpoints need of a recommender: a lookup and dense weights."""

    def __init__(self, config: EmbeddingsConfig, num_items: int) -> None:
        super().__init__()
        features = {"user_id": FeatureConfig(kind="hash", role="user", num_values=ROWS["user_id"] - 1)}
        tables = build_tables(config, num_items=num_items, features=features, item_keys=("item", "candidate"))
        self.lookup = Lookup(tables, config)
        self.model = nn.Linear(3, 2)

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        return self.lookup(ids)


def build(plan: str, *, seed: int, num_items: int = ROWS["item"] - 1) -> Trainable:
    torch.manual_seed(seed)
    config = EmbeddingsConfig(dim=DIM, sharding=PLANS[plan], optimizer=EmbeddingOptimizerConfig(lr=0.05, eps=1e-3))
    tables = Tables(config, num_items)
    made, sharder = make_plan(tables, config, device=CPU)
    parallel = DistributedModelParallel(tables, device=CPU, plan=made, sharders=[sharder])
    init_tables(parallel, std=0.1, seed=seed)
    dense = {name: p for name, p in parallel.named_parameters() if name.startswith("model.")}
    replicated = parallel.module.lookup.replicated
    optimizer = Optimizer(
        OptimizerConfig(), dense=dense, sparse=parallel.fused_optimizer, replicated=replicated, total_steps=9
    )
    return Trainable(parallel, optimizer, TrainState())


def train(trainable: Trainable, *, steps: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        values = torch.cat([torch.randint(0, n, (6,), generator=generator) for n in (46, 46, 31)])
        ids = KeyedJaggedTensor(keys=["item", "candidate", "user_id"], values=values, lengths=torch.tensor([6, 0] * 3))
        trainable.optimizer.begin(step)
        vectors = trainable.parallel(ids)
        sum((v * torch.randn(v.shape, generator=generator)).sum() for v in vectors.values()).backward()
        trainable.state.step += 1


def held(trainable: Trainable) -> list[Held]:
    return [
        Held(
            table=s.table,
            row=s.first_row,
            column=s.first_column,
            weight_RD=s.weight_RD.numpy().copy(),
            squares_R=s.state["momentum1"].numpy().copy(),
        )
        for s in local_shards(trainable.parallel)
    ]


def world() -> World:
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=CPU)


def save(root: Path, plans: list[str]) -> dict[str, list[Held]]:
    """What this rank held when each plan's checkpoint was written."""
    found = {}
    for plan in plans:
        trainable = build(plan, seed=1)
        train(trainable, steps=2)
        config = CheckpointConfig()
        saver = Saver(config, root / f"{plan}-{dist.get_world_size()}", world(), config_hash="", dataset="", say=print)
        saver.save(trainable.pieces(world()), trainable.state, sync=[])
        found[plan] = held(trainable)
        train(trainable, steps=1)  # which the checkpoint must not see
        assert saver.wait() is None
        saver.close()
    return found


def loaded(folders: list[Path]) -> dict[tuple[str, Path], list[Held]]:
    """What this rank holds after each plan has loaded each checkpoint."""
    found = {}
    for plan in PLANS:
        trainable = build(plan, seed=2)
        for folder in folders:
            for shard in local_shards(trainable.parallel):
                shard.weight_RD.fill_(torch.nan)
                shard.state["momentum1"].fill_(torch.nan)
            load(trainable, folder, world=world())
            assert trainable.state.step == 2
            found[plan, folder] = held(trainable)
    return found


def whole(shards: list[Held]) -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """By table: the weights [R, D], and [R, D] of the m that divides each of them."""
    tables = {name: (np.full((rows, STORED), np.nan), np.full((rows, STORED), np.nan)) for name, rows in ROWS.items()}
    for shard in shards:
        rows = slice(shard.row, shard.row + len(shard.weight_RD))
        columns = slice(shard.column, shard.column + shard.weight_RD.shape[1])
        weights, squares = tables[shard.table]
        weights[rows, columns] = shard.weight_RD
        squares[rows, columns] = shard.squares_R[:, None]
    return tables


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By plan and world size: the checkpoint, and what its ranks held."""
    root = tmp_path_factory.mktemp("plans")
    found = {}
    for size in WORLD_SIZES:
        ranks = run_ranks(save, root, list(PLANS), world_size=size)
        for plan in PLANS:
            (folder,) = complete_checkpoints(root / f"{plan}-{size}")
            found[plan, size] = folder, [shard for rank in ranks for shard in rank[plan]]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_plan_loads_what_every_plan_on_every_world_size_saved(saved, world_size):
    ranks = run_ranks(loaded, [folder for folder, _ in saved.values()], world_size=world_size)
    for (before, size), (folder, shards) in saved.items():
        expected = whole(shards)
        for after in PLANS:
            what = f"{before} on {size} ranks, loaded {after} on {world_size}"
            found = [shard for rank in ranks for shard in rank[after, folder]]
            for table, (weights, _) in whole(found).items():
                np.testing.assert_array_equal(weights[:, :DIM], expected[table][0][:, :DIM], err_msg=what)
            for shard in found:
                rows = slice(shard.row, shard.row + len(shard.weight_RD))
                columns = slice(shard.column, shard.column + shard.weight_RD.shape[1])
                mean = expected[shard.table][1][rows, columns].mean(1).astype(np.float32)
                np.testing.assert_allclose(shard.squares_R, mean, rtol=2e-7, atol=0, err_msg=what)
                assert shard.squares_R.any(), what


def test_replicas_stay_equal_bit_for_bit(saved):
    (_, shards) = saved["replicated", 4]
    for table in ROWS:
        first, *others = [shard for shard in shards if shard.table == table]
        assert len(others) == 3
        for other in others:
            np.testing.assert_array_equal(other.weight_RD, first.weight_RD)
            np.testing.assert_array_equal(other.squares_R, first.squares_R)


def test_all_plans_learn_the_same_but_for_one_sum_per_piece_of_columns(saved):
    weights, squares = (whole(saved["row", 3][1])["item"][k] for k in (0, 1))
    for plan in ("table", "replicated"):
        found = whole(saved[plan, 3][1])["item"]
        np.testing.assert_allclose(found[0][:, :DIM], weights[:, :DIM], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found[1], squares, rtol=1e-5)
    in_pieces = whole(saved["column", 3][1])["item"][1]
    np.testing.assert_allclose(in_pieces.mean(1), squares.mean(1), rtol=1e-5)


def grown(folder: Path, num_items: int) -> tuple[list[Held], list[Held], list[float]]:
    """Tables before and after taking up a smaller checkpoint, and the dense weights after."""
    trainable = build("row", seed=7, num_items=num_items)
    before = held(trainable)
    load_start(trainable, folder, world=world())
    assert trainable.state.step == 0
    return before, held(trainable), trainable.parallel.module.model.weight.flatten().tolist()


def test_a_grown_vocabulary_begins_with_the_old_rows_in_place_and_fresh_new_ones(saved):
    folder, shards = saved["column", 2]
    old, old_squares = whole(shards)["item"]
    for before, after, _ in run_ranks(grown, folder, 60, world_size=2):
        for fresh, found in zip(before, after, strict=True):
            if found.table != "item":
                continue
            known = max(min(46 - found.row, len(found.weight_RD)), 0)
            rows = slice(found.row, found.row + known)
            np.testing.assert_array_equal(found.weight_RD[:known, :DIM], old[rows, :DIM])
            np.testing.assert_array_equal(found.weight_RD[known:], fresh.weight_RD[known:])
            mean = old_squares[rows].mean(1).astype(np.float32)
            np.testing.assert_allclose(found.squares_R[:known], mean, rtol=2e-7)
            assert not found.squares_R[known:].any()


def refused(folder: Path, num_items: int, may_grow: bool) -> str:
    trainable = build("row", seed=7, num_items=num_items)
    try:
        (load_start if may_grow else load)(trainable, folder, world=world())
    except UserError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize(("num_items", "may_grow"), [(40, True), (60, False)])
def test_a_table_that_shrank_is_refused_and_so_is_one_that_grew_within_a_run(saved, num_items, may_grow):
    folder, _ = saved["row", 2]
    told = (
        f"checkpoint {folder} does not fit this run: its table 'item' has 46 rows, this run's has {num_items + 1}; "
        "it was written for other tables or another model"
    )
    assert run_ranks(refused, folder, num_items, may_grow, world_size=2) == [told, told]


def shard_of(columns: int, first: int = 0, rows: int = 3) -> TableShard:
    state = {"momentum1": torch.full((rows,), torch.nan)}
    return TableShard("t", rows, 12, 0, first, torch.empty(rows, columns), state, False)


def write_checkpoint(folder: Path, pieces: list[Piece]) -> None:
    """What one rank that holds these pieces writes."""
    image = Image("rank-00000.safetensors", pieces, pin=False)
    image.stage(pieces)
    files = [image.write(folder), write_index(folder, [image.chunks])]
    image.close()
    Manifest(
        step=1,
        batches=1,
        world_size=1,
        loader=Position(0, 0),
        files=files,
        validations={},
        dataset="",
        versions={},
        config_hash="",
    ).write(folder)


@pytest.fixture
def cut_unevenly(tmp_path):
    """A table of 12 columns, stored in pieces of 2, 4 and 6 columns."""
    pieces = [Piece.whole("tables/t/weight", torch.arange(36.0).view(3, 12))]
    for first, last, value in ((0, 2, 1.0), (2, 6, 2.0), (6, 12, 4.0)):
        pieces.append(Piece.whole(f"tables/t/momentum1/columns-{first}-{last}", torch.full((3,), value)))
    write_checkpoint(tmp_path, pieces)
    return Source(tmp_path)


@pytest.mark.parametrize(
    ("first", "columns", "expected"),
    [
        (0, 12, (2 * 1 + 4 * 2 + 6 * 4) / 12),
        (0, 6, (2 * 1 + 4 * 2) / 6),
        (2, 4, 2.0),
        (3, 2, 2.0),
        (4, 6, (2 * 2 + 4 * 4) / 6),
    ],
    ids=["all", "two pieces", "the same piece", "inside a piece", "across pieces"],
)
def test_rowwise_state_of_other_columns_is_the_mean_of_the_pieces_by_their_widths(
    cut_unevenly, first, columns, expected
):
    shard = shard_of(columns, first)
    load_table(cut_unevenly, shard, dim=12, may_grow=False)
    torch.testing.assert_close(shard.state["momentum1"], torch.full((3,), expected))
    torch.testing.assert_close(shard.weight_RD, torch.arange(36.0).view(3, 12)[:, first : first + columns])


def state_per_weight(*cut: tuple[int, int]) -> list[TableShard]:
    """Shards of a table of 5 rows and 12 columns, of which the last two are padding, with one value per weight.

    Args:
        cut: first row and column of each; a shard ends where the next one in its row, or column, begins.
    """
    rows, columns = sorted({row for row, _ in cut} | {5}), sorted({column for _, column in cut} | {12})
    weight_RD, moment_RD = torch.arange(60.0).view(5, 12), torch.arange(60.0).view(5, 12) + 100
    shards = []
    for row, column in cut:
        place = slice(row, rows[rows.index(row) + 1]), slice(column, columns[columns.index(column) + 1])
        state = {"exp_avg": moment_RD[place].clone()}
        shards.append(TableShard("t", 5, 12, row, column, weight_RD[place].clone(), state, False))
    return shards


CUTS = {
    "whole": [(0, 0)],
    "rows": [(0, 0), (2, 0)],
    "columns": [(0, 0), (0, 4), (0, 8)],
    "other columns": [(0, 0), (0, 6)],
    "both": [(0, 0), (0, 8), (3, 0), (3, 8)],
}


@pytest.mark.parametrize("before", CUTS)
@pytest.mark.parametrize("after", CUTS)
def test_state_with_one_value_per_weight_goes_from_every_cut_to_every_other(tmp_path, before, after):
    write_checkpoint(
        tmp_path, [piece for shard in state_per_weight(*CUTS[before]) for piece in table_pieces(shard, dim=10)]
    )
    source = Source(tmp_path)
    for shard, expected in zip(state_per_weight(*CUTS[after]), state_per_weight(*CUTS[after]), strict=True):
        real = 10 - shard.first_column
        shard.weight_RD.fill_(torch.nan)
        shard.state["exp_avg"].fill_(torch.nan)
        load_table(source, shard, dim=10, may_grow=False)
        assert torch.equal(shard.weight_RD[:, :real], expected.weight_RD[:, :real])
        assert torch.equal(shard.state["exp_avg"][:, :real], expected.state["exp_avg"][:, :real])
    source.close()
