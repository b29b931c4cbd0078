"""Metrics of ranking and of next-item prediction, exact over whatever predictions they are given."""

# Legend: M is the number of predictions.

from __future__ import annotations

import torch
from torch import Tensor

HIT_CUTOFFS = (10, 50, 200)


def normalized_entropy(logits: Tensor, labels: Tensor) -> float:
    """Mean binary cross-entropy over the entropy of the labels' base rate; below 1 is better than predicting that rate.

    He et al., "Practical lessons from predicting clicks on ads at Facebook", section 3. NaN when all labels are equal.

    Args:
        logits, labels: [M].
    """
    logits, labels = logits.double(), labels.double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    rate = labels.mean()
    return float(loss / -(torch.xlogy(rate, rate) + torch.xlogy(1 - rate, 1 - rate)))


def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve, ties counted half; NaN when all labels are equal. Arguments: [M]."""
    areas, _ = grouped_auc(scores, labels, torch.zeros_like(labels, dtype=torch.int64))
    return float(areas[0])


def gauc(scores: Tensor, labels: Tensor, users: Tensor) -> float:
    """Mean AUC within each user, weighted by the user's predictions; users with equal labels take no part.

    Zhou et al., "Deep interest network", section 6.2. Arguments: [M].
    """
    areas, counts = grouped_auc(scores, labels, users)
    valid = ~areas.isnan()
    return float((areas[valid] * counts[valid]).sum() / counts[valid].sum())


def grouped_auc(scores: Tensor, labels: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """AUC of every group and its number of predictions, [groups] float64, NaN where a group's labels are equal.

    The area is the Mann-Whitney statistic: the mean rank of positives, equal scores sharing the mean of their ranks.
    """
    _, groups = torch.unique(groups, return_inverse=True)
    order = torch.argsort(scores, stable=True)
    order = order[torch.argsort(groups[order], stable=True)]
    scores, labels, groups = scores[order], labels[order].double(), groups[order]
    counts = torch.bincount(groups).double()
    first = torch.cumsum(counts, 0) - counts
    # A run is a stretch of equal scores inside one group.
    starts = torch.ones_like(groups, dtype=torch.bool)
    starts[1:] = (scores[1:] != scores[:-1]) | (groups[1:] != groups[:-1])
    run = torch.cumsum(starts, 0) - 1
    run_length = torch.bincount(run).double()
    run_start = torch.cumsum(run_length, 0) - run_length
    rank = (run_start + (run_length + 1) / 2)[run] - first[groups]
    positives = torch.zeros_like(counts).index_add_(0, groups, labels)
    rank_sum = torch.zeros_like(counts).index_add_(0, groups, rank * labels)
    negatives = counts - positives
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives), counts


def ranking_metrics(logits: Tensor, labels: Tensor, users: Tensor, tasks: tuple[str, ...]) -> dict[str, float]:
    """`ne/<task>`, `auc/<task>`, `gauc/<task>` for each column of logits and labels [M, tasks]."""
    values: dict[str, float] = {}
    for k, task in enumerate(tasks):
        values[f"ne/{task}"] = normalized_entropy(logits[:, k], labels[:, k])
        values[f"auc/{task}"] = auc(logits[:, k], labels[:, k])
        values[f"gauc/{task}"] = gauc(logits[:, k], labels[:, k], users)
    return values


def regression_metrics(predictions: Tensor, labels: Tensor, tasks: tuple[str, ...]) -> dict[str, float]:
    """`mae/<task>` and `mse/<task>` for each column of [M, tasks]: mean absolute and squared error on the task's scale.

    Over the predictions that have a label, which is not NaN; NaN without any.
    """
    errors = predictions.double() - labels.double()
    mae, mse = errors.abs().nanmean(0).tolist(), errors.square().nanmean(0).tolist()
    by_task = zip(tasks, mae, mse, strict=True)
    return {name: value for task, a, s in by_task for name, value in ((f"mae/{task}", a), (f"mse/{task}", s))}


def next_item_metrics(ranks: Tensor) -> dict[str, float]:
    """`hr@K`, `ndcg@K` and `mrr` of the true items' ranks, [M] from 1."""
    ranks = ranks.double()
    values: dict[str, float] = {}
    for k in HIT_CUTOFFS:
        hit = (ranks <= k).double()
        values[f"hr@{k}"] = float(hit.mean())
        values[f"ndcg@{k}"] = float((hit / torch.log2(ranks + 1)).mean())
    return values | {"mrr": float((1 / ranks).mean())}
