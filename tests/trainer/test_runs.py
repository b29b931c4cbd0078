"""A run is the same run on any number of ranks, and consumes each sample once."""

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from process_group import run_ranks
from small_runs import (
    KINDS,
    audit,
    audited_steps,
    config_of,
    differing,
    final_tensors,
    lines,
    losses,
    make_dataset,
    train_on_ranks,
)

from ultrarec.data.loader import NextItemSampler, RankingSampler
from ultrarec.data.samples import RowCounts
from ultrarec.trainer.journal import read_lines

GOLDEN = Path(__file__).parents[1] / "golden"


def expected_samples(dataset, sampler):
    """(file, row, sample) of every training sample, from the files themselves."""
    found = []
    for number, path in enumerate(sorted(dataset.glob("histories/*.parquet"))):
        table = pq.read_table(path, columns=["num_events", "num_train", "num_validation"])
        counts = RowCounts(*(table[name].to_numpy().astype(np.int32) for name in table.column_names))
        for row, count in enumerate(sampler.num_samples(counts, "train").tolist()):
            found += [(number, row, sample) for sample in range(count)]
    return found


def test_small_datasets_have_what_the_other_tests_rely_on(dataset):
    samples = expected_samples(dataset, RankingSampler(12, 1))
    assert len(samples) % 24
    assert len(expected_samples(dataset, NextItemSampler(12, "recent"))) % 7 == 1, (
        "the last step must leave ranks without samples"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_losses_on_several_ranks_are_those_on_one(trained, kind, world_size):
    alone, together = losses(trained(1)[kind]), losses(trained(world_size)[kind])
    assert len(alone) >= 20
    assert together == pytest.approx(alone, rel=1e-5)


def test_metrics_tell_how_evenly_steps_were_dealt(trained):
    files = [trained(world_size)["ranking"] / "metrics.jsonl" for world_size in (1, 2)]
    alone, together = ([line for line in read_lines(file) if line["split"] == "train"] for file in files)
    assert {(line["imbalance"], line["imbalance_least"]) for line in alone} == {(1, 1)}
    assert all(1 <= line["imbalance_least"] <= line["imbalance"] < 2 for line in together)
    assert any(line["imbalance"] > 1 for line in together)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_weights_and_optimizer_states_on_several_ranks_are_those_on_one(trained, kind, world_size):
    alone, together = (final_tensors(trained(size)[kind]) for size in (1, world_size))
    names = {name for name in alone if not name.startswith("rank/")}
    assert names == {name for name in together if not name.startswith("rank/")}
    for name in sorted(names):
        torch.testing.assert_close(together[name], alone[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_of_every_epoch_is_consumed_once_over_all_ranks(trained, dataset, kind, world_size):
    targets = "all" if kind == "adamw_softmax" else "recent"
    sampler = NextItemSampler(12, targets) if "softmax" in kind else RankingSampler(12, 1)
    expected = expected_samples(dataset, sampler)
    consumed = audit(trained(world_size)[kind])
    assert sorted(consumed) == list(range(4 if "softmax" in kind else 2))
    for epoch, samples in consumed.items():
        assert sorted(samples) == expected, f"epoch {epoch}"


def test_every_rank_audits_every_step_once(trained):
    for kind, out in trained(3).items():
        for rank in range(3):
            assert [line["step"] for line in audited_steps(out, rank)] == [line["step"] for line in lines(out)], kind


def test_learning_lowers_the_loss(trained):
    for kind in ("full_softmax", "sampled_softmax"):
        curve = losses(trained(1)[kind])
        assert sum(curve[-7:]) < 0.8 * sum(curve[:7]), kind


@pytest.mark.parametrize("kind", ["ranking", "full_softmax"])
def test_more_ranks_than_samples_of_a_step_neither_hang_nor_drop_one(tmp_path, kind):
    small = make_dataset(tmp_path / "dataset", num_users=4, mean_events=1.5)
    sampler = NextItemSampler(12, "recent") if kind == "full_softmax" else RankingSampler(12, 1)
    expected = expected_samples(small, sampler)
    config = config_of(small, kind, "data.batch_rows=3", "trainer.epochs=3")
    run_ranks(train_on_ranks, [(config, tmp_path / "four")], world_size=4)
    run_ranks(train_on_ranks, [(config, tmp_path / "one")], world_size=1)
    assert {epoch: sorted(found) for epoch, found in audit(tmp_path / "four").items()} == dict.fromkeys(
        range(3), expected
    )
    # Logits of the full softmax reach 1 / temperature = 20, where neighbouring float32 numbers lie 1.9e-6 apart.
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("kind", ["ranking", "sampled_softmax"])
def test_the_first_losses_are_the_recorded_ones(trained, kind):
    """The record is the first ten lines of this very run; a change of data order, model or optimizer on purpose
    records it anew.
    """
    with (GOLDEN / f"{kind}.csv").open() as file:
        recorded = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(recorded) == 10
    assert losses(trained(1)[kind])[:10] == pytest.approx(recorded, rel=1e-5)


@pytest.fixture(scope="module")
def variants(dataset, tmp_path_factory):
    """Run folders of variants of the ranking run on two ranks, by name."""
    root = tmp_path_factory.mktemp("variants")
    few, still = "trainer.max_steps=9", "embeddings.optimizer.lr=1e-12"
    settings = {
        "plain": [few],
        "bf16": [few, "trainer.precision=bf16"],
        "one step": ["trainer.max_steps=1", "optimizer.eps=1e-3"],
        "one clipped step": ["trainer.max_steps=1", "optimizer.eps=1e-3", "optimizer.clip_norm=1e-6"],
        "one idle step": ["trainer.max_steps=1", "optimizer.lr=1e-12"],
        "dropout": [few, "model.dropout=0.3"],
        "dropout again": [few, "model.dropout=0.3"],
        "dropout of another seed": [few, "model.dropout=0.3", "trainer.seed=1"],
        "evaluating": [few, "trainer.evaluate_every=2", "model.dropout=0.3"],
        "large batches": [still, "trainer.max_steps=5"],
        "accumulated batches": [still, "trainer.max_steps=5", "trainer.accumulate=2", "data.batch_rows=12"],
        "accumulated to the end": ["trainer.accumulate=5"],
        "event hash": [few, "data.features.author={kind='hash', role='event', num_values=50}"],
    }
    runs = {name: (config_of(dataset, "ranking", *chosen), root / name) for name, chosen in settings.items()}
    run_ranks(train_on_ranks, list(runs.values()), world_size=2)
    return {name: out for name, (_, out) in runs.items()}


def test_two_accumulated_batches_move_dense_weights_like_one_twice_as_large(variants):
    """Tables learn in every backward pass, so they are held still here."""
    large, accumulated = final_tensors(variants["large batches"]), final_tensors(variants["accumulated batches"])
    assert losses(variants["accumulated batches"]) == pytest.approx(losses(variants["large batches"]), rel=1e-5)
    for name in (name for name in large if name.startswith("weights/model.")):
        torch.testing.assert_close(
            accumulated[name], large[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_accumulation_ends_with_the_epoch_and_consumes_each_sample_once(variants, dataset):
    out = variants["accumulated to the end"]
    expected = expected_samples(dataset, RankingSampler(12, 1))
    assert {epoch: sorted(found) for epoch, found in audit(out).items()} == dict.fromkeys(range(2), expected)
    steps = [line["step"] for line in lines(out)]
    assert steps == list(range(1, 2 * -(-len(expected) // (24 * 5)) + 1))


def test_bf16_is_near_fp32_and_not_equal_to_it(variants):
    full, half = losses(variants["plain"]), losses(variants["bf16"])
    assert half == pytest.approx(full, rel=0.02)
    assert half != full
    assert {t.dtype for n, t in final_tensors(variants["bf16"]).items() if n.startswith("weights/")} == {torch.float32}


def test_clipping_reports_the_norm_before_it_and_shrinks_dense_updates_only(variants):
    assert lines(variants["one clipped step"]) == lines(variants["one step"])
    plain, clipped, idle = (final_tensors(variants[f"one {name}step"]) for name in ("", "clipped ", "idle "))
    dense = [name for name in plain if name.startswith("weights/model.")]
    assert max(float((plain[name] - idle[name]).abs().max()) for name in dense) > 0.5 * 0.003
    # A gradient of norm 1e-6 over an eps of 1e-3 moves a weight by at most a thousandth of the learning rate.
    assert 0 < max(float((clipped[name] - idle[name]).abs().max()) for name in dense) < 1e-3 * 0.003 * 1.1
    tables = [name for name in plain if name.startswith("tables/")]
    assert not differing({name: plain[name] for name in tables}, {name: clipped[name] for name in tables})


def test_dropout_is_a_function_of_the_seed(variants):
    first, again = final_tensors(variants["dropout"]), final_tensors(variants["dropout again"])
    assert lines(variants["dropout"]) == lines(variants["dropout again"])
    assert not differing(first, again)
    assert losses(variants["dropout of another seed"])[0] != losses(variants["dropout"])[0]
    assert losses(variants["plain"])[0] != losses(variants["dropout"])[0]


def test_evaluating_during_training_changes_nothing_that_follows(variants):
    plain, evaluating = variants["dropout"], variants["evaluating"]
    assert [line["step"] for line in lines(evaluating, "validation")] == [2, 4, 6, 8, 9]
    assert lines(evaluating) == lines(plain)
    assert not differing(final_tensors(plain), final_tensors(evaluating))


def test_a_hashed_event_feature_is_learned_in_a_table_of_its_own(variants):
    tensors = final_tensors(variants["event hash"])
    assert len(losses(variants["event hash"])) == 9
    weights, sums = (tensors[f"tables/author/{what}"] for what in ("weight", "momentum1/columns-0-8"))
    assert (weights.shape, sums.shape) == ((51, 6), (51,))
    assert int((sums > 0).sum()) > 25, "most of 50 buckets occur in nine steps"
