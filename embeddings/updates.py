"""How the rows of a whole table learn from a step's gradient, in plain torch; sharded tables learn inside fbgemm."""

# R = rows of a table, D = stored columns

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .config import EmbeddingOptimizerConfig

State = dict[str, Tensor]
Update = Callable[..., None]


def adagrad_state(weight_RD: Tensor) -> State:
    """`momentum1` [R], under fbgemm's name: sum over updates of the mean over columns of the squared gradient."""
    return {"momentum1": weight_RD.new_zeros(len(weight_RD))}


def rowwise_adagrad(
    weight_RD: Tensor,
    state: State,
    gradient_RD: Tensor,
    *,
    is_looked_up_R: Tensor,
    lr: float,
    config: EmbeddingOptimizerConfig,
) -> None:
    """One step of row-wise Adagrad as fbgemm's, in place: a row that nobody looked up stays as it is."""
    squares_R = state["momentum1"]
    squares_R += gradient_RD.square().mean(1)
    if config.weight_decay:
        weight_RD[is_looked_up_R] *= 1 - lr * config.weight_decay
    weight_RD -= gradient_RD * (lr / (squares_R.sqrt() + config.eps))[:, None]


def adamw_state(weight_RD: Tensor) -> State:
    """Moments `exp_avg` and `exp_avg_sq` [R, D], and `num_updates` [R]: rows that a table grew by begin from 0."""
    return {
        "exp_avg": torch.zeros_like(weight_RD),
        "exp_avg_sq": torch.zeros_like(weight_RD),
        "num_updates": weight_RD.new_zeros(len(weight_RD)),
    }


def adamw(
    weight_RD: Tensor,
    state: State,
    gradient_RD: Tensor,
    *,
    is_looked_up_R: Tensor,
    lr: float,
    config: EmbeddingOptimizerConfig,
) -> None:
    """One step of AdamW (arXiv 1711.05101, algorithm 2) on every row, in place, as torch's on a dense gradient.

    A row that nobody looked up has the gradient 0, and goes on by its first moment.
    """
    first_RD, second_RD, count_R = state["exp_avg"], state["exp_avg_sq"], state["num_updates"]
    beta1, beta2 = config.betas
    count_R += 1
    first_RD.lerp_(gradient_RD, 1 - beta1)
    second_RD.mul_(beta2).addcmul_(gradient_RD, gradient_RD, value=1 - beta2)
    # In float64, where 1 - 0.999 is not 0.00100004.
    count_R = count_R.double()
    step_R, scale_R = lr / (1 - beta1**count_R), (1 - beta2**count_R).rsqrt()
    if config.weight_decay:
        weight_RD *= 1 - lr * config.weight_decay
    denominator_RD = second_RD.sqrt().mul_(scale_R.float()[:, None]).add_(config.eps)
    weight_RD -= torch.div(first_RD, denominator_RD, out=denominator_RD).mul_(step_R.float()[:, None])


UPDATES: dict[str, tuple[Callable[[Tensor], State], Update]] = {
    "rowwise_adagrad": (adagrad_state, rowwise_adagrad),
    "adamw": (adamw_state, adamw),
}
"""By `embeddings.optimizer.kind`: the state that a table begins with, and the step."""
