"""Every recipe builds at its full size, without memory, and trains a step when it is made small."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from process_group import run_ranks
from random_datasets import random_histories, write_dataset
from small_runs import train_on_ranks

from ultrarec.data.config import DataConfig
from ultrarec.data.schema import DatasetInfo, Vocabulary
from ultrarec.embeddings.replicated import ReplicatedTables
from ultrarec.trainer.build import Recommender, build_recommender, item_shares
from ultrarec.trainer.config import Config, list_recipes, load_config

NUM_ITEMS = 40
SMALL: dict[str, dict[str, Any]] = {
    "data": {"max_history": 20, "targets_per_sample": 3, "batch_rows": 24, "batch_tokens": None},
    "embeddings": {"dim": 8},
    "model": {"width": 8, "num_layers": 2, "num_heads": 2, "qk_dim": 4, "value_dim": 4, "ffn_width": 8},
    "objective": {"head_hidden": 8, "num_negatives": 16},
    "trainer": {"max_steps": 1, "epochs": 1, "evaluate_every": None, "device": "cpu", "log_every": 1},
}


def made_small(config: Config, path: Path) -> Config:
    """The same recipe with little of everything; what it switches on stays on."""
    tree = config.model_dump(mode="json")
    for section, values in SMALL.items():
        tree[section] |= values
    tree["data"]["path"] = str(path)
    for feature in tree["data"]["features"].values():
        feature["num_values"] = min(feature["num_values"], 30)
    model = tree["model"]
    model["token_hidden"] = model["token_hidden"] and 8
    for layers in filter(None, (model, model["tail"])):
        layers |= {name: min(layers[name], 3) for name in ("window", "full_tail", "prefix")}
    if model["tail"]:
        model["tail"] |= {"num_layers": 1, "num_events": 6}
    for channel in model["channels"].values():
        channel["num_events"] = 8
    return Config.model_validate(tree)


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> DatasetInfo:
    """A dataset with every action and column that any recipe reads."""
    histories = random_histories(num_users=30, num_items=NUM_ITEMS, mean_events=10.0, seed=2)
    plays = histories["play_time"]
    for name, values in {"play_time_ms": plays, "duration_ms": plays, "category": histories["tab"]}.items():
        histories = histories.append_column(name, values)
    assert isinstance(histories, pa.Table)
    written = write_dataset(tmp_path_factory.mktemp("recipes") / "dataset", histories, num_items=NUM_ITEMS)
    actions = sorted({task for name in list_recipes() for task in load_config(name).objective.tasks})
    info = dataclasses.replace(written, roles=dataclasses.replace(written.roles, actions=tuple(actions)))
    info.write()
    return info


def test_every_recipe_trains_a_step_when_it_is_made_small(info, tmp_path):
    runs = [(made_small(load_config(name), info.root), tmp_path / name) for name in list_recipes()]
    assert any(config.model.channels for config, _ in runs), "no mixture of transducers"
    assert any(config.data.stochastic_length for config, _ in runs), "no stochastic length"
    # The losses that no recipe of a published configuration has.
    sasrec = made_small(load_config("sasrec_ml1m"), info.root)
    for loss, num_in_batch, by in (
        ("bce", 0, "step"),
        ("sampled_softmax", 8, "step"),
        ("sampled_softmax", 8, "position"),
    ):
        changes = {"loss": loss, "num_in_batch": num_in_batch, "negatives_shared_by": by}
        objective = sasrec.objective.model_copy(update=changes)
        runs.append((sasrec.model_copy(update={"objective": objective}), tmp_path / f"{loss}-{by}"))
    run_ranks(train_on_ranks, runs, world_size=1)
    for _, out in runs:
        first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
        assert first["split"] == "train"
        assert first["loss"] > 0, out.name
        assert first["grad_norm"] > 0, out.name


def test_shares_of_items_are_how_often_each_is_trained_on(info):
    shares = item_shares(DataConfig(path=str(info.root), batch_rows=1), info)
    assert shares.shape == (NUM_ITEMS + 1,)
    assert shares[0] == 0
    # The rest is the share of unknown items, which the histories also hold.
    assert 0.9 < shares.sum() < 1
    table = pq.read_table(info.locate("items.parquet")).to_pydict()
    for item, count in zip(table["id"], table["count"], strict=True):
        assert shares[item] == pytest.approx(count / info.counts.train_events)


def built_on_meta(name: str, info: DatasetInfo, num_items: int) -> Recommender:
    size = Vocabulary(size=num_items, path="", sha256="")
    with torch.device("meta"):
        return build_recommender(load_config(name), dataclasses.replace(info, vocabularies={"items": size}))


def parameters_of(module: torch.nn.Module) -> int:
    """The weights of a module; those of replicated tables are buffers."""
    weights = list(module.parameters())
    for part in module.modules():
        if isinstance(part, ReplicatedTables):
            weights += part.weights().values()
    return sum(weight.numel() for weight in weights)


def hstu_layer(width: int, heads: int, head: int, longest: int) -> int:
    """u, v, q, k; the biases of position and time; the output with its bias."""
    return width * 4 * heads * head + (2 * longest - 1 + 129) + (heads * head + 1) * width


def sasrec_layer(width: int) -> int:
    """q, k, v, output and two matrices of the feed-forward network, each with a bias; two norms."""
    return 6 * (width + 1) * width + 2 * 2 * width


def stu_layer(width: int, heads: int, head: int, *, per_head: bool = False) -> int:
    """u, v, q, k with a bias; the output of [u, attention, gated]; scale and shift of two norms, the second of which
    has one of each per column, or per head."""
    values = heads * head
    return (width + 1) * 4 * values + 3 * values * width + 2 * width + 2 * (heads if per_head else values)


BACKBONES = {
    # (published configuration): layers, width, heads x head width, of sequences of 200 or 50 events
    "hstu_ml1m": 2 * hstu_layer(50, 1, 50, 200),
    "hstu_large_ml1m": 8 * hstu_layer(50, 2, 25, 200),
    "sasrec_ml1m": 2 * sasrec_layer(50),
    "hstu_ml20m": 4 * hstu_layer(256, 4, 64, 200),
    "hstu_large_ml20m": 16 * hstu_layer(256, 8, 32, 200),
    "sasrec_ml20m": 4 * sasrec_layer(256),
    "hstu_amazon_books": 4 * hstu_layer(64, 4, 16, 50),
    "hstu_large_amazon_books": 16 * hstu_layer(64, 8, 8, 50),
    "sasrec_amazon_books": 4 * sasrec_layer(64),
    "hstu_kuairand_1k": 3 * stu_layer(512, 4, 128),
    "hstu_kuairand_27k": 3 * stu_layer(512, 4, 128),
    # Two channels of four layers, and the matrix that fuses them.
    "ultra_hstu_kuairand_1k": 2 * 4 * stu_layer(512, 4, 128, per_head=True) + (2 * 512 + 1) * 512,
    "ultra_hstu_kuairand_16k": 20 * stu_layer(512, 4, 128),
    "hstu_dlrmv3": 5 * stu_layer(512, 4, 128),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_published_configuration_has_the_backbone_of_its_formula(name, info):
    assert parameters_of(built_on_meta(name, info, 1000).model.encoder.stack) == BACKBONES[name]


def test_the_tables_of_dlrmv3_are_the_terabyte_of_the_benchmark(info):
    tables = parameters_of(built_on_meta("hstu_dlrmv3", info, 10**9).lookup)
    # Each has a row for unknown ids beside the published ones.
    assert tables == 512 * (10**9 + 10**7 + 128 + 3)
    assert 2 * tables / 1e12 == pytest.approx(1.034, abs=0.001), "terabytes in half precision"


def with_actions(info: DatasetInfo, *actions: str) -> DatasetInfo:
    return dataclasses.replace(info, roles=dataclasses.replace(info.roles, actions=actions))


CATALOGUES = {
    # of the public protocol's prepared data: items, width, events
    "ml1m": (3_706, 50, 200),
    "ml20m": (26_744, 256, 200),
    "amazon_books": (695_762, 64, 50),
}


@pytest.mark.parametrize("catalogue", CATALOGUES)
@pytest.mark.parametrize("model", ["hstu", "hstu_large", "sasrec"])
def test_a_published_next_item_model_has_its_items_its_positions_and_its_backbone(model, catalogue, info):
    name, (num_items, width, longest) = f"{model}_{catalogue}", CATALOGUES[catalogue]
    # A row for unknown items, stored in fours; a vector per position; the user vector is the last token itself.
    stored_width = {50: 52}.get(width, width)
    expected = (num_items + 1) * stored_width + longest * width + BACKBONES[name]
    assert parameters_of(built_on_meta(name, with_actions(info), num_items)) == expected


def token_mlp(inputs: int, hidden: int, width: int) -> int:
    """Two matrices with biases, and a norm with scale and shift behind each."""
    return (inputs + 1 + 2) * hidden + (hidden + 1 + 2) * width


def test_the_model_of_dlrmv3_has_the_parameters_of_its_parts(info):
    width, positions, time_buckets, action_dim = 512, 1 + 16_350 + 32, 2048 + 1, 8
    expected = width * (10**9 + 10**7 + 128 + 3)
    expected += token_mlp(2 * width, width, width)  # item and category
    expected += action_dim + token_mlp(action_dim, width, width)
    expected += (width + 1) * width  # the user
    expected += (positions + time_buckets) * width
    expected += BACKBONES["hstu_dlrmv3"]
    # The head: a norm, an MLP of the content, a hidden layer with its norm, one logit.
    expected += 2 * width + token_mlp(width, width, width) + (width + 1 + 2) * width + (width + 1)
    assert parameters_of(built_on_meta("hstu_dlrmv3", with_actions(info, "is_liked"), 10**9)) == expected
