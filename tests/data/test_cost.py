import numpy as np

from ultrarec.data.cost import CostModel


def test_a_cost_is_that_of_the_history_and_of_each_target_in_whole_units_of_a_1024th():
    model = CostModel.in_tokens(np.array([0.0, 1.0, 2.5]), np.array([1.0, 1.25, 1.5]))
    units = model.units(np.array([0, 2, 2]), np.array([1, 0, 3]))
    assert units.tolist() == [1024, 2.5 * 1024, 7 * 1024]


def test_without_a_model_every_event_costs_a_token():
    assert CostModel.of_tokens_alone(9).units(np.array([9, 3]), np.array([0, 2])).tolist() == [9 * 1024, 5 * 1024]
