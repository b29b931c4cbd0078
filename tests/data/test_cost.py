import numpy as np
import pytest

from ultrarec.data.cost import CostModel


def visible_pairs(history, targets, window, full):
    """Pairs (i, j), one by one: the newest `full` rows of the history, and all targets, see the whole history."""
    pairs = targets * (history + 1)
    for i in range(history):
        sees_all = window == 0 or i >= history - full
        pairs += sum(j <= i and (sees_all or i - j <= window) for j in range(history))
    return pairs


@pytest.mark.parametrize(("window", "full"), [(0, 0), (1, 0), (3, 0), (3, 2), (3, 9), (20, 4)])
def test_pairs_are_those_that_the_mask_shows(window, full):
    history, targets = (grid.ravel() for grid in np.meshgrid(np.arange(15), np.arange(4)))
    expected = [visible_pairs(*lengths, window, full) for lengths in zip(history, targets, strict=True)]
    assert CostModel(window=window, full=full).pairs(history, targets).tolist() == expected


def test_a_cost_is_tokens_and_pairs_in_whole_units_of_a_1024th():
    units = CostModel(pair=0.25).units(np.array([3]), np.array([2]))
    assert units.tolist() == [(5 + 0.25 * (6 + 8)) * 1024]
