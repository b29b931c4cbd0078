"""Updates: AdamW on the dense weights, and one schedule for their learning rate and that of the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.optim.keyed import KeyedOptimizer

from ..embeddings.replicated import ReplicatedTables
from .config import OptimizerConfig


def lr_factor(step: int, *, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of step `step` (from 0) over the configured one: linear warm-up, then the decay."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    span = max(total_steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    floor = config.final_lr_ratio
    shapes = {
        "constant": 1.0,
        "linear": floor + (1 - floor) * (1 - progress),
        "cosine": floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)),
    }
    return shapes[config.decay]


class Optimizer:
    """Both optimizers of a run: the dense one stepped here, the sparse one inside the tables' backward pass.

    Args:
        dense: dense parameters by name.
        sparse: the sharded tables' fused optimizer; only its learning rate is set from here.
        replicated: the tables that every rank holds, likewise.
        total_steps: where the schedule ends.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        *,
        dense: Mapping[str, nn.Parameter],
        sparse: KeyedOptimizer,
        replicated: ReplicatedTables | None = None,
        total_steps: int,
    ) -> None:
        self.config = config
        self.total_steps = total_steps
        self.dense = dict(dense)
        self.sparse = sparse
        self.adamw = torch.optim.AdamW(
            self.dense.values(), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        self._sparse_groups = [*sparse.param_groups, *(replicated.param_groups if replicated is not None else ())]
        self._sparse_lrs = [group["lr"] for group in self._sparse_groups]

    def begin(self, step: int) -> float:
        """Set every learning rate for `step`; tables apply theirs during the backward pass. Returns the dense one."""
        factor = lr_factor(step, config=self.config, total_steps=self.total_steps)
        for group in self.adamw.param_groups:
            group["lr"] = self.config.lr * factor
        for group, lr in zip(self._sparse_groups, self._sparse_lrs, strict=True):
            group["lr"] = lr * factor
        # fbgemm reads the rate of a param group only here.
        self.sparse.zero_grad()
        return self.config.lr * factor

    def update(self, *, gradient_scale: float = 1.0) -> Tensor:
        """Clip, update the dense weights and clear their gradients; returns the gradient norm before clipping."""
        gradients = [p.grad for p in self.dense.values() if p.grad is not None]
        if gradient_scale != 1.0:
            torch._foreach_mul_(gradients, gradient_scale)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.dense.values(), self.config.clip_norm, norm)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def state_tensors(self) -> dict[str, Tensor]:
        """AdamW's live state as `parameter/key` -> tensor; zeros where nothing has been stepped yet."""
        for parameter in self.dense.values():
            if not self.adamw.state[parameter]:
                self.adamw.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        return {
            f"{name}/{key}": value
            for name, parameter in self.dense.items()
            for key, value in self.adamw.state[parameter].items()
        }


class Deferred(torch.optim.Optimizer):
    """What the training pipeline gets as its optimizer: it does nothing, `train_step` updates after accumulating."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(0)], {})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Leave the update to `Optimizer.update`."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Leave the gradients to `Optimizer.update`."""
