"""What samples are dealt by is what the model spends on them."""

import numpy as np
import pytest
from small_runs import NEXT_ITEM, NUM_ITEMS, RANKING

from ultrarec.kernels import AttentionMask
from ultrarec.trainer.config import load_config
from ultrarec.trainer.costs import cost_model_of, samples_flops

LONGEST = 24
TAIL = "model.tail={num_layers = 3, num_events = 5, window = 2}"
CHANNELS = "model.channels={a = {actions = ['click'], num_events = 7}, b = {actions = ['like'], num_events = 3}}"


@pytest.fixture
def config_of(tmp_path):
    def make(kind, *overrides):
        path = tmp_path / "recipe.toml"
        path.write_text({"ranking": RANKING, "next_item": NEXT_ITEM}[kind].format(path=tmp_path))
        return load_config(str(path), [f"data.max_history={LONGEST}", "data.batch_rows=8", *overrides])

    return make


def cost_of(config, history, targets):
    return cost_model_of(config, num_items=NUM_ITEMS, num_actions=2).units(history, targets)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.window=4",),
        ("model.window=4", "model.full_tail=3"),
        ("model.window=4", "model.prefix=3"),
        ("model.tokens=interleaved", "model.window=4"),
        (TAIL,),
        (CHANNELS,),
    ],
)
def test_costs_are_in_the_proportion_of_the_operations(config_of, overrides):
    config = config_of("ranking", *overrides)
    history, targets = (grid.ravel() for grid in np.meshgrid(np.arange(LONGEST + 1), np.arange(4)))
    flops = samples_flops(config, history=history, targets=targets, num_items=NUM_ITEMS, num_actions=2).train
    costs = cost_of(config, history, targets)
    unit = costs[-1] / flops[-1]
    # Rounded twice, once of them for each target; and so is what the unit is taken from.
    assert np.abs(costs - unit * flops).max() <= 4


def test_a_target_that_the_window_hides_history_from_is_cheaper_than_one_that_sees_it_all(config_of):
    def target(*overrides):
        """Cost of another target, over that of one which sees nothing."""
        near, far = np.array([0, 0]), np.array([LONGEST, LONGEST])
        config, number = config_of("ranking", "data.features=", *overrides), np.array([1, 2])
        return np.diff(cost_of(config, far, number)) / np.diff(cost_of(config, near, number))

    def pairs(**mask):
        """Keys that a target sees, one by one, after LONGEST events of history."""
        mask, last = AttentionMask(**mask), LONGEST
        exempt = mask.window == 0 or mask.full_tail or mask.prefix
        return 1 + sum(bool(exempt) or last - j <= mask.window for j in range(last))

    blind, hidden = target("model.window=1"), target("model.window=8")
    seeing = target("model.window=8", "model.prefix=1")
    assert seeing == pytest.approx(target(), rel=1e-3)
    each = (seeing - 1) / (pairs() - 1)
    for cost, mask in ((blind, {"window": 1}), (hidden, {"window": 8}), (seeing, {"window": 8, "prefix": 1})):
        assert cost == pytest.approx(1 + each * (pairs(**mask) - 1), rel=2e-3)


def test_layers_that_read_the_newest_events_only_cost_no_more_for_longer_histories(config_of):
    whole, cut = config_of("next_item", "model.num_layers=4"), config_of("next_item", "model.num_layers=1", TAIL)
    lengths, none = np.arange(LONGEST + 1), np.zeros(LONGEST + 1, np.int64)
    steps = [np.diff(cost_of(config, lengths, none)) for config in (whole, cut)]
    # Beyond the tail's reach an event adds to one layer instead of four.
    assert (steps[1][6:] < steps[0][6:]).all()
