"""How evenly steps are dealt, and how little they differ: `python docs/balance.py`, half a minute.

Prints the figures of docs/running.md ("Balance", "Small steps") and of docs/datasets.md ("Long histories"), for 8 ranks
and 16,000 simulated histories; no dataset is read.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from ultrarec.data.cost import CostModel
from ultrarec.data.deal import NO_LOADS, deal, loads_of
from ultrarec.data.order import Order, Step, StepSize
from ultrarec.data.samples import Integers, NextItemSampler, Numbers, RowCounts
from ultrarec.data.stochastic_length import StochasticLength

RANKS, LONGEST, NUM_HISTORIES = 8, 4096, 16_000
PAIRS = {"tokens alone": 0.0, "0.001 tokens per pair": 1e-3}
MEASURES: tuple[Literal["rows", "tokens", "cost"], ...] = ("rows", "tokens", "cost")


def lengths_of(kind: str, *, shortest: float, log_mean: float, log_deviation: float, seed: int) -> Integers:
    """Events of each history: multiples of `shortest` by a Zipf law, or log-normal."""
    random = np.random.default_rng(seed)
    zipf = random.zipf(1.3, NUM_HISTORIES) * shortest
    lengths = zipf if kind == "Zipf" else np.random.default_rng(seed).lognormal(log_mean, log_deviation, NUM_HISTORIES)
    return np.clip(lengths, 2, LONGEST).astype(np.int64)


def cost_model(pair: float) -> CostModel:
    """An event costs a token, and each pair of events `pair` tokens."""
    history = np.arange(LONGEST + 1.0)
    return CostModel.in_tokens(history + pair * history * (history + 1) / 2, 1 + pair * (history + 1))


def steps(
    lengths: Integers,
    size: StepSize,
    pair: float,
    *,
    row_groups: int = 16,
    per_window: int = 16,
    recent: bool = True,
    balance_for: int = 1,
    stochastic_length: StochasticLength | None = None,
) -> list[Step]:
    """Those of an epoch but for its last, which is what is left over."""
    group_begin = np.linspace(0, NUM_HISTORIES, row_groups + 1).astype(np.int64)
    events = lengths.astype(np.int32)
    counts = RowCounts(events, events, np.zeros_like(events))
    sampler = NextItemSampler(LONGEST, "recent" if recent else "all")
    until = np.concatenate([[0], np.cumsum(sampler.num_samples(counts, "train"))])

    def counts_of(groups: Integers) -> RowCounts:
        bounds = zip(group_begin[groups], group_begin[groups + 1], strict=True)
        return counts.take(np.concatenate([np.arange(begin, end) for begin, end in bounds]))

    order = Order(
        counts_of=counts_of,
        group_begin=group_begin,
        group_samples=np.diff(until[group_begin]),
        sampler=sampler,
        split="train",
        step_size=size,
        cost_model=cost_model(pair),
        stochastic_length=stochastic_length,
        shuffle=True,
        groups_per_window=per_window,
        seed=0,
        balance_for=balance_for,
    )
    return list(order.steps(0))[:-1]


def dealt(step: Step, costs: Integers | None = None) -> Integers:
    """[S] the rank of each sample."""
    return deal(step.samples.places, step.samples.costs if costs is None else costs, RANKS)


def balance() -> None:
    """Steps of 64 samples for each rank."""
    lengths = lengths_of("Zipf", shortest=20, log_mean=5, log_deviation=1, seed=1)
    for name, pair in PAIRS.items():
        found = steps(lengths, StepSize("rows", 64 * RANKS), pair)
        loads = np.array([np.bincount(dealt(step), step.samples.costs, RANKS) for step in found])
        in_turn = np.array([np.bincount(np.arange(len(s.samples)) % RANKS, s.samples.costs, RANKS) for s in found])
        largest, plain = (each.max(1) / each.mean(1) for each in (loads, in_turn))
        print(
            f"Zipf, {name}, 64 samples per rank, {len(found)} steps: largest load {largest.mean():.4f} of the mean, "
            f"at most {largest.max():.4f}; in turn {plain.mean():.2f}"
        )


def small_steps() -> None:
    """About 8 samples for each rank, without and with `data.balance_for`."""
    for kind in ("Zipf", "log-normal"):
        lengths = lengths_of(kind, shortest=20, log_mean=5, log_deviation=1, seed=1)
        for name, pair in PAIRS.items():
            costs = cost_model(pair).units(lengths - 1, np.zeros_like(lengths))
            for measure in MEASURES:
                size = {"rows": 1.0, "tokens": lengths.mean(), "cost": costs.mean() / 1024}[measure]
                cells = []
                for number in (1, RANKS):
                    found = steps(lengths, StepSize(measure, 64 * size), pair, balance_for=number)
                    loads = sum((loads_of(dealt(s), s.samples.costs, RANKS) for s in found), NO_LOADS)
                    means = np.array([step.samples.costs.sum() for step in found])
                    least = loads.least / loads.mean
                    cells.append(f"{loads.largest / loads.mean:.3f} (at best {least:.3f}), {variation(means):.2f}")
                print(f"{kind}, {name}, by {measure}: largest load, variation of steps: {' -> '.join(cells)}")


def long_histories() -> None:
    """Variation of the loads of ranks over steps under stochastic length."""
    for kind in ("Zipf", "log-normal"):
        lengths = lengths_of(kind, shortest=10, log_mean=6.5, log_deviation=1.2, seed=0)
        for name, pair in PAIRS.items():
            plain, balanced = (_cut(lengths, pair, balanced=balanced) for balanced in (False, True))
            alone = variation(_loads(plain, pair, as_expected=True))
            together = [variation(_loads(found, pair, as_expected=False)) for found in (plain, balanced)]
            print(
                f"{kind}, {name}, stochastic length: every rank for itself {alone:.1%}, not balanced "
                f"{together[0]:.1%}, balanced {together[1]:.2%}"
            )


def _rule(*, balanced: bool) -> StochasticLength:
    return StochasticLength(max_history=LONGEST, alpha=1.6, selection="recent", balanced=balanced, seed=0)


def _cut(lengths: Integers, pair: float, *, balanced: bool) -> list[Step]:
    return steps(
        lengths,
        StepSize("cost", 250_000),
        pair,
        row_groups=20,
        per_window=10,
        recent=False,
        stochastic_length=_rule(balanced=balanced),
    )


def _loads(found: list[Step], pair: float, *, as_expected: bool) -> Numbers:
    """Cost of each rank in each step; `as_expected`: dealt before it is decided what is kept."""
    rule, model = _rule(balanced=False), cost_model(pair)
    loads = []
    for step in found:
        history = step.samples.slices.target_begin.clip(max=LONGEST)
        expected = rule.expected(history, lambda kept: model.units(kept, np.zeros_like(kept)))
        loads.append(np.bincount(dealt(step, expected if as_expected else None), step.samples.costs, RANKS))
    return np.array(loads)


def variation(values: Numbers) -> float:
    """Standard deviation over mean."""
    return float(values.std() / values.mean())


if __name__ == "__main__":
    balance()
    small_steps()
    long_histories()
