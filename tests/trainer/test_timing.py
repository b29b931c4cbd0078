"""Where time goes, and who is slow."""

import json
from types import SimpleNamespace

import pytest
import torch

from ultrarec.trainer import timing
from ultrarec.trainer.timing import PHASES, SLOW_READINGS, Stragglers, Timer, metrics_of


def reading(**slow: dict[int, float]) -> torch.Tensor:
    """[4 ranks, phases]: 10 ms each, but for the given phases of the given ranks."""
    per_rank = torch.full((4, len(PHASES)), 0.01, dtype=torch.float64)
    for phase, ranks in slow.items():
        for rank, seconds in ranks.items():
            per_rank[rank, PHASES.index(phase)] = seconds
    return per_rank


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when it is told to."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def spent(timer: Timer) -> dict[str, float]:
    return {phase: seconds for phase, seconds in timer.read().items() if seconds}


def test_a_phase_within_another_counts_for_itself_alone_and_the_rest_of_the_time_as_other(clock):
    timer = Timer(torch.device("cpu"))
    clock.now += 8
    with timer.phase("forward"):
        clock.now += 1
        with timer.phase("exchange"):
            clock.now += 4
        clock.now += 2
    assert spent(timer) == {"forward": 3.0, "exchange": 4.0, "other": 8.0}
    assert spent(timer) == {}, "a reading begins anew"
    clock.now += 1
    assert spent(timer) == {"other": 1.0}


def test_waiting_for_batches_counts_as_data_and_changes_none_of_them(clock):
    timer = Timer(torch.device("cpu"))

    def slow_batches():
        for batch in range(3):
            clock.now += 2
            yield batch

    assert list(timer.watch(slow_batches())) == [0, 1, 2]
    assert spent(timer) == {"data": 6.0}


def test_metrics_name_mean_largest_and_the_rank_of_the_largest():
    metrics = metrics_of(reading(data={2: 0.05}))
    assert metrics["seconds/data"] == pytest.approx(0.02)
    assert (metrics["seconds/data/max"], metrics["seconds/data/max_rank"]) == (0.05, 2)
    assert len(metrics) == 3 * len(PHASES)


def test_a_rank_that_is_slow_in_three_readings_is_named_once():
    stragglers = Stragglers()
    said = [stragglers.take(reading(forward={3: 0.06})) for _ in range(SLOW_READINGS + 2)]
    assert [text is not None for text in said] == [False] * (SLOW_READINGS - 1) + [True, False, False]
    assert said[SLOW_READINGS - 1] == (
        "rank 3 is slow: 0.080 s per step of its own (data 0.010 s, forward 0.060 s, optimizer 0.010 s), "
        "the median rank 0.030 s; the others wait for it in every step"
    )


@pytest.mark.parametrize(
    "readings",
    [
        [{3: 0.06}, {2: 0.06}] * 4,  # each time another rank
        [{3: 0.012}] * 8,  # too little
    ],
)
def test_ranks_that_are_slow_by_turns_or_by_little_are_not_named(readings):
    stragglers = Stragglers()
    assert not any(stragglers.take(reading(forward=slow)) for slow in readings)


def test_waiting_for_others_makes_no_rank_slow():
    stragglers = Stragglers()
    waits = {0: 0.5, 1: 0.5, 2: 0.5}
    assert not any(stragglers.take(reading(backward=waits, agreement=waits)) for _ in range(8))


def test_lines_of_metrics_hold_the_seconds_of_every_phase(trained):
    text = (trained(2)["ranking"] / "metrics.jsonl").read_text().splitlines()
    line, *later = [line for line in map(json.loads, text) if line["split"] == "train"]
    assert {key for key in line if key.startswith("seconds/")} == {
        f"seconds/{phase}{what}" for phase in PHASES for what in ("", "/max", "/max_rank")
    }
    for phase in set(PHASES) - {"checkpoint", "evaluation"}:
        assert 0 < line[f"seconds/{phase}"] <= line[f"seconds/{phase}/max"], phase
    # Between the first line and the last, everything has a name; phases are read a moment before a line is written.
    total = sum(each[f"seconds/{phase}"] for each in later for phase in PHASES)
    assert total == pytest.approx(later[-1]["time"] - line["time"], rel=0.2, abs=0.3)


def test_the_seconds_of_every_rank_lie_beside_the_metrics(trained):
    out = trained(2)["ranking"]
    per_rank = [json.loads(line) for line in (out / "ranks.jsonl").read_text().splitlines()]
    written = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    metrics = [line for line in written if line["split"] == "train"]
    assert [each["step"] for each in per_rank] == [line["step"] for line in metrics]
    for each, line in zip(per_rank, metrics, strict=True):
        for phase in PHASES:
            seconds = each["seconds"][phase]
            assert len(seconds) == 2
            assert max(seconds) == line[f"seconds/{phase}/max"] == seconds[line[f"seconds/{phase}/max_rank"]]
