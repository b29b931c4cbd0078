"""What the policy "skip" leaves out of a run: counted, listed, and in no mean."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from process_group import run_ranks
from small_runs import audit, config_of, interrupted, lines, make_dataset, train_on_ranks

from ultrarec.data.loader import RankingSampler
from ultrarec.data.samples import RowCounts
from ultrarec.trainer.parallel import World
from ultrarec.trainer.run import open_run


def first_file(dataset):
    return dataset / "histories/part-00000.parquet"


def changed(path, changes):
    """Write the first file anew with other values, by column and row."""
    table = pq.read_table(path)
    for name, values in changes.items():
        column = table[name].to_pylist()
        for row, value in values.items():
            column[row] = value(column[row])
        index = table.schema.get_field_index(name)
        table = table.set_column(index, name, pa.array(column, table.schema.field(name).type))
    pq.write_table(table, path, row_group_size=7)


def busy_row(dataset):
    """A row with several training events, and how many samples it gives for each split."""
    table = pq.read_table(first_file(dataset))
    row = next(row for row in range(15) if table["num_train"][row].as_py() > 3)
    counts = RowCounts(*(table[name].to_numpy() for name in ("num_events", "num_train", "num_validation")))
    splits = ("train", "validation", "test")
    return row, {split: int(RankingSampler(12, 1).num_samples(counts, split)[row]) for split in splits}


def break_row(dataset, row):
    """Give one row of the first file an item beyond the vocabulary."""
    changed(first_file(dataset), {"items": {row: lambda items: [10**6, *items[1:]]}})


def listed(out):
    return [json.loads(line) for path in out.glob("skipped/rank-*.jsonl") for line in path.read_text().splitlines()]


def test_skipped_samples_are_counted_and_listed_and_all_others_trained(tmp_path):
    dataset, out = make_dataset(tmp_path / "dataset", num_users=30), tmp_path / "run"
    config = config_of(dataset, "ranking", "data.bad_data=skip", "trainer.epochs=1", "data.audit=true")
    row, num_samples = busy_row(dataset)
    break_row(dataset, row)
    run_ranks(train_on_ranks, [(config, out)], world_size=2)
    for split, number in num_samples.items():
        assert sum(line["skipped_samples"] for line in lines(out, split)) == number
        rows = sorted(line["rows"][0] for line in listed(out) if line["split"] == split)
        assert rows == [[0, row, sample] for sample in range(number)]
    assert num_samples["train"] > 3
    assert {(line["fault"]["row"], line["fault"]["column"]) for line in listed(out)} == {(row, "items")}
    assert not [sample for sample in audit(out)[0] if sample[:2] == (0, row)]


@pytest.mark.parametrize("world_size", [2, 1])
def test_a_restart_loses_none_of_the_samples_counted_since_the_last_line(tmp_path, world_size):
    dataset, whole, resumed = make_dataset(tmp_path / "dataset", num_users=30), tmp_path / "whole", tmp_path / "resumed"
    settings = ("data.bad_data=skip", "trainer.epochs=1", "trainer.log_every=1000", "checkpoint.every=1")
    config = config_of(dataset, "ranking", *settings, "checkpoint.keep_last=100")
    break_row(dataset, busy_row(dataset)[0])
    run_ranks(train_on_ranks, [(config, whole)], world_size=2)
    counted = lines(whole)[-1]
    first = min(line["step"] for line in listed(whole) if line["split"] == "train")
    run_ranks(train_on_ranks, [(config, interrupted(whole, resumed, step=first))], world_size=world_size)
    again = lines(resumed)[-1]
    assert first < counted["step"]
    assert again["skipped_samples"] == counted["skipped_samples"] > 0
    if world_size == 2:
        assert again["imbalance"] == counted["imbalance"] > 1
    else:
        assert 1 < again["imbalance"] < counted["imbalance"]  # a rank alone adds steps that are even


def test_a_mean_is_over_the_labels_that_are_trained(tmp_path):
    """One step of all samples: the gradient is that of the same data without the damaged row."""
    runs = []
    for name in ("damaged", "without"):
        dataset = make_dataset(tmp_path / name / "dataset", num_users=30)
        row, num_samples = busy_row(dataset)
        if name == "damaged":
            break_row(dataset, row)
        else:
            lists = ("items", "timestamps", "actions", "tab", "play_time", "author")
            changed(
                first_file(dataset),
                {column: {row: lambda values: []} for column in lists}
                | {f"num_{what}": {row: lambda number: 0} for what in ("events", "train", "validation")},
            )
        settings = ("data.bad_data=skip", "trainer.max_steps=1", "data.batch_rows=500")
        runs.append((config_of(dataset, "ranking", *settings), tmp_path / name / "run"))
    assert num_samples["train"] > 3
    run_ranks(train_on_ranks, runs, world_size=2)
    damaged, without = (lines(out)[0] for _, out in runs)
    assert damaged["loss"] == pytest.approx(without["loss"], rel=1e-5)
    assert damaged["grad_norm"] == pytest.approx(without["grad_norm"], rel=1e-4)


def test_a_file_left_out_on_opening_is_counted_and_listed_and_stays_out_for_the_epoch(tmp_path):
    dataset, out = make_dataset(tmp_path / "dataset", num_users=60), tmp_path / "run"
    settings = ("data.bad_data=skip", "trainer.epochs=1", "data.audit=true", "data.batch_rows=10", "checkpoint.every=2")
    begun = config_of(dataset, "ranking", *settings, "trainer.max_steps=2")
    whole = first_file(dataset).read_bytes()
    first_file(dataset).unlink()
    run_ranks(train_on_ranks, [(begun, out)], world_size=1)
    assert {line["skipped_rows"] for line in lines(out)} == {30}
    (fault,) = map(json.loads, (out / "skipped/opening.jsonl").read_text().splitlines())
    assert (fault["file"], fault["problem"]) == (str(first_file(dataset)), "there is no such file")
    first_file(dataset).write_bytes(whole)
    config = config_of(dataset, "ranking", *settings)
    with pytest.raises(RuntimeError, match=r"UserError: the dataset is damaged in other places than when .*part-00000"):
        run_ranks(train_on_ranks, [(config, out)], world_size=1)
    first_file(dataset).unlink()
    run_ranks(train_on_ranks, [(config, out)], world_size=2)
    trained = audit(out)[0]
    counts = pq.read_table(dataset / "histories/part-00001.parquet")["num_train"].to_pylist()
    assert sorted(trained) == [(1, row, sample) for row, many in enumerate(counts) for sample in range(many)]


def test_a_run_whose_only_file_is_truncated_names_it_and_lists_it(tmp_path):
    dataset, out = make_dataset(tmp_path / "dataset", num_users=30), tmp_path / "run"
    for path in dataset.glob("histories/*.parquet"):
        path.write_bytes(path.read_bytes()[:500])
    config = config_of(dataset, "ranking", "data.bad_data=skip")
    with pytest.raises(RuntimeError, match=r"nothing is left to train on: .* leaves out 30 of 30 rows, first .*00000"):
        run_ranks(train_on_ranks, [(config, out)], world_size=2)
    faults = [json.loads(line) for line in (out / "skipped/opening.jsonl").read_text().splitlines()]
    assert [fault["num_rows"] for fault in faults] == [15, 15]


def train_where_each_rank_sees_a_dataset_of_its_own(configs, out):
    train_on_ranks([(configs[dist.get_rank()], out)])


@pytest.mark.parametrize("blind", [0, 1])
def test_a_rank_that_alone_finds_nothing_ends_the_run_on_all(tmp_path, blind):
    """A file system that is not mounted on one of the machines."""
    datasets = [make_dataset(tmp_path / str(rank) / "dataset", num_users=30) for rank in (0, 1)]
    for path in datasets[blind].glob("histories/*.parquet"):
        path.unlink()
    configs = [config_of(dataset, "ranking", "data.bad_data=skip") for dataset in datasets]
    with pytest.raises(RuntimeError) as raised:
        run_ranks(train_where_each_rank_sees_a_dataset_of_its_own, configs, tmp_path / "out", world_size=2)
    assert str(raised.value).count("UserError: ranks 0 and 1 find different data damaged, first ") == 2


def evaluate_where_a_file_is_gone_on_rank_1(configs, out):
    rank = dist.get_rank()
    world = World(rank=rank, size=2, device=torch.device("cpu"))
    with open_run(configs[rank], out, world, fresh=False) as run:
        if rank == 1:
            first_file(Path(configs[rank].data.path)).unlink()
        run.evaluator("test")


def test_ranks_that_find_different_held_out_data_end_the_run_on_all(tmp_path):
    datasets = [make_dataset(tmp_path / str(rank) / "dataset", num_users=30) for rank in (0, 1)]
    configs = [config_of(dataset, "ranking", "data.bad_data=skip") for dataset in datasets]
    with pytest.raises(RuntimeError) as raised:
        run_ranks(evaluate_where_a_file_is_gone_on_rank_1, configs, tmp_path / "out", world_size=2)
    assert str(raised.value).count("UserError: ranks 0 and 1 find different data damaged, first ") == 2
