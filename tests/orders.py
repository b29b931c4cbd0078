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
        cost_model=cost_model or CostModel(pair=0.1),
        **{"shuffle": True, "seed": 0, "stochastic_length": None, **options},
    )
