"""NaN and infinity reach those events alone that see them.

A hidden score is zero, but zero times NaN is not: inside a strip a product carries a broken key to the queries that do
not see it. So results that are not finite are computed again, without what is broken, and those that depend on it are
made NaN.
"""

# T = events of all sequences, H = heads, D = head width

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .operator import Gradients, Problem


class Broken(NamedTuple):
    """Events that hold NaN or infinity, bool `[T, H, 1]`."""

    queries: Tensor
    """In q, or, in the backward, in the gradient of the output or the scale."""
    keys: Tensor
    """In k or v."""


def contained_output(problem: Problem, out: Tensor, forward: Callable[[Problem], Tensor]) -> Tensor:
    """The output, computed again if something broken may have got where it is not seen."""
    broken = _broken(problem, problem.q)
    if not any(events.any() for events in broken):
        return out
    out = forward(_without(problem, broken))
    return out.masked_fill_(broken.queries | (forward(_sight(problem, broken)) > 0), torch.nan)


def contained_gradients(
    problem: Problem,
    dout: Tensor,
    grads: Gradients,
    forward: Callable[[Problem], Tensor],
    backward: Callable[[Problem, Tensor, bool], Gradients],
) -> Gradients:
    """The same for gradients. Those of scale and bias are sums of scores, not products: they need no second time. But a
    scale that is not finite may spoil all of the bias: it is multiplied into the hidden scores of its query, too.
    """
    broken, has_scale = _broken(problem, dout), problem.scale.isfinite()
    # Forward, a scale is multiplied into its query's output alone.
    broken = broken._replace(queries=broken.queries | ~has_scale[:, None, None])
    if not any(events.any() for events in broken):
        return grads
    sight = _sight(problem, broken)
    queries = broken.queries | (forward(sight) > 0)
    keys = broken.keys | (backward(sight, broken.queries.to(sight.v), False)[2] > 0)
    whole = _without(problem, broken)._replace(scale=problem.scale.where(has_scale, 0))
    dq, dk, dv, *_ = backward(whole, dout.masked_fill(broken.queries, 0), False)
    contained = (x.masked_fill_(events, torch.nan) for x, events in ((dq, queries), (dk, keys), (dv, keys)))
    return (*contained, *grads[3:])  # type: ignore[return-value]


def is_finite(x: Tensor) -> bool:
    """Whether all numbers are; a sum that overflows says no, too."""
    return bool(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite())


def _broken(problem: Problem, dout: Tensor) -> Broken:
    q, k, v, dout = (~x.isfinite().all(-1, keepdim=True) for x in (*problem[:3], dout))
    return Broken(queries=q | dout, keys=k | v)


def _without(problem: Problem, broken: Broken) -> Problem:
    return problem._replace(
        q=problem.q.masked_fill(broken.queries, 0),
        k=problem.k.masked_fill(broken.keys, 0),
        v=problem.v.masked_fill(broken.keys, 0),
    )


def _sight(problem: Problem, broken: Broken) -> Problem:
    """All weights are positive: the output is, where a query sees a broken key, and the gradient of v is, for that of
    broken queries as gradient of the output, where one of them sees the key.
    """
    ones_TH1 = torch.ones_like(broken.keys, dtype=torch.float32)
    return problem._replace(
        q=ones_TH1,
        k=ones_TH1,
        v=broken.keys.to(ones_TH1.dtype),
        scale=ones_TH1[:1, 0, 0].expand(len(ones_TH1)),
        alpha=1.0,
        position_weight=None,
        time_weight=None,
        timestamps=None,
        query_timestamps=None,
    )
