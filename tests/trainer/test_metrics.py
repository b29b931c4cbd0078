"""Metrics against their definitions, written as loops."""

import math
from itertools import product

import pytest
import torch

from ultrarec.trainer.metrics import (
    auc,
    gauc,
    next_item_metrics,
    normalized_entropy,
    ranking_metrics,
    regression_metrics,
)


def auc_by_pairs(scores, labels):
    pairs = [(p, n) for (p, a), (n, b) in product(zip(scores, labels, strict=True), repeat=2) if a == 1 and b == 0]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs) if pairs else math.nan


def gauc_by_users(scores, labels, users):
    total, weight = 0.0, 0
    for user in set(users):
        mine = [k for k, u in enumerate(users) if u == user]
        area = auc_by_pairs([scores[k] for k in mine], [labels[k] for k in mine])
        if not math.isnan(area):
            total, weight = total + len(mine) * area, weight + len(mine)
    return total / weight if weight else math.nan


def entropy_ratio(logits, labels):
    def cross_entropy(p, y):
        return -(y * math.log(p) + (1 - y) * math.log(1 - p))

    rate = sum(labels) / len(labels)
    losses = [cross_entropy(1 / (1 + math.exp(-x)), y) for x, y in zip(logits, labels, strict=True)]
    return sum(losses) / len(losses) / cross_entropy(rate, rate)


@pytest.fixture(params=range(5))
def predictions(request):
    """Scores with many ties, labels, and users of one to many predictions."""
    generator = torch.Generator().manual_seed(request.param)
    scores = torch.randint(-8, 8, (150,), generator=generator) / 4
    labels = torch.randint(0, 2, (150,), generator=generator).float()
    users = torch.randint(0, 40, (150,), generator=generator) * 10**12
    return scores, labels, users


def test_auc_is_the_share_of_ordered_pairs_with_ties_counted_half(predictions):
    scores, labels, _ = predictions
    assert auc(scores, labels) == pytest.approx(auc_by_pairs(scores.tolist(), labels.tolist()), rel=1e-12)


def test_gauc_is_the_mean_auc_of_users_weighted_by_their_predictions(predictions):
    scores, labels, users = predictions
    expected = gauc_by_users(scores.tolist(), labels.tolist(), users.tolist())
    assert gauc(scores, labels, users) == pytest.approx(expected, rel=1e-12)


def test_normalized_entropy_is_the_loss_over_that_of_the_base_rate(predictions):
    scores, labels, _ = predictions
    expected = entropy_ratio(scores.tolist(), labels.tolist())
    assert normalized_entropy(scores, labels) == pytest.approx(expected, rel=1e-9)


def test_predicting_the_base_rate_has_normalized_entropy_one():
    labels = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert normalized_entropy(torch.full((4,), -math.log(3.0)), labels) == pytest.approx(1.0, rel=1e-6)


def test_metrics_do_not_depend_on_the_order_of_predictions(predictions):
    scores, labels, users = predictions
    order = torch.randperm(150, generator=torch.Generator().manual_seed(9))
    assert auc(scores[order], labels[order]) == auc(scores, labels)
    assert gauc(scores[order], labels[order], users[order]) == pytest.approx(gauc(scores, labels, users), rel=1e-12)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_metrics_of_equal_labels_have_no_value(label):
    scores, labels, users = torch.tensor([0.1, 0.2]), torch.full((2,), label), torch.tensor([1, 1])
    assert math.isnan(auc(scores, labels))
    assert math.isnan(gauc(scores, labels, users))
    assert not math.isfinite(normalized_entropy(scores, labels))


def test_a_single_prediction_has_no_auc():
    one = torch.ones(1)
    assert math.isnan(auc(one, one))
    assert math.isnan(gauc(one, one, torch.zeros(1, dtype=torch.int64)))


def test_users_of_equal_labels_take_no_part_in_gauc():
    scores, labels = torch.tensor([0.0, 1.0, 5.0, 6.0, 7.0]), torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    assert gauc(scores, labels, torch.tensor([1, 1, 2, 2, 2])) == 1.0


def test_every_task_is_judged_by_its_own_column(predictions):
    scores, labels, users = predictions
    logits, both = torch.stack([scores, -scores], 1), torch.stack([labels, labels], 1)
    values = ranking_metrics(logits, both, users, ("click", "view"))
    assert values["auc/click"] == auc(scores, labels)
    assert values["auc/view"] == pytest.approx(1 - values["auc/click"], rel=1e-12)
    assert {name.split("/")[0] for name in values} == {"ne", "auc", "gauc"}


def test_next_item_metrics_are_the_means_of_their_definitions():
    ranks = [1, 2, 10, 11, 50, 51, 200, 201, 100_000]
    values = next_item_metrics(torch.tensor(ranks))
    for k in (10, 50, 200):
        assert values[f"hr@{k}"] == pytest.approx(sum(r <= k for r in ranks) / len(ranks), rel=1e-12)
        gains = sum(1 / math.log2(r + 1) for r in ranks if r <= k)
        assert values[f"ndcg@{k}"] == pytest.approx(gains / len(ranks), rel=1e-12)
    assert values["mrr"] == pytest.approx(sum(1 / r for r in ranks) / len(ranks), rel=1e-12)
    assert set(next_item_metrics(torch.tensor([1])).values()) == {1.0}


def test_errors_of_regressions_are_means_over_the_predictions_that_have_a_label():
    predictions = torch.tensor([[1.0, 4.0], [2.0, 5.0], [4.0, 6.0]])
    labels = torch.tensor([[0.5, math.nan], [math.nan, math.nan], [7.0, math.nan]])
    found = regression_metrics(predictions, labels, ("watched", "rated"))
    assert (found["mae/watched"], found["mse/watched"]) == (1.75, (0.25 + 9) / 2)
    assert math.isnan(found["mae/rated"])
    assert math.isnan(found["mse/rated"])
    assert regression_metrics(torch.zeros(3, 0), torch.zeros(3, 0), ()) == {}
