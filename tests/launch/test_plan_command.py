"""`ultrarec plan` against figures computed by hand."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_runs import config_of, make_dataset

from ultrarec.data.preparation.statistics import LengthCounter
from ultrarec.launch import cli
from ultrarec.launch.capacity import _activations
from ultrarec.launch.workload import Catalogue, Workload, catalogue_of, workload_of
from ultrarec.model.activations import activation_bytes
from ultrarec.model.flops import Sample
from ultrarec.trainer.build import build_loader, load_dataset
from ultrarec.trainer.config import load_config
from ultrarec.trainer.costs import samples_flops
from ultrarec.trainer.parallel import World

ITEMS = 1_000_000
KUAIRAND = ("hstu_kuairand_27k", "-j", "2x4", "--gpu", "h100", "--items", str(ITEMS), "--mean-length", "5000")


def plan(capsys, *argv):
    code = cli.main(["plan", *argv])
    return code, capsys.readouterr()


def plan_json(capsys, *argv):
    _, printed = plan(capsys, *argv, "--json")
    return json.loads(printed.out)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("prepared") / "dataset")


def test_tables_and_traffic_are_those_computed_by_hand(capsys):
    settings = ("--set", "embeddings.sharding={item='row_wise', user_id='row_wise'}")
    planned = plan_json(capsys, *KUAIRAND, *settings)
    item_rows, user_rows = math.ceil((ITEMS + 1) / 8), math.ceil(50_001 / 8)
    assert planned["memory"]["tables"] == (item_rows + user_rows) * 128 * 4
    assert planned["memory"]["tables' optimizer"] == (item_rows + user_rows) * 4
    assert planned["memory"]["dense optimizer"] == 2 * 4 * planned["dense_parameters"]
    assert planned["communication"]["dense gradients"] == 2 * 7 / 8 * 4 * planned["dense_parameters"]
    # One id per event of the item table, one per sample of the users'.
    ids = planned["tokens"] / 8 + planned["samples"] / 8
    assert planned["communication"]["ids"] == pytest.approx(7 / 8 * 8 * ids)
    assert planned["communication"]["vectors"] == pytest.approx(7 / 8 * 4 * 128 * ids, rel=1e-3)


def test_dense_parameters_are_those_counted_by_hand(capsys):
    planned = plan_json(capsys, "sasrec_ml1m", "-j", "1x1", "--gpu", "a100", "--items", "3706", "--mean-length", "163")
    width = 50
    norms, attention, feed_forward = 2 * 2 * width, 4 * width * (width + 1), 2 * width * (width + 1)
    assert planned["dense_parameters"] == 2 * (norms + attention + feed_forward) + 200 * width
    assert planned["communication"]["dense gradients"] == 0


def test_the_owner_of_a_whole_table_sends_for_all(capsys):
    placed = [f"embeddings.sharding={{item='{kind}', user_id='row_wise'}}" for kind in ("row_wise", "table_wise")]
    spread, owned = (plan_json(capsys, *KUAIRAND, "--set", setting)["communication"] for setting in placed)
    assert owned["vectors"] == pytest.approx(8 * spread["vectors"], rel=1e-3)
    assert owned["ids"] == spread["ids"]


def test_a_replicated_table_with_adamw_keeps_two_moments_of_every_value(capsys):
    whole = "embeddings.sharding={item='data_parallel', user_id='data_parallel'}"
    kinds = ("rowwise_adagrad", "adamw")
    adagrad, adamw = (
        plan_json(capsys, *KUAIRAND, "--set", whole, "--set", f"embeddings.optimizer.kind={kind}") for kind in kinds
    )
    rows = adagrad["memory"]["replicated tables"] / (12 * 129)
    assert adamw["memory"]["replicated tables"] - adagrad["memory"]["replicated tables"] == 8 * 128 * rows
    assert adamw["seconds"]["memory"] > adagrad["seconds"]["memory"]


def test_a_replicated_table_is_summed_and_not_exchanged(capsys):
    placed = "embeddings.sharding={item='row_wise', user_id='data_parallel'}"
    planned = plan_json(capsys, *KUAIRAND, "--set", placed)
    assert planned["communication"]["replicated tables"] == 2 * 7 / 8 * 4 * 50_001 * 129
    assert planned["communication"]["ids"] == pytest.approx(7 / 8 * 8 * planned["tokens"] / 8)


@pytest.mark.parametrize(("items", "why"), [(4_000_000_000, "no sharding plan fits"), (66_000_000, "host memory")])
def test_a_table_too_large_for_the_gpus_ends_with_1_and_says_so(capsys, items, why):
    argv = ("hstu_dlrmv3", "-j", "1x2", "--gpu", "h100", "--items", str(items), "--mean-length", "100")
    code, printed = plan(capsys, *argv)
    assert code == 1
    assert f"does not fit: {'' if 'plan' in why else 'the planner puts table '}" in printed.out
    assert why in printed.out
    assert plan_json(capsys, *argv)["fits"] is False


def test_channels_whose_events_are_not_known_cost_at_most_so_much(capsys):
    argv = (*KUAIRAND, "--set", "model.channels={clicks = {actions = ['is_click'], num_events = 500}}")
    _, printed = plan(capsys, *argv)
    assert "operations per rank and step: at most " in printed.out
    assert plan_json(capsys, *argv)["is_at_most"]
    assert "at most" not in plan(capsys, *KUAIRAND)[1].out


def test_activations_that_do_not_fit_end_with_1(capsys):
    code, printed = plan(capsys, *KUAIRAND, "--set", "data.batch_tokens=100000000")
    assert code == 1
    assert "GiB needed on the fullest rank" in printed.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--items", "10"], "give both"),
        (["--items", "0", "--mean-length", "5"], "both count from 1"),
        (["-j", "2*8"], "expected NODESxPROCS"),
        (["--set", "data.path=nowhere"], "give --items N and --mean-length L"),
        (["--items", "9", "--mean-length", "1"], "no user has enough training events"),
        (["--items", "9", "--mean-length", "9", "--set", "embeddings.sharding.shop=row_wise"], "tables of this run"),
    ],
)
def test_what_the_user_can_mend_is_one_message(capsys, argv, message):
    code, printed = plan(capsys, "hstu_ml20m", "--gpu", "h100", *argv)
    assert code == 2
    assert printed.err.startswith("error: ")
    assert message in printed.err


def catalogue_in(dataset, info):
    counter = LengthCounter()
    for path in dataset.glob("histories/*.parquet"):
        counter.add(pq.read_table(path, columns=["num_events"])["num_events"].to_numpy())
    return catalogue_of(dataclasses.replace(info, lengths=counter.summary()))


def test_a_prepared_dataset_gives_about_the_samples_that_training_reads(dataset):
    config = config_of(dataset, "ranking", "data.targets_per_sample=3")
    info = load_dataset(config)
    work = workload_of(config, catalogue_in(dataset, info))
    batches = list(build_loader(config, info, World(0, 1, torch.device("cpu")), split="train"))
    read = sum(batch.timestamps.numel() for batch in batches) / sum(len(batch.samples) for batch in batches)
    assert work.mean(work.history + work.targets) == pytest.approx(read, rel=0.1)


def test_stochastic_length_gives_the_samples_operations_and_steps_that_training_reads_on_average(dataset):
    config = config_of(
        dataset,
        "full_softmax",
        "data.train_targets=all",
        "data.stochastic_length={alpha = 1.2, balanced = false}",
        "data.batch_rows=",
        "data.batch_tokens=60",
        "trainer.epochs=40",
    )
    info = load_dataset(config)
    num_train = np.concatenate([pq.read_table(p)["num_train"].to_numpy() for p in dataset.glob("histories/*.parquet")])
    catalogue = Catalogue(num_items=45, actions=(), lengths=num_train, users=np.ones(len(num_train)))
    work = workload_of(config, catalogue)

    def operations(history):
        targets = np.zeros_like(history)
        return samples_flops(config, history=history, targets=targets, num_items=45, num_actions=2).train

    batches = list(build_loader(config, info, World(0, 1, torch.device("cpu")), split="train"))
    read = np.concatenate([batch.offsets.diff().numpy() for batch in batches])
    for planned, amount in ((work.history, read), (operations(work.history), operations(read))):
        deviation = (work.mean(planned**2) - work.mean(planned) ** 2) ** 0.5
        # Four standard errors of the mean of what training drew.
        assert abs(amount.mean() - work.mean(planned)) <= 4 * deviation / len(read) ** 0.5
    full = [len(batch.samples) for batch, after in itertools.pairwise(batches) if batch.epoch == after.epoch]
    # A step ends before the sample that would overfill it.
    assert 0 <= work.samples - np.mean(full) <= 1


def test_a_dataset_of_an_older_version_is_told_what_it_lacks(dataset, capsys):
    config_of(dataset, "ranking")
    code, printed = plan(capsys, str(dataset.parent / "ranking.toml"), "--gpu", "h100", "--set", "data.batch_rows=24")
    assert code == 2
    assert "before datasets held their lengths" in printed.err


def test_the_longest_of_several_samples_is_what_draws_of_so_many_have_on_average():
    tokens, share = np.array([40, 10, 26]), np.array([0.1, 0.6, 0.3])
    work = Workload(history=tokens - 2, targets=np.array([2, 2, 2]), share=share, samples=6.0)
    draws = np.random.default_rng(0).choice(tokens, size=(40_000, 3), p=share).max(axis=1)
    history, targets = work.longest_of(3)
    # Half an event of rounding, and four standard errors.
    assert abs(history + targets - draws.mean()) <= 0.5 + 4 * draws.std() / 200
    assert work.longest_of(1) == (round(0.1 * 40 + 0.6 * 10 + 0.3 * 26) - 2, 2)


@pytest.mark.parametrize("backbone", ["sasrec", "llama", "fuxi_alpha"])
def test_a_padded_backbone_keeps_more_the_longer_the_samples_beside_a_short_one(backbone):
    config = load_config("sasrec_ml1m", [f"model.backbone={backbone}"])
    kept = []
    for longest in (20, 40):
        work = Workload(
            history=np.array([10, longest]), targets=np.zeros(2, np.int64), share=np.array([0.5, 0.5]), samples=64.0
        )
        kept.append(_activations(config, work, samples=64.0)["activations"])
    sample_of_20, sample_of_40, short = (
        activation_bytes(config.model, Sample(history=length), longest=Sample(history=padded))
        for length, padded in ((20, 20), (40, 40), (10, 20))
    )
    assert kept[0] == pytest.approx(32 * (short + sample_of_20))
    assert kept[1] > 32 * (short + sample_of_40)


def test_operations_are_the_mean_over_lengths_not_those_of_the_mean_length():
    config = load_config("hstu_ml20m")
    catalogue = Catalogue(num_items=9, actions=(), lengths=np.array([11, 101]), users=np.array([3.0, 1.0]))
    work = workload_of(config, catalogue)
    assert (work.history.tolist(), work.samples) == ([10, 100], 128)
    assert work.mean(work.history**2) == 0.75 * 10**2 + 0.25 * 100**2
