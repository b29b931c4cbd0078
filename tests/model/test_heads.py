import functools

import pytest
import torch

from ultrarec.model.config import ModelConfig
from ultrarec.model.heads import Experts, RankingHead, UserVectorHead
from ultrarec.model.mixture import Mixture
from ultrarec.model.sequences import Limits


def test_each_task_mixes_the_experts_by_a_gate_of_its_own():
    torch.manual_seed(0)
    head = Experts(width=5, hidden=4, num_tasks=3, num_experts=2).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    p = dict(head.named_parameters())

    def expert(row, x):
        hidden = p[f"experts.{x}.0.weight"] @ row + p[f"experts.{x}.0.bias"]
        normed = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + 1e-6).sqrt()
        return hidden / (1 + (-(normed * p[f"experts.{x}.1.norm.weight"] + p[f"experts.{x}.1.norm.bias"])).exp())

    expected = []
    for row in z:
        for task in range(3):
            scores = (p[f"gates.{task}.weight"] @ row).exp()
            mixed = sum(score / scores.sum() * expert(row, x) for x, score in enumerate(scores))
            expected.append(p[f"outputs.{task}.weight"] @ mixed + p[f"outputs.{task}.bias"])
    got, expected = head(z), torch.cat(expected).view(6, 3)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    inputs, upstream = [z, *head.parameters()], torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def fusion():
    channels = {name: {"actions": [name], "num_events": 4} for name in ("a", "b")}
    limits = Limits(num_contextual=0, max_history=8, max_targets=1, actions=("a", "b"), context_sees_history=True)
    return Mixture(ModelConfig(width=64, num_layers=1, channels=channels), limits).fuse


@pytest.mark.parametrize(
    "build",
    [
        functools.partial(RankingHead, width=64, hidden=96, num_tasks=8, norm_affine=True),
        functools.partial(RankingHead, width=64, hidden=96, num_tasks=8, norm_affine=True, num_experts=4),
        functools.partial(UserVectorHead, width=64, embedding_dim=48),
        fusion,
    ],
    ids=["ranking", "experts", "user vector", "fusion of channels"],
)
def test_matrices_of_heads_start_as_xavier_biases_at_zero_and_norms_as_none(build):
    torch.manual_seed(0)
    parameters = dict(build().named_parameters())
    matrices = [parameter for parameter in parameters.values() if parameter.dim() == 2]
    assert matrices
    for matrix in matrices:
        bound = (6 / sum(matrix.shape)) ** 0.5
        assert 0.9 * bound < matrix.abs().max().item() <= bound
        # Of a uniform distribution, within five standard errors.
        tolerance = 5 / matrix.numel() ** 0.5
        assert matrix.mean().item() == pytest.approx(0, abs=tolerance * bound / 3**0.5)
        assert matrix.square().mean().item() == pytest.approx(bound**2 / 3, rel=tolerance)
    for name, parameter in parameters.items():
        if parameter.dim() == 1:
            assert parameter.eq(0 if name.endswith("bias") else 1).all(), name
