"""The tables of metrics that a run and an evaluation end with."""

import math

from ultrarec.trainer.summary import describe


def test_regression_tasks_have_a_table_of_their_own_and_values_that_do_not_exist_stay_blank():
    metrics = {
        "step": 7,
        "auc/click": 0.75,
        "gauc/click": math.nan,
        "ne/click": 0.9,
        "mae/price": 1.5,
        "mse/price": 4.0,
    }
    assert describe("test", metrics).splitlines() == [
        "test (step 7)",
        " task     auc  gauc      ne",
        "-----  ------  ----  ------",
        "click  0.7500        0.9000",
        " task     mae     mse",
        "-----  ------  ------",
        "price  1.5000  4.0000",
    ]
