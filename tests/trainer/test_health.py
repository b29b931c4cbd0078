"""Numbers that go wrong change nothing, on any rank, and are told of with their rows."""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_group import run_ranks
from small_runs import audit, audited_steps, config_of, differing, final_tensors, lines, train_on_ranks

from ultrarec.trainer.config import Config
from ultrarec.trainer.health import Health, NotFiniteError
from ultrarec.trainer.journal import INCIDENTS_FILE
from ultrarec.trainer.loop import Run, record, train
from ultrarec.trainer.parallel import World
from ultrarec.trainer.run import open_run
from ultrarec.trainer.step import train_step


def this_world() -> World:
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=torch.device("cpu"))


def snapshot(run: Run) -> list[torch.Tensor]:
    """Every weight and every optimizer state that this rank holds."""
    alone = World(rank=0, size=1, device=torch.device("cpu"))  # no share of what all hold is left to others
    return [piece.tensor.clone() for piece in run.trainable.pieces(alone) if not piece.name.startswith("rank/")]


def spoil(run: Run, what: str, *, batches: set[int], rank: int) -> None:
    """Let a number go wrong on one rank in the given batches, counted from 0 over training forward passes."""
    seen = -1

    def is_due() -> bool:
        return seen in batches and dist.get_rank() == rank

    def count(module: Any, args: Any) -> None:
        nonlocal seen
        seen += torch.is_grad_enabled()

    def spoil_loss(module: Any, args: Any, output: Any) -> Any:
        return (output[0] * math.nan, output[1]) if is_due() and module.training else output

    def spoil_gradient(module: Any, args: Any, output: Any) -> None:
        if is_due() and module.training:
            output["item"].register_hook(lambda gradient: gradient * math.inf)

    recommender = run.trainable.parallel.module
    recommender.cut.register_forward_pre_hook(count)
    if what == "the loss":
        recommender.model.register_forward_hook(spoil_loss)
    elif what == "an embedding gradient":
        recommender.cut.register_forward_hook(spoil_gradient)
    else:
        weight = next(iter(run.trainable.optimizer.dense.values()))
        weight.register_hook(lambda gradient: gradient * math.inf if is_due() else gradient)


def step_over_a_bad_batch(config: Config, out: Path, what: str) -> dict[str, Any]:
    """Train six steps of which the third is spoilt on the last rank."""
    with open_run(config, out, this_world(), fresh=False) as run:
        spoil(run, what, batches={2}, rank=dist.get_world_size() - 1)
        batches, states, faults = iter(run.loader), [], []
        for _ in range(6):
            step = train_step(run, batches)
            assert step is not None
            record(run, step)
            states.append(snapshot(run))
            faults.append(step.consumed[0].verdict.faults)
        changed = [
            any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            for before, after in itertools.pairwise(states)
        ]
        finite = all(bool(t.isfinite().all()) for t in states[-1])
        return {"changed": changed, "faults": faults, "finite": finite, "batches": run.state.batches}


@pytest.mark.parametrize("kind", ["ranking", "sampled_softmax", "adamw_softmax"])
@pytest.mark.parametrize("what", ["the loss", "an embedding gradient", "a dense gradient"])
def test_a_batch_that_goes_wrong_on_one_rank_changes_nothing_on_any(dataset, tmp_path, kind, what):
    config = config_of(dataset, kind)
    for told in run_ranks(step_over_a_bad_batch, config, tmp_path / "out", what, world_size=2):
        assert told["changed"] == [True, False, True, True, True], "the third step alone must change nothing"
        assert [bool(faults) for faults in told["faults"]] == [False, False, True, False, False, False]
        assert told["finite"]
        assert told["batches"] == 5
        if what != "a dense gradient":  # that one is averaged over ranks before anybody sees it
            assert told["faults"][2][-1].startswith("rank 1: ")
        expected = {"the loss": "the loss", "an embedding gradient": "embeddings of 'item'"}
        assert expected.get(what, "the gradient of model.") in told["faults"][2][-1]


def accumulate_around_a_bad_batch(config: Config, out: Path) -> bool:
    """Whether the gradients of two good batches around a bad one are those of the good ones alone."""
    gathered = []
    for bad in ({1}, set()):
        with open_run(config, out / str(len(bad)), this_world(), fresh=False) as run:
            spoil(run, "the loss", batches=bad, rank=0)
            batches = iter(run.loader)
            run.pipeline.progress(batches)
            first = [p.grad.clone() for p in run.trainable.optimizer.dense.values()]
            run.pipeline.progress(batches)
            after = [p.grad.clone() for p in run.trainable.optimizer.dense.values()]
            gathered.append(all(torch.equal(a, b) for a, b in zip(first, after, strict=True)))
    return gathered == [True, False]


def test_within_an_accumulated_step_a_bad_batch_leaves_what_the_good_ones_gave(dataset, tmp_path):
    config = config_of(dataset, "ranking", "trainer.accumulate=3")
    assert run_ranks(accumulate_around_a_bad_batch, config, tmp_path, world_size=2) == [True, True]


def train_spoilt(config: Config, out: Path, bad: set[int]) -> str:
    """What training says that goes wrong in the given batches."""
    with open_run(config, out, this_world(), fresh=False) as run:
        spoil(run, "the loss", batches=bad, rank=0)
        try:
            train(run)
        except NotFiniteError as error:
            return str(error)
    return "trained"


def incidents(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / INCIDENTS_FILE).read_text().splitlines()]


def rows_of_step(out: Path, step: int) -> list[tuple[int, ...]]:
    return sorted(tuple(row) for rank in (0, 1) for row in audited_steps(out, rank)[step - 1]["rows"])


def test_skipped_batches_are_counted_named_and_consumed_and_the_run_goes_on(dataset, trained, tmp_path):
    config, out = config_of(dataset, "ranking", "trainer.max_skipped_batches=2"), tmp_path / "out"
    assert run_ranks(train_spoilt, config, out, {3, 7}, world_size=2) == ["trained", "trained"]
    assert [line["step"] for line in lines(out)] == list(range(1, 25))
    assert [line["skipped_batches"] for line in lines(out)] == [0] * 3 + [1] * 4 + [2] * 17
    assert [line["grad_norm"] is None for line in lines(out)] == [step in (4, 8) for step in range(1, 25)]
    assert [(line["step"], line["kind"], line["what"]) for line in incidents(out)] == [
        (step, "skipped", "not finite: rank 0: the loss") for step in (4, 8)
    ]
    for line in incidents(out):
        assert sorted(tuple(row) for row in line["rows"]) == rows_of_step(out, line["step"])
        assert line["replay"] == f"ultrarec replay {out} {line['step']}"
    marked = [line["step"] for line in audited_steps(out, 1) if line.get("skipped")]
    assert marked == [4, 8]
    whole = audit(trained(2)["ranking"])
    assert {epoch: sorted(rows) for epoch, rows in audit(out).items()} == {e: sorted(r) for e, r in whole.items()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_budget_stops_every_rank_and_counts_across_a_restart(dataset, tmp_path, world_size):
    settings = ("trainer.max_skipped_batches=1", "checkpoint.every=5")
    out = tmp_path / "out"
    first = config_of(dataset, "ranking", *settings, "trainer.max_steps=10")
    assert set(run_ranks(train_spoilt, first, out, {3}, world_size=world_size)) == {"trained"}
    said = run_ranks(train_spoilt, config_of(dataset, "ranking", *settings), out, {4}, world_size=world_size)
    assert len(set(said)) == 1
    assert said[0].startswith("stopped at step 15: 2 batch(es) of this run skipped")
    assert "trainer.max_skipped_batches=1 (the last: rank 0: the loss)" in said[0]
    assert [line["step"] for line in incidents(out)] == [4, 15]


def test_a_leap_of_the_loss_is_reported_with_its_rows_and_again_after_a_restart(dataset, tmp_path):
    """At a factor of 1.005, ordinary batches leap; what is reported must not depend on where the run was cut."""
    settings = ("trainer.spike_factor=1.005", "checkpoint.every=20", "trainer.epochs=3")
    config, out = config_of(dataset, "ranking", *settings), tmp_path / "out"
    run_ranks(train_on_ranks, [(config, out)], world_size=2)
    whole = incidents(out)
    assert {line["kind"] for line in whole} == {"spike"}
    assert min(line["step"] for line in whole) > 16
    assert max(line["step"] for line in whole) > 24
    for line in whole:
        assert sorted(tuple(row) for row in line["rows"]) == rows_of_step(out, line["step"])
    before = final_tensors(out)
    shutil.rmtree(out / "checkpoints" / "step-00000036")
    run_ranks(train_on_ranks, [(config, out)], world_size=2)
    assert incidents(out) == whole
    assert not differing(final_tensors(out), before)


@pytest.mark.parametrize(("losses", "is_spike"), [([1.0] * 15, False), ([1.0] * 16, True), ([1.0, 9.0] * 8, False)])
def test_a_leap_is_measured_against_the_median_of_enough_losses(losses, is_spike):
    health = Health()
    health.recent.extend(losses)
    assert health.is_spike(3.1, factor=3.0) is is_spike


def test_health_survives_a_checkpoint():
    health = Health(skipped=3)
    health.recent.extend(0.1 * step for step in range(100))
    again = Health.of(health.to_tensor())
    assert (again.skipped, list(again.recent)) == (3, list(health.recent))
    assert len(again.recent) == 64
