import torch

from ultrarec.model.heads import Experts


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
