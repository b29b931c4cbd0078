"""The schedule and the dense update against plain loops."""

import math

import pytest
import torch
from torch import nn
from torchrec.optim.keyed import KeyedOptimizer

from ultrarec.trainer.config import OptimizerConfig
from ultrarec.trainer.optimizer import Optimizer, lr_factor

TOTAL = 20


class Tables(KeyedOptimizer):
    """Stands where the tables' optimizer does, and keeps the rates that it is handed over."""

    def __init__(self, lr: float) -> None:
        weight = torch.zeros(1)
        super().__init__({"table": weight}, {}, [{"params": [weight], "lr": lr}])
        self.rates: list[float] = []

    def zero_grad(self, set_to_none: bool = False) -> None:
        self.rates.append(self.param_groups[0]["lr"])


def build(config=None, *, values=(0.5, -0.25, 2.0), sparse_lr=0.05):
    parameter = nn.Parameter(torch.tensor(values, dtype=torch.float64))
    optimizer = Optimizer(
        config or OptimizerConfig(), dense={"w": parameter}, sparse=Tables(sparse_lr), total_steps=TOTAL
    )
    return optimizer, parameter


def adamw_by_hand(w, gradients, rates, config):
    """Loshchilov and Hutter, algorithm 2, element by element."""
    (beta1, beta2), m, v = config.betas, [0.0] * len(w), [0.0] * len(w)
    for t, (gradient, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = math.sqrt(sum(g * g for g in gradient))
        clip = min(1.0, config.clip_norm / (norm + 1e-6)) if config.clip_norm else 1.0
        for k in range(len(w)):
            g = gradient[k] * clip
            w[k] -= lr * config.weight_decay * w[k]
            m[k] = beta1 * m[k] + (1 - beta1) * g
            v[k] = beta2 * v[k] + (1 - beta2) * g * g
            w[k] -= lr * (m[k] / (1 - beta1**t)) / (math.sqrt(v[k] / (1 - beta2**t)) + config.eps)
    return w


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 12: 1.0, 20: 1.0, 99: 1.0}),
        ("linear", {0: 0.25, 3: 1.0, 4: 1.0, 12: 0.55, 20: 0.1, 99: 0.1}),
        ("cosine", {0: 0.25, 3: 1.0, 4: 1.0, 8: 0.1 + 0.45 * (1 + math.cos(math.pi / 4)), 12: 0.55, 20: 0.1, 99: 0.1}),
    ],
)
def test_rates_rise_linearly_then_follow_the_decay_to_its_end(decay, expected):
    config = OptimizerConfig(warmup_steps=4, decay=decay, final_lr_ratio=0.1)
    for step, factor in expected.items():
        assert lr_factor(step, config=config, total_steps=TOTAL) == pytest.approx(factor, rel=1e-12), step


def test_a_warmup_longer_than_the_run_is_only_a_rise():
    config = OptimizerConfig(warmup_steps=40, decay="cosine")
    assert [lr_factor(step, config=config, total_steps=TOTAL) for step in (0, 19)] == [1 / 40, 20 / 40]


@pytest.mark.parametrize("config", [
    OptimizerConfig(lr=0.1),
    OptimizerConfig(lr=0.1, weight_decay=0.3, betas=(0.7, 0.8), eps=1e-3),
    OptimizerConfig(lr=0.1, clip_norm=0.5, warmup_steps=3, decay="linear"),
])  # fmt: skip
def test_dense_weights_follow_adamw_with_clipping_and_schedule(config):
    optimizer, parameter = build(config)
    gradients = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rates, norms = [], []
    for step, gradient in enumerate(gradients):
        rates.append(optimizer.begin(step))
        parameter.grad = gradient.clone()
        norms.append(float(optimizer.update()))
        assert parameter.grad is None
    expected = adamw_by_hand([0.5, -0.25, 2.0], gradients.tolist(), rates, config)
    torch.testing.assert_close(parameter.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    assert norms == pytest.approx(gradients.norm(dim=1).tolist(), rel=1e-6)


def test_tables_receive_the_same_schedule_as_dense_weights():
    optimizer, _ = build(OptimizerConfig(lr=0.1, warmup_steps=4, decay="linear"), sparse_lr=0.05)
    rates = [optimizer.begin(step) for step in range(TOTAL)]
    assert optimizer.sparse.rates == pytest.approx([rate / 2 for rate in rates], rel=1e-12)


def test_gradients_are_scaled_before_their_norm_is_taken():
    optimizer, parameter = build()
    optimizer.begin(0)
    parameter.grad = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    assert float(optimizer.update(gradient_scale=2.0)) == pytest.approx(10.0)


def test_state_tensors_are_allocated_before_the_first_step_and_live_after_it():
    optimizer, parameter = build()
    state = optimizer.state_tensors()
    assert {name: float(value.sum()) for name, value in state.items()} == {
        "w/step": 0,
        "w/exp_avg": 0,
        "w/exp_avg_sq": 0,
    }
    parameter.grad = torch.ones_like(parameter)
    optimizer.begin(0)
    optimizer.update()
    assert float(state["w/step"]) == 1
    assert float(state["w/exp_avg"].sum()) > 0


def test_filling_the_state_tensors_of_a_fresh_optimizer_continues_the_old_one():
    gradients = torch.randn(6, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def step(optimizer, parameter, gradient):
        optimizer.begin(0)
        parameter.grad = gradient.clone()
        optimizer.update()

    whole, expected = build()
    for gradient in gradients:
        step(whole, expected, gradient)
    first, half = build()
    for gradient in gradients[:3]:
        step(first, half, gradient)
    second, parameter = build(values=half.tolist())
    for name, tensor in second.state_tensors().items():
        tensor.copy_(first.state_tensors()[name])
    for gradient in gradients[3:]:
        step(second, parameter, gradient)
    assert torch.equal(parameter, expected)
