"""Held-out metrics against brute force, and the command that prints them."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from process_group import run_ranks
from small_runs import NUM_ITEMS, config_of, final_tensors, lines, make_dataset, train_on_ranks

from ultrarec.data.errors import UserError
from ultrarec.trainer import evaluate as evaluation
from ultrarec.trainer.build import build_loader, build_recommender, load_dataset, shard
from ultrarec.trainer.checkpoint import load_weights
from ultrarec.trainer.config import Config
from ultrarec.trainer.evaluate import Evaluator
from ultrarec.trainer.evaluate_command import add_arguments, find_checkpoints, run
from ultrarec.trainer.manifest import checkpoint_folder, complete_checkpoints, step_of
from ultrarec.trainer.metrics import next_item_metrics, ranking_metrics
from ultrarec.trainer.parallel import World

MAX_HISTORY = 12


def evaluator_of(config: Config, out: Path) -> Evaluator:
    """An evaluator on this rank of the newest checkpoint of a run."""
    world = World(rank=dist.get_rank(), size=dist.get_world_size(), device=torch.device("cpu"))
    info = load_dataset(config)
    sharded = shard(build_recommender(config, info), config, world)
    load_weights(sharded.parallel, complete_checkpoints(out)[-1], world=world)
    return Evaluator(config, info, world, sharded.parallel)


def metrics_and_outputs(config: Config, out: Path, chunk: int) -> tuple[dict[str, float], list[Any]]:
    """The test metrics with a catalogue in chunks, and what the model gives for each batch of this rank."""
    evaluation.CATALOGUE_CHUNK, evaluation.USER_CHUNK = chunk, 5
    evaluator = evaluator_of(config, out)
    metrics = evaluator("test")
    assert evaluator.parallel.training, "the evaluator must leave the model as it found it"
    evaluator.parallel.eval()
    outputs = []
    with torch.no_grad():
        for batch in build_loader(evaluator.config, evaluator.info, evaluator.world, split="test"):
            _, output = evaluator.parallel(batch)
            named = {name: getattr(output, name).numpy() for name in output.__slots__}
            outputs.append(named | {"samples": batch.samples.numpy()})
    return metrics, outputs


def stacked(outputs: list[Any], name: str) -> torch.Tensor:
    """One value per sample, in the order of files, rows and samples, which is not that of evaluation."""
    samples = [tuple(sample) for output in outputs for sample in output["samples"].tolist()]
    order = sorted(range(len(samples)), key=samples.__getitem__)
    return torch.cat([torch.from_numpy(output[name]) for output in outputs])[order]


def held_out(dataset: Path) -> list[tuple[list[int], int]]:
    """(input items, target) of every test event with a history, in the order of users and time."""
    found = []
    for path in sorted(dataset.glob("histories/*.parquet")):
        for row in pq.read_table(path).to_pylist():
            for event in range(row["num_train"] + row["num_validation"], row["num_events"]):
                history = row["items"][max(event - MAX_HISTORY, 0) : event]
                found += [(history, row["items"][event])] if history else []
    return found


def brute_force_rank(scores: list[float], seen: list[int], target: int) -> int:
    """Rank of the target, never removed itself, among all items outside the input; scores[i - 1] is item i's."""
    if target == 0:
        return NUM_ITEMS + 1
    rivals = [item for item in range(1, NUM_ITEMS + 1) if item != target and item not in seen]
    return 1 + sum(scores[item - 1] >= scores[target - 1] for item in rivals)


@pytest.mark.parametrize(("kind", "chunk"), [("full_softmax", 7), ("full_softmax", 10_000), ("sampled_softmax", 44)])
def test_next_item_metrics_are_those_of_a_full_ranking_in_float64(trained, dataset, kind, chunk):
    out = trained(1)[kind]
    metrics, outputs = run_ranks(metrics_and_outputs, config_of(dataset, kind), out, chunk, world_size=1)[0]
    events, users = held_out(dataset), stacked(outputs, "user_vectors").double()
    assert {target == 0 for _, target in events} == {True, False}, "some targets must be unknown, some known"
    assert any(target in seen for seen, target in events), "some targets must have been seen before"
    assert stacked(outputs, "labels").tolist() == [target for _, target in events]
    items = final_tensors(out)["tables/item/weight"][1:].double()
    scores = (users @ torch.nn.functional.normalize(items, dim=1).T).tolist()
    ranks = [brute_force_rank(row, seen, target) for row, (seen, target) in zip(scores, events, strict=True)]
    assert metrics == pytest.approx(next_item_metrics(torch.tensor(ranks)), rel=1e-12)
    (line,) = lines(out, "test")
    assert {name: line[name] for name in metrics} == pytest.approx(metrics, rel=1e-12)


def trained_and_evaluated(config: Config, out: Path) -> tuple[dict[str, float], list[Any]]:
    """As `metrics_and_outputs`, of a run that the same process has trained."""
    train_on_ranks([(config, out)])
    return metrics_and_outputs(config, out, chunk=7)


def test_items_are_ranked_by_the_network_that_was_trained(dataset, tmp_path):
    config, out = config_of(dataset, "full_softmax", "objective.similarity=mlp", "trainer.epochs=1"), tmp_path / "out"
    metrics, outputs = run_ranks(trained_and_evaluated, config, out, world_size=1)[0]
    events, users = held_out(dataset), stacked(outputs, "user_vectors").double()
    tensors = final_tensors(out)
    product, weight, bias, output = (
        tensors[f"weights/model.similarity.{name}"].double()
        for name in ("product", "hidden.weight", "hidden.bias", "output.weight")
    )
    items = torch.nn.functional.normalize(tensors["tables/item/weight"][1:].double(), dim=1)
    pairs = torch.cat(torch.broadcast_tensors(users[:, None], items[None]), dim=-1)
    scores = (users * product) @ items.T + ((pairs @ weight.T + bias).relu() @ output.T)[..., 0]
    rows = zip(scores.tolist(), events, strict=True)
    ranks = [brute_force_rank(row, seen, target) for row, (seen, target) in rows]
    assert metrics == pytest.approx(next_item_metrics(torch.tensor(ranks)), rel=1e-12)
    (line,) = lines(out, "test")
    assert {name: line[name] for name in metrics} == pytest.approx(metrics, rel=1e-12)


def ranks_of_equal_scores(config: Config, out: Path) -> list[int]:
    """Ranks where all scores are 0, of a user who has seen items 1, 2 and an unknown one, and one who has seen none."""
    seen = [torch.tensor([1, 0, 2]), torch.zeros(0, dtype=torch.int64)]
    with torch.no_grad():
        return evaluator_of(config, out)._ranks(torch.zeros(2, 6), torch.tensor([3, 5]), seen).tolist()


def test_equal_scores_count_against_the_target(trained, dataset):
    config, out = config_of(dataset, "full_softmax"), trained(1)["full_softmax"]
    assert run_ranks(ranks_of_equal_scores, config, out, world_size=1) == [[NUM_ITEMS - 2, NUM_ITEMS]]


def test_ranking_metrics_are_those_of_the_logits_of_every_test_event(trained, dataset):
    out = trained(1)["ranking"]
    metrics, outputs = run_ranks(metrics_and_outputs, config_of(dataset, "ranking"), out, 7, world_size=1)[0]
    logits, labels, users = (stacked(outputs, name) for name in ("logits", "labels", "users"))
    rows = [row for path in sorted(dataset.glob("histories/*.parquet")) for row in pq.read_table(path).to_pylist()]
    actions = [
        (user, bits)
        for user, row in enumerate(rows)
        for bits in row["actions"][row["num_train"] + row["num_validation"] :]
    ]
    assert users.tolist() == [user for user, _ in actions]
    assert labels.tolist() == [[bits & 1, bits >> 1 & 1] for _, bits in actions]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double())
    expected = {"loss": float(loss), **ranking_metrics(logits, labels, users, ("is_click", "long_view"))}
    assert metrics == pytest.approx(expected, rel=1e-6)
    (line,) = lines(out, "test")
    assert {name: line[name] for name in metrics} == pytest.approx(metrics, rel=1e-12)


@pytest.mark.parametrize("kind", ["ranking", "columns", "full_softmax"])
def test_metrics_of_a_checkpoint_are_the_same_on_any_number_of_ranks(trained, dataset, kind):
    out = trained(2)[kind]
    found = [run_ranks(metrics_and_outputs, config_of(dataset, kind), out, 7, world_size=n) for n in (1, 2, 3)]
    for ranks in found:
        for metrics, _ in ranks:
            assert metrics == pytest.approx(found[0][0][0], rel=1e-6)


def test_a_split_that_gives_no_sample_has_metrics_without_values(tmp_path):
    """Next item: every held-out event may be its user's first, before which there is nothing to predict from."""
    root = make_dataset(tmp_path / "dataset", num_users=3, mean_events=2.0)
    for path in root.glob("histories/*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.set_column(*_column(table, "num_validation", 0)), path)
    info = json.loads((root / "dataset.json").read_text())
    info["counts"] |= {"validation_events": 2, "test_events": 0}
    (root / "dataset.json").write_text(json.dumps(info))
    run_ranks(train_on_ranks, [(config_of(root, "full_softmax"), tmp_path / "out")], world_size=2)
    (line,) = lines(tmp_path / "out", "validation")
    assert line["hr@10"] is None
    assert line["mrr"] is None


def _column(table: Any, name: str, value: int) -> tuple[int, Any, Any]:
    index = table.column_names.index(name)
    return index, table.schema.field(index), pa.array([value] * table.num_rows, table.schema.field(index).type)


@pytest.fixture
def arguments():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return lambda *words: parser.parse_args([str(word) for word in words])


def test_the_command_prints_the_metrics_of_the_newest_checkpoint(trained, arguments, capsys):
    out = trained(2)["ranking"]
    assert run(arguments(out)) == 0
    printed = capsys.readouterr().out
    for split in ("validation", "test"):
        assert f"{split} (step 24)" in printed
        (line,) = lines(out, split)
        for task in ("is_click", "long_view"):
            assert f"{task}  {line[f'auc/{task}']:.4f}" in printed


def test_the_command_evaluates_the_step_it_is_asked_for(trained, arguments, capsys):
    assert run(arguments(trained(1)["full_softmax"], "--checkpoint", "10")) == 0
    printed = capsys.readouterr().out
    assert "test (step 10)" in printed
    assert "ndcg@10" in printed


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_it_evaluated(trained, arguments, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(trained(1)["full_softmax"], out)
    *_, before, newest = (step_of(folder) for folder in complete_checkpoints(out))
    damaged = checkpoint_folder(out, newest) / "index.json"
    damaged.write_bytes(damaged.read_bytes().replace(b"F32", b"F16", 1))
    assert run(arguments(out)) == 0
    printed = capsys.readouterr()
    assert "is damaged: index.json has another checksum" in printed.err
    assert printed.err.endswith("; looking for the checkpoint before it\n")
    assert f"test (step {before})" in printed.out
    with pytest.raises(UserError, match=f"; the one before it is --checkpoint {before}: give that instead"):
        run(arguments(out, "--checkpoint", str(newest)))


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ("7", "--checkpoint 7: expected latest, best or one of the steps [5, 10, 15, 20, 24]"),
        ("newest", "--checkpoint newest: expected latest, best or one of the steps [5, 10, 15, 20, 24]"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(trained, arguments, choice, told):
    with pytest.raises(UserError) as caught:
        run(arguments(trained(1)["ranking"], "--checkpoint", choice))
    assert str(caught.value) == told


def test_a_folder_without_a_run_or_without_a_checkpoint_is_refused(trained, arguments, tmp_path):
    with pytest.raises(UserError, match=r"is no run folder: it has no config.toml; give the --out of `ultrarec train`"):
        run(arguments(tmp_path))
    shutil.copy(trained(1)["ranking"] / "config.toml", tmp_path)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        run(arguments(tmp_path))


def run_with_lines(folder: Path, source: Path, written: list[dict[str, Any]]) -> Path:
    """A run folder with the checkpoints of another and these validation lines."""
    shutil.copytree(source / "checkpoints", folder / "checkpoints")
    text = "".join(json.dumps({"split": "validation", **line}) + "\n" for line in written)
    (folder / "metrics.jsonl").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("written", "best"),
    [
        (
            [
                {"step": 5, "ne/a": 0.9, "ne/b": 0.9},
                {"step": 10, "ne/a": 0.7, "ne/b": 1.0},
                {"step": 15, "ne/a": 1.0, "ne/b": 1.0},
            ],
            10,
        ),
        ([{"step": 5, "ndcg@10": 0.1}, {"step": 10, "ndcg@10": 0.3}, {"step": 15, "ndcg@10": 0.2}], 10),
        ([{"step": 5, "ndcg@10": 0.1}, {"step": 7, "ndcg@10": 0.9}], 5),
        ([{"step": 5, "ne/a": None, "ne/b": 0.5}, {"step": 10, "ne/a": 0.9, "ne/b": 0.9}], 10),
        ([{"step": 5, "ndcg@10": None}, {"step": 10, "ndcg@10": 0.0}], 10),
    ],
    ids=["lowest entropy", "highest ndcg", "saved steps only", "an entropy without a value", "an ndcg without a value"],
)
def test_best_is_the_saved_step_with_the_best_validation(trained, tmp_path, written, best):
    folder = run_with_lines(tmp_path, trained(1)["ranking"], written)
    assert find_checkpoints(folder, "best") == [checkpoint_folder(folder, best)]


@pytest.mark.parametrize("written", [[], [{"step": 5, "ne/a": None}]])
def test_best_without_a_validation_of_a_saved_step_is_refused(trained, tmp_path, written):
    folder = run_with_lines(tmp_path, trained(1)["ranking"], written)
    # Only that of the last step knows of a validation.
    shutil.rmtree(complete_checkpoints(folder)[-1])
    with pytest.raises(UserError, match=r"has a validation with values of the default metric; use latest or a step of"):
        find_checkpoints(folder, "best")
