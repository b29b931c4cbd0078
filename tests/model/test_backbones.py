"""Each backbone against its published equations, sequence by sequence and query by query in float64."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from ultrarec.model.backbones import BACKBONES, TARGET_ONLY, build_backbone
from ultrarec.model.config import ModelConfig
from ultrarec.model.sequences import Limits, Sequences

LENGTHS = [7, 0, 1, 9, 14, 3]
TARGETS = [2, 0, 1, 0, 3, 3]
LIMITS = Limits(num_contextual=2, max_history=10, max_targets=3, context_sees_history=False)
N = LIMITS.max_seq_len
SMALL = {"width": 6, "num_layers": 2, "num_heads": 2, "qk_dim": 4, "value_dim": 3, "ffn_width": 5}


@pytest.fixture
def seqs():
    generator = torch.Generator().manual_seed(3)
    times = torch.cat([torch.randint(0, 10**6, (n,), generator=generator).cumsum(0) for n in LENGTHS])
    return Sequences(
        offsets=torch.tensor([0, *itertools.accumulate(LENGTHS)]),
        num_targets=torch.tensor(TARGETS),
        timestamps=times,
        query_timestamps=times + torch.randint(0, 1000, times.shape, generator=generator),
    )


def norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class Equations:
    """The equations of each backbone for one sequence [n, E], whose last `num_targets` tokens are targets."""

    def __init__(self, backbone, config, times, query_times, num_targets):
        self.p = dict(backbone.named_parameters())
        self.config = config
        self.times, self.query_times = times, query_times
        self.num_targets = num_targets

    def linear(self, x, name):
        x = x @ self.p[f"{name}.weight"].T
        return x + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else x

    def affine(self, x, name):
        x = x * self.p[f"{name}.weight"]
        return x + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else x

    def swiglu(self, x, name):
        gate = self.linear(x, f"{name}.gate")
        return self.linear(gate / (1 + (-gate).exp()) * self.linear(x, f"{name}.up"), f"{name}.down")

    def heads(self, x):
        return x.unflatten(1, (self.config.num_heads, -1)).transpose(0, 1)

    def visible(self, n):
        end = n - self.num_targets
        return torch.tensor([[i == j or j < min(i, end) for j in range(n)] for i in range(n)]).view(n, n)

    def softmax(self, q, k, v):
        scores = (self.heads(q) @ self.heads(k).transpose(1, 2)) / self.config.qk_dim**0.5
        weights = scores.exp() * self.visible(len(q))
        return (weights / weights.sum(-1, keepdim=True) @ self.heads(v)).transpose(0, 1).flatten(1)

    def sasrec(self, x):
        for i in range(self.config.num_layers):
            name = f"layers.{i}"
            query = self.affine(norm(x), f"{name}.norm_query")
            read = self.softmax(
                self.linear(query, f"{name}.query"), self.linear(x, f"{name}.key"), self.linear(x, f"{name}.value")
            )
            y = self.affine(norm(query + self.linear(read, f"{name}.output")), f"{name}.norm_ffn")
            x = y + self.linear(self.linear(y, f"{name}.hidden").clamp(min=0), f"{name}.ffn_output")
        return x

    def rotated(self, x):
        """Each head's columns (d, d + D/2) as a complex number, turned by position / 10000^(2 d / D)."""
        position = torch.arange(len(x)).clamp(max=len(x) - self.num_targets).double()
        half = self.config.qk_dim // 2
        turn = position[:, None, None] / 10_000 ** (torch.arange(half).double() / half)
        parts = x.unflatten(1, (self.config.num_heads, 2, half))
        turned = torch.complex(parts[:, :, 0], parts[:, :, 1]) * torch.complex(turn.cos(), turn.sin())
        return torch.cat([turned.real, turned.imag], dim=2).flatten(1)

    def llama(self, x):
        c = self.config
        for i in range(c.num_layers):
            name = f"layers.{i}"
            qkv = self.linear(self.affine(rms(x), f"{name}.norm_attention"), f"{name}.qkv")
            q, k, v = qkv.split([c.num_heads * c.qk_dim, c.num_heads * c.qk_dim, c.num_heads * c.value_dim], dim=1)
            x = x + self.linear(self.softmax(self.rotated(q), self.rotated(k), v), f"{name}.output")
            x = x + self.swiglu(self.affine(rms(x), f"{name}.norm_ffn"), f"{name}.ffn")
        return self.affine(rms(x), "norm")

    def fuxi_alpha(self, x):
        c = self.config
        value, qk = c.num_heads * c.value_dim, c.num_heads * c.qk_dim
        i, j = torch.arange(len(x))[:, None], torch.arange(len(x))
        elapsed = (self.query_times[:, None] - self.times).abs().clamp(min=1).double()
        bucket = (elapsed.log() / 0.301).long().clamp(max=128)
        for layer in range(c.num_layers):
            name = f"layers.{layer}"
            u, v, q, k = F.silu(self.linear(rms(x), f"{name}.uvqk")).split([3 * value, value, qk, qk], dim=1)
            channels = [
                self.p[f"{name}.bias.position_weight"][i - j + N - 1].expand(c.num_heads, -1, -1),
                self.p[f"{name}.bias.time_weight"][bucket].expand(c.num_heads, -1, -1),
                F.silu(self.heads(q) @ self.heads(k).transpose(1, 2)) / N,
            ]
            read = [(weights * self.visible(len(x))) @ self.heads(v) for weights in channels]
            a = torch.cat(read, dim=2).transpose(0, 1).flatten(1)
            y = x + self.linear(u * rms(a), f"{name}.output")
            x = y + self.swiglu(rms(y), f"{name}.ffn")
        return x

    def prelu(self, x, name):
        return torch.where(x > 0, x, self.p[f"{name}.weight"] * x)

    def din(self, x):
        end, out = len(x) - self.num_targets, list(x)
        for i in range(end, len(x)):
            interest = torch.zeros_like(x[i])
            for h in x[:end]:
                pair = torch.cat([h, x[i], h - x[i], h * x[i]])
                hidden = self.prelu(self.linear(pair, "activation_unit.0"), "activation_unit.1")
                interest = interest + self.linear(hidden, "activation_unit.2") * h
            hidden = self.prelu(self.linear(torch.cat([interest, x[i]]), "output.0"), "output.1")
            out[i] = self.linear(hidden, "output.3")
        return torch.stack(out)

    def stca(self, x):
        c, end, out = self.config, len(x) - self.num_targets, list(x)
        for i in range(end, len(x)):
            query, read = self.affine(norm(self.swiglu(x[i], "target.0")), "target.1"), []
            for layer in range(c.num_layers):
                name = f"layers.{layer}"
                keys = self.affine(norm(self.swiglu(x[:end], f"{name}.history.0")), f"{name}.history.1")
                attended = x.new_zeros(c.num_heads, c.value_dim)
                if end:
                    q = self.linear(query, f"{name}.query").view(c.num_heads, 1, c.qk_dim)
                    k, v = (self.heads(self.linear(keys, f"{name}.{part}")) for part in ("key", "value"))
                    weights = ((q * k).sum(-1) / c.qk_dim**0.5).exp()
                    attended = (weights[:, :, None] * v).sum(1) / weights.sum(1, keepdim=True)
                read.append(self.linear(attended.flatten(), f"{name}.output"))
                query = self.linear(torch.cat([*read, x[i]]), f"fuse.{layer}")
            out[i] = query
        return torch.stack(out)


def make(name, **settings):
    torch.manual_seed(0)
    layers = {"num_layers": 1} if name == "din" else {}
    config = ModelConfig(backbone=name, **{**SMALL, **layers, **settings})
    return config, build_backbone(config, LIMITS)


OTHERS = sorted(BACKBONES.keys() - {"hstu"})


@pytest.mark.parametrize("name", OTHERS)
def test_a_backbone_is_its_equations_with_their_gradients(name, seqs):
    config, backbone = make(name)
    backbone.double()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(sum(LENGTHS), config.width, dtype=torch.float64, requires_grad=True)
    expected = []
    for b, (begin, end) in enumerate(itertools.pairwise(seqs.offsets.tolist())):
        if end > begin:
            times = seqs.timestamps[begin:end], seqs.query_timestamps[begin:end]
            equations = Equations(backbone, config, *times, TARGETS[b])
            out = getattr(equations, name)(x[begin:end])
            expected.append(out[len(out) - TARGETS[b] :] if name in TARGET_ONLY else out)
    got, expected = backbone(x, seqs), torch.cat(expected)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    inputs, upstream = {"x": x, **dict(backbone.named_parameters())}, torch.randn_like(got)
    for key, a, b in zip(
        inputs,
        torch.autograd.grad(got, inputs.values(), upstream),
        torch.autograd.grad(expected, inputs.values(), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m, key=key: f"gradient of {key}: {m}")


@pytest.mark.parametrize("total_targets", [None, sum(TARGETS)])
@pytest.mark.parametrize("name", sorted(BACKBONES.keys() - set(TARGET_ONLY)))
def test_where_the_head_reads_targets_alone_a_backbone_gives_theirs(name, total_targets, seqs):
    config, backbone = make(name)
    of_targets = build_backbone(config, dataclasses.replace(LIMITS, only_targets=True))
    of_targets.load_state_dict(backbone.state_dict())
    x = torch.randn(sum(LENGTHS), SMALL["width"])
    is_target = [i >= n - targets for n, targets in zip(LENGTHS, TARGETS, strict=True) for i in range(n)]
    expected = backbone(x, seqs)[torch.tensor(is_target)]
    assert torch.equal(of_targets(x, dataclasses.replace(seqs, total_targets=total_targets)), expected)


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_dropout_acts_in_training_only(name, seqs):
    _, backbone = make(name, dropout=0.4)
    x = torch.randn(sum(LENGTHS), SMALL["width"])
    trained = [backbone(x, seqs) for _ in range(2)]
    assert not torch.equal(*trained)
    backbone.eval()
    assert torch.equal(backbone(x, seqs), backbone(x, seqs))


PARAMETERS = {
    # 6 * 2 * (4 + 4 + 3) projections with biases, 2 norms, the output, the FFN
    "sasrec": 2 * ((6 + 1) * 22 + 2 * 12 + (6 + 1) * 6 + (6 + 1) * 5 + (5 + 1) * 6),
    # norms of 6, projections and a SwiGLU of three matrices without biases, a last norm
    "llama": 2 * (2 * 6 + 6 * 22 + 6 * 6 + 3 * 6 * 5) + 6,
    # u of three channels, the biases of position and time, W_0 with a bias, a SwiGLU
    "fuxi_alpha": 2 * (6 * (18 + 6 + 8 + 8) + 2 * N - 1 + 129 + (18 + 1) * 6 + 3 * 6 * 5),
    "din": (24 + 1) * 5 + 1 + (5 + 1) + (12 + 1) * 5 + 1 + (5 + 1) * 6,
    # the target's transform; a transform, four projections per layer; fusions of 2 and 3 vectors
    "stca": (90 + 12) + 2 * (90 + 12 + 6 * (8 + 8 + 6) + 6 * 6) + (12 + 1) * 6 + (18 + 1) * 6,
    # u, v, q, k and an output with a bias
    "hstu": 2 * (6 * (6 + 6 + 8 + 8) + (6 + 1) * 6),
}


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_a_backbone_has_the_parameters_of_its_equations(name):
    _, backbone = make(name)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", OTHERS)
def test_matrices_start_as_xavier_and_biases_at_zero(name):
    torch.manual_seed(0)
    config = ModelConfig(backbone=name, width=64, num_layers=1, num_heads=2, ffn_width=48)
    backbone = build_backbone(config, LIMITS)
    for key, parameter in backbone.named_parameters():
        if parameter.dim() == 2 and parameter.numel() > 1000 and not key.endswith("uvqk.weight"):
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.95 * bound < parameter.abs().max().item() <= bound, key
        elif key.endswith("uvqk.weight") or "bias." in key:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.3), key
        elif key.endswith(".bias"):
            assert not parameter.any(), key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "sasrec", "window": 3}, r"model\.window=3 belongs to backbone='hstu', .* remove it"),
        ({"backbone": "llama", "rope": True}, r"model\.rope=True belongs to backbone='hstu'"),
        ({"backbone": "llama", "qk_dim": 3}, r"model\.qk_dim=3 is odd; .* make it even"),
        ({"rope": True, "qk_dim": 3}, r"model\.qk_dim=3 is odd"),
        ({"backbone": "din"}, r"model\.num_layers=2, but backbone='din' has one layer; set it to 1"),
        ({"full_tail": 3}, r"model\.full_tail=3 exempts tokens .* set model\.window"),
        (
            {"tail": {"num_layers": 1, "num_events": 4, "prefix": 2}},
            r"model\.tail\.prefix=2 .* set model\.tail\.window",
        ),
        ({"gating": "none", "activation": "u"}, r"model\.activation='u' activates a gate .* use 'uvqk'"),
    ],
)
def test_settings_that_a_backbone_would_ignore_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SMALL, **settings})


def test_head_widths_follow_from_width_and_heads():
    config = ModelConfig(width=48, num_layers=1, num_heads=4)
    assert (config.qk_dim, config.value_dim, config.ffn_width) == (12, 12, 48)
