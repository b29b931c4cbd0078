"""Orders over rows whose counts are at hand, without a dataset."""

import numpy as np

from ultrarec.data.cost import CostModel
from ultrarec.data.order import Order


def order_of(counts, group_begin, *, sampler, split="train", cost_model=None, **options):
    """An order over rows whose counts are at hand."""
    until = np.concatenate([[0], np.cumsum(sampler.num_samples(counts, split))])
    return Order(
        counts_of=lambda groups: counts.take(
            np.concatenate([np.arange(group_begin[group], group_begin[group + 1]) for group in groups])
        ),
        group_begin=group_begin,
        group_samples=np.diff(until[group_begin]),
        sampler=sampler,
        split=split,
        cost_model=cost_model or pairs_cost(0.1, sampler.max_history),
        **{"shuffle": True, "seed": 0, "stochastic_length": None, **options},
    )


def pairs_cost(pair, max_history):
    """An event costs a token, and each pair of a query and an earlier event or itself `pair` tokens."""
    history = np.arange(max_history + 1.0)
    return CostModel.in_tokens(history + pair * history * (history + 1) / 2, 1 + pair * (history + 1))
