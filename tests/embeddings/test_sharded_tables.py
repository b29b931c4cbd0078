"""Sharded tables hold, look up and learn what one plain table would, whatever the plan."""

# R = rows, D = stored columns, E = ids looked up

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from process_group import run_ranks
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ultrarec.data.config import FeatureConfig
from ultrarec.data.errors import UserError
from ultrarec.embeddings import shards, tables
from ultrarec.embeddings.config import EmbeddingOptimizerConfig, EmbeddingsConfig
from ultrarec.embeddings.lookup import Lookup, init_tables
from ultrarec.embeddings.plan import describe_plan, make_plan
from ultrarec.embeddings.tables import build_tables, init_rows, padded_dim

NUM_ITEMS = 45
FEATURES = {"user_id": FeatureConfig(kind="hash", role="user", num_values=30)}
CPU = torch.device("cpu")
WIDE = 254
"""TorchRec cuts columns into pieces of at least 128: two of them, and padding in the second."""

Shards = list[tuple[str, int, int, "np.ndarray[Any, Any]"]]
"""Arrays, since a tensor sent between processes lives only as long as its sender."""


def shard(config: EmbeddingsConfig, *, std: float = 0.1, seed: int = 3) -> tuple[DistributedModelParallel, str]:
    """A lookup of items and users on this rank, and the page that describes its plan."""
    needed = build_tables(config, num_items=NUM_ITEMS, features=FEATURES, item_keys=("item", "candidate"))
    lookup = Lookup(needed, config)
    plan, sharder = make_plan(lookup, config, device=CPU)
    parallel = DistributedModelParallel(lookup, device=CPU, plan=plan, sharders=[sharder])
    init_tables(parallel, std=std, seed=seed)
    return parallel, describe_plan(plan, config)


def local_shards(parallel: DistributedModelParallel) -> Shards:
    """Table, first row, first column and values of everything this rank holds."""
    return [(s.table, s.first_row, s.first_column, s.weight_RD.numpy().copy()) for s in shards.local_shards(parallel)]


def whole(ranks: list[Shards]) -> dict[str, Tensor]:
    """The tables that the shards of all ranks make; NaN where no shard lies, an error where two do that are no copies
    of a whole table.
    """
    rows = {"item": NUM_ITEMS + 1, "user_id": 31}
    columns = max(column + part.shape[1] for held in ranks for _, _, column, part in held)
    full = {name: torch.full((count, columns), torch.nan) for name, count in rows.items()}
    for name, row, column, part in (piece for held in ranks for piece in held):
        place = full[name][row : row + part.shape[0], column : column + part.shape[1]]
        is_copy = place.shape == full[name].shape and torch.equal(place, torch.from_numpy(part))
        assert place.isnan().all() or is_copy, f"two shards of {name} overlap"
        place.copy_(torch.from_numpy(part))
    return full


def initial_shards(dims_and_plans: list[tuple[int, dict[str, Any]]], block_rows: int) -> list[tuple[Shards, str]]:
    tables.INIT_BLOCK_ROWS = block_rows
    made = [shard(EmbeddingsConfig(dim=dim, sharding=sharding)) for dim, sharding in dims_and_plans]
    return [(local_shards(parallel), plan) for parallel, plan in made]


PLANS = [
    (6, {}),
    (6, {"item": "row_wise", "user_id": "table_wise"}),
    (6, {"item": "table_wise", "user_id": "row_wise"}),
    (WIDE, {"item": "column_wise", "user_id": "row_wise"}),
    (WIDE, {"item": "row_wise", "user_id": "column_wise"}),
    (6, {"item": "data_parallel", "user_id": "row_wise"}),
    (6, {"item": "data_parallel", "user_id": "data_parallel"}),
]


@pytest.fixture(scope="module", params=[65_536, 7], ids=["one block", "blocks of 7 rows"])
def initial(request):
    """By world size: for every plan, what each rank holds at first, and the plan's page."""
    return {
        n: list(zip(*run_ranks(initial_shards, PLANS, request.param, world_size=n), strict=True)) for n in (1, 2, 3)
    }


def test_every_plan_on_every_world_size_starts_from_the_same_rows(initial):
    for dim in (6, WIDE):
        tables_of = {
            (n, k): whole([shards for shards, _ in ranks])
            for n, plans in initial.items()
            for k, ranks in enumerate(plans)
            if PLANS[k][0] == dim
        }
        first = tables_of[1, 0 if dim == 6 else 3]
        assert all(not table.isnan().any() for table in first.values())
        for (n, k), found in tables_of.items():
            for name, table in found.items():
                assert torch.equal(table, first[name]), f"{name} on {n} ranks, plan {PLANS[k]}"


def test_initial_rows_are_normal_and_differ_by_table_and_row(initial):
    full = whole([shards for shards, _ in initial[1][3]])
    item = full["item"]
    assert float(item.std()) == pytest.approx(0.1, rel=0.03)
    assert abs(float(item.mean())) < 0.003
    assert len(torch.unique(item, dim=0)) == len(item)
    assert not torch.equal(item[:31], full["user_id"])


def test_the_plan_honours_the_recipe_and_names_every_shard(initial):
    for n, plans in initial.items():
        for (_, sharding), ranks in zip(PLANS, plans, strict=True):
            assert len({page for _, page in ranks}) == 1, "ranks disagree about the plan"
            lines = {line.split()[0]: line for line in ranks[0][1].splitlines()[1:]}
            for rank, (held, _) in enumerate(ranks):
                for name, row, column, part in held:
                    if sharding.get(name) == "data_parallel":
                        assert lines[name].split()[1:] == [
                            "data_parallel",
                            "dense",
                            "recipe",
                            "whole",
                            "on",
                            "every",
                            "rank",
                        ]
                    elif part.size:
                        assert f"{rank} [{part.shape[0]} x {part.shape[1]} at {row}, {column}]" in lines[name]
            assert lines.keys() == {"item", "user_id"}
            for name, kind in sharding.items():
                assert lines[name].split()[1] == kind, f"{name} on {n} ranks"
                assert "recipe" in lines[name]


def test_column_wise_tables_are_really_cut_into_columns(initial):
    for n in (2, 3):
        held = [shards for shards, _ in initial[n][3]]
        columns = {column for shards in held for name, _, column, _ in shards if name == "item"}
        assert columns == {0, 128}


def test_an_init_block_is_the_same_whichever_part_of_it_a_shard_holds(monkeypatch):
    monkeypatch.setattr(tables, "INIT_BLOCK_ROWS", 32)

    def rows(first, last, *, columns=slice(None)):
        out = torch.empty(last - first, 8)[:, columns]
        init_rows(out, table="t", first_row=first, first_column=columns.start or 0, dim=8, std=1.0, seed=1)
        return out

    everything = rows(0, 70)
    for first in range(0, 70, 3):
        for last in range(first, 71):
            assert torch.equal(rows(first, last), everything[first:last]), f"rows {first} to {last}"
    assert torch.equal(rows(5, 40, columns=slice(4, 8)), everything[5:40, 4:8])


@pytest.mark.parametrize(("dim", "stored"), [(1, 4), (4, 4), (6, 8), (50, 52), (254, 256)])
def test_stored_rows_are_padded_to_vectors_of_four(dim, stored):
    assert padded_dim(dim) == stored


def test_hashed_features_have_a_table_and_other_features_none():
    features = FEATURES | {
        "tab": FeatureConfig(kind="category", role="event", num_values=5),
        "author": FeatureConfig(kind="hash", role="event", num_values=99),
    }
    made = build_tables(EmbeddingsConfig(dim=6), num_items=NUM_ITEMS, features=features, item_keys=("item",))
    assert [(t.name, t.num_embeddings, t.embedding_dim) for t in made] == [
        ("item", 46, 8),
        ("user_id", 31, 8),
        ("author", 100, 8),
    ]


def request(rank: int, step: int) -> KeyedJaggedTensor:
    """Uneven ids of every key with duplicates, other ones on each rank; the last rank of several has no items."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    counts = [0 if rank == 2 else 9 + 4 * rank, 3, 5]
    ids = [
        torch.randint(0, limit, (count,), generator=generator)
        for count, limit in zip(counts, (46, 31, 46), strict=True)
    ]
    parts = [ids[0], ids[2], ids[1]]
    lengths = [[len(part) - len(part) // 2, len(part) // 2] for part in parts]
    return KeyedJaggedTensor(
        keys=["item", "candidate", "user_id"], values=torch.cat(parts), lengths=torch.tensor(lengths).flatten()
    )


def looked_up(dims_and_plans: list[tuple[int, dict[str, Any]]]) -> list[tuple[Shards, dict[str, Any]]]:
    made = [shard(EmbeddingsConfig(dim=dim, sharding=sharding))[0] for dim, sharding in dims_and_plans]
    rank = dist.get_rank()
    return [(local_shards(p), {k: v.detach().numpy() for k, v in p(request(rank, 0)).items()}) for p in made]


TABLE_OF = {"item": "item", "candidate": "item", "user_id": "user_id"}


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_lookup_is_plain_indexing(world_size):
    for k, ranks in enumerate(zip(*run_ranks(looked_up, PLANS, world_size=world_size), strict=True)):
        dim, full = PLANS[k][0], whole([shards for shards, _ in ranks])
        for rank, (_, vectors) in enumerate(ranks):
            asked = request(rank, 0).to_dict()
            assert vectors.keys() == TABLE_OF.keys()
            for key, values in vectors.items():
                expected = full[TABLE_OF[key]][asked[key].values(), :dim]
                assert torch.equal(torch.from_numpy(values), expected), f"{key} on rank {rank}, plan {PLANS[k]}"


NUM_STEPS = 4
RATES = [0.05, 0.1, 0.02, 0.05]
ADAGRAD = EmbeddingOptimizerConfig(lr=0.05, eps=1e-3)
ADAMW = EmbeddingOptimizerConfig(kind="adamw", betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3)
WHOLE = {"item": "data_parallel", "user_id": "data_parallel"}


def coefficients(rank: int, step: int, key: str, shape: torch.Size) -> Tensor:
    """What the loss multiplies the looked-up vectors with, that is, their gradient."""
    generator = torch.Generator().manual_seed(10_000 + 100 * step + 10 * rank + list(TABLE_OF).index(key))
    return torch.randn(shape, generator=generator)


def trained(dims_and_plans: list[tuple[int, dict[str, Any]]]) -> list[tuple[Shards, Shards]]:
    """Tables before and after some steps, each with its own learning rate."""
    rank, size = dist.get_rank(), dist.get_world_size()
    results = []
    for dim, sharding in dims_and_plans:
        parallel, _ = shard(EmbeddingsConfig(dim=dim, sharding=sharding, optimizer=ADAGRAD))
        before = local_shards(parallel)
        for step in range(NUM_STEPS):
            replicated = parallel.module.replicated
            groups = replicated.param_groups if replicated is not None else []
            for group in [*parallel.fused_optimizer.param_groups, *groups]:
                group["lr"] = RATES[step]
            parallel.fused_optimizer.zero_grad()
            vectors = parallel(request(rank, step))
            loss = sum((v * coefficients(rank, step, key, v.shape)).sum() for key, v in vectors.items())
            (loss * size).backward()  # gradients are averaged over ranks, as those of the dense weights
        results.append((before, local_shards(parallel)))
    return results


def adagrad_by_hand(full: dict[str, Tensor], plan: tuple[int, dict[str, Any]], *, world_size: int) -> dict[str, Tensor]:
    """Row-wise Adagrad, row by row in float64: one sum of mean squares per row, or per piece of a row where columns
    are cut; duplicates of a step are added first.
    """
    dim, sharding = plan
    weights = {name: table.double() for name, table in full.items()}
    width = {name: 128 if sharding.get(name) == "column_wise" else table.size(1) for name, table in full.items()}
    squares = {name: torch.zeros(len(table), table.size(1) // width[name]).double() for name, table in full.items()}
    for step in range(NUM_STEPS):
        gradients: dict[tuple[str, int], Tensor] = {}
        for rank in range(world_size):
            for key, asked in request(rank, step).to_dict().items():
                values = coefficients(rank, step, key, torch.Size([len(asked.values()), dim])).double()
                for row, gradient in zip(asked.values().tolist(), values, strict=True):
                    place = (TABLE_OF[key], row)
                    gradients[place] = gradients.get(place, 0) + gradient
        for (name, row), gradient in gradients.items():
            # The padding counts as columns whose gradient is 0.
            padded = nn.functional.pad(gradient, (0, full[name].size(1) - dim)).view(-1, width[name])
            squares[name][row] += (padded**2).mean(1)
            step_sizes = RATES[step] / (squares[name][row].sqrt() + ADAGRAD.eps)
            weights[name][row] -= (step_sizes[:, None] * padded).flatten()
    return weights


@pytest.mark.parametrize("world_size", [1, 3])
def test_tables_learn_by_rowwise_adagrad_of_the_gradients_of_all_ranks(world_size):
    for k, ranks in enumerate(zip(*run_ranks(trained, PLANS, world_size=world_size), strict=True)):
        before, after = whole([first for first, _ in ranks]), whole([last for _, last in ranks])
        expected = adagrad_by_hand(before, PLANS[k], world_size=world_size)
        for name, table in after.items():
            assert not torch.equal(table, before[name])
            torch.testing.assert_close(
                table.double(),
                expected[name],
                rtol=1e-5,
                atol=1e-6,
                msg=lambda m, k=k, n=name: f"{n}, plan {PLANS[k]}: {m}",
            )


def refused(config: EmbeddingsConfig, device: str) -> str:
    """Why there is no plan for a device, which need not be there to be planned for."""
    needed = build_tables(config, num_items=NUM_ITEMS, features=FEATURES, item_keys=("item",))
    try:
        make_plan(Lookup(needed, config), config, device=torch.device(device))
    except UserError as error:
        return str(error)
    return "planned"


def test_a_placement_of_an_unknown_table_is_refused_with_the_tables_there_are():
    told = "embeddings.sharding names ['itme']; the tables of this run are ['item', 'user_id']"
    assert run_ranks(refused, EmbeddingsConfig(dim=8, sharding={"itme": "row_wise"}), "cpu", world_size=1) == [told]


def test_tables_that_do_not_fit_the_memory_are_refused_with_a_remedy():
    assert run_ranks(refused, EmbeddingsConfig(dim=8, hbm_gib=1.0), "cuda", world_size=1) == ["planned"]
    (told,) = run_ranks(refused, EmbeddingsConfig(dim=8, hbm_gib=1e-6), "cuda", world_size=1)
    assert told.startswith("no sharding plan fits 1 rank(s): ")
    assert told.endswith("; add ranks, lower embeddings.dim, or change embeddings.sharding / embeddings.hbm_gib")


def test_an_optimizer_that_a_placement_does_not_have_is_refused_with_those_it_has():
    adam, adamw = EmbeddingOptimizerConfig(kind="adam"), EmbeddingOptimizerConfig(kind="adamw")
    with pytest.raises(ValueError, match=r"places \['item'\] data_parallel, .* choose 'adamw' or 'rowwise_adagrad'"):
        EmbeddingsConfig(dim=8, sharding={"item": "data_parallel"}, optimizer=adam)
    config = EmbeddingsConfig(dim=8, sharding={"item": "data_parallel"}, optimizer=adamw)
    assert run_ranks(refused, config, "cpu", world_size=1) == [
        "embeddings.optimizer.kind='adamw' updates every row of a table, and ['user_id'] are spread over the ranks; "
        "set embeddings.sharding.user_id='data_parallel' for each, or choose one of ['adam', 'rowwise_adagrad']"
    ]


def learned_by_adamw(steps: int) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]:
    """The weights before and after some steps, each with its own learning rate."""
    parallel, _ = shard(EmbeddingsConfig(dim=6, sharding=WHOLE, optimizer=ADAMW))
    rank, size, lookup = dist.get_rank(), dist.get_world_size(), parallel.module
    before = {name: weight.numpy().copy() for name, weight in lookup.replicated.weights().items()}
    for step in range(steps):
        lookup.replicated.param_groups[0]["lr"] = RATES[step]
        vectors = parallel(request(rank, step))
        (size * sum((v * coefficients(rank, step, key, v.shape)).sum() for key, v in vectors.items())).backward()
    return before, {name: weight.numpy().copy() for name, weight in lookup.replicated.weights().items()}


@pytest.mark.parametrize("world_size", [1, 3])
def test_whole_tables_learn_as_torchs_adamw_on_the_dense_gradient_of_all_ranks(world_size):
    ranks = run_ranks(learned_by_adamw, NUM_STEPS, world_size=world_size)
    before, after = ranks[0]
    for name, start in before.items():
        weight = torch.from_numpy(start).double().requires_grad_()
        adamw = torch.optim.AdamW([weight], betas=ADAMW.betas, eps=ADAMW.eps, weight_decay=ADAMW.weight_decay)
        for step in range(NUM_STEPS):
            weight.grad = torch.zeros_like(weight)
            for rank in range(world_size):
                for key in (key for key, table in TABLE_OF.items() if table == name):
                    ids = request(rank, step).to_dict()[key].values()
                    values = coefficients(rank, step, key, torch.Size([len(ids), 6])).double()
                    weight.grad.index_put_((ids,), nn.functional.pad(values, (0, 2)), accumulate=True)
            adamw.param_groups[0]["lr"] = RATES[step]
            adamw.step()
        torch.testing.assert_close(torch.from_numpy(after[name]).double(), weight.detach(), rtol=1e-5, atol=2e-6)
        for _, other in ranks[1:]:
            np.testing.assert_array_equal(other[name], after[name])


def decayed(sharding: str) -> tuple[Shards, Shards]:
    config = EmbeddingsConfig(
        dim=8, sharding={"user_id": sharding}, optimizer=EmbeddingOptimizerConfig(lr=0.05, weight_decay=4.0)
    )
    parallel, _ = shard(config)
    before = local_shards(parallel)
    sum((v * 0).sum() for v in parallel(request(0, 0)).values()).backward()
    return before, local_shards(parallel)


@pytest.mark.parametrize("sharding", ["auto", "data_parallel"])
def test_weight_decay_shrinks_the_rows_that_are_updated_and_no_others(sharding):
    before, after = (whole([held]) for held in run_ranks(decayed, sharding, world_size=1)[0])
    for key, table in (("item", "item"), ("candidate", "item"), ("user_id", "user_id")):
        rows = request(0, 0).to_dict()[key].values()
        torch.testing.assert_close(after[table][rows], before[table][rows] * (1 - 0.05 * 4.0))
    untouched = torch.ones(31, dtype=torch.bool)
    untouched[request(0, 0).to_dict()["user_id"].values()] = False
    assert torch.equal(after["user_id"][untouched], before["user_id"][untouched])


def test_columns_are_cut_only_where_the_recipe_asks():
    for _, page in run_ranks(initial_shards, [(WIDE, {})], 64, world_size=3)[0]:
        assert "column_wise" not in page
