import dataclasses
import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ultrarec.kernels import AttentionMask
from ultrarec.model.activations import activation_bytes
from ultrarec.model.config import ModelConfig
from ultrarec.model.flops import Sample
from ultrarec.model.hstu import HSTULayer, HSTUStack
from ultrarec.model.sequences import Limits, Sequences

N = 16
LIMITS = Limits(num_contextual=0, max_history=13, max_targets=3, context_sees_history=True)
WITH_CONTEXT = Limits(num_contextual=1, max_history=12, max_targets=3, context_sees_history=True)
LENGTHS = [5, 0, 1, 9, 16]
TARGETS = [2, 0, 1, 0, 3]
RESEARCH = {"width": 10, "num_layers": 1, "num_heads": 2, "qk_dim": 3, "value_dim": 4}
INDUSTRIAL = {
    **RESEARCH,
    "activation": "u",
    "gating": "concat",
    "norm_affine": True,
    "projection_bias": True,
    "attention_alpha": "rsqrt",
}
SWITCHES = [
    {"activation": "u"},
    {"gating": "concat"},
    {"norm": "group_norm"},
    {"norm_affine": True},
    {"norm": "group_norm", "norm_affine": True},
    {"projection_bias": True},
    {"attention_alpha": "rsqrt"},
    {"attention_alpha": "reciprocal"},
    {"relative_bias": "position"},
    {"relative_bias": "position_time"},
    {"attention": "softmax"},
    {"attention": "softmax", "relative_bias": "position_time", "attention_alpha": "rsqrt"},
    {"gating": "none"},
    {"rope": True, "qk_dim": 4},
    {"window": 3},
    {"window": 2, "full_tail": 3},
    {"window": 2, "prefix": 3},
    {"window": 2, "full_tail": 3, "attention": "softmax"},
]
CASES = [
    pytest.param(RESEARCH, id="research"),
    pytest.param({**RESEARCH, "relative_bias": "position_time"}, id="research with bias"),
    pytest.param(INDUSTRIAL, id="industrial"),
    pytest.param({**INDUSTRIAL, "norm": "group_norm"}, id="industrial with group norm"),
    *(pytest.param({**RESEARCH, **switch}, id=" ".join(map(str, switch.items()))) for switch in SWITCHES),
]


def sequences(lengths=LENGTHS, targets=TARGETS):
    generator = torch.Generator().manual_seed(3)
    times = torch.cat([torch.randint(0, 10**6, (n,), generator=generator).cumsum(0) for n in lengths])
    return Sequences(
        offsets=torch.tensor([0, *itertools.accumulate(lengths)]),
        num_targets=torch.tensor(targets),
        timestamps=times,
        query_timestamps=times + torch.randint(0, 1000, times.shape, generator=generator),
    )


def random_layer(config: ModelConfig, mask: AttentionMask, seed: int = 0) -> HSTULayer:
    """A layer with no parameter at a value that hides it (norm scales of 1, biases of 0)."""
    torch.manual_seed(seed)
    layer = HSTULayer(config, max_seq_len=N, mask=mask).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def is_visible(i, j, length, num_targets, num_contextual, *, window=0, full_tail=0, prefix=0) -> bool:
    history_end = length - num_targets
    if i == j:
        return True
    if i < num_contextual:
        return j < history_end
    if j >= min(i, history_end):
        return False
    # Positions among which contextual tokens are one, and targets are one.
    shared = max(num_contextual - 1, 0)
    query, key, end = min(i, history_end) - shared, max(j - shared, 0), history_end - shared
    is_near = window == 0 or query - key <= window
    sees_all = (full_tail > 0 and query >= end - full_tail) or (prefix > 0 and i >= history_end)
    return is_near or sees_all or (prefix > 0 and j < max(prefix, num_contextual))


def rotated(x: Tensor, position: int) -> Tensor:
    """RoPE as complex numbers: the pair (d, d + D/2) turned by position / 10000^(2 d / D)."""
    half = len(x) // 2
    turn = torch.tensor([position / 10_000 ** (d / half) for d in range(half)], dtype=torch.float64)
    turned = torch.complex(x[:half], x[half:]) * torch.complex(turn.cos(), turn.sin())
    return torch.cat([turned.real, turned.imag])


def layer_of_one_sequence(layer, config, x, *, times, query_times, num_targets, num_contextual):
    """The paper's equations, head by head and query by query."""
    heads, qk, dv = config.num_heads, config.qk_dim, config.value_dim
    p = dict(layer.named_parameters())
    normed = norm(x)
    if config.norm_affine:
        normed = normed * p["norm_input.weight"] + p["norm_input.bias"]
    uvqk = normed @ p["uvqk.weight"].T
    if config.projection_bias:
        uvqk = uvqk + p["uvqk.bias"]
    u, v, q, k = uvqk.split([0 if config.gating == "none" else heads * dv, heads * dv, heads * qk, heads * qk], dim=1)
    u = silu(u)
    if config.activation == "uvqk":
        v, q, k = silu(v), silu(q), silu(k)
    alpha = {"one": 1.0, "rsqrt": qk**-0.5, "reciprocal": 1 / qk}[config.attention_alpha]
    longest, local = layer.max_seq_len, {name: getattr(layer.mask, name) for name in ("window", "full_tail", "prefix")}
    attended = []
    for h in range(heads):
        for i in range(len(x)):
            keys = [j for j in range(len(x)) if is_visible(i, j, len(x), num_targets, num_contextual, **local)]
            scores = []
            for j in keys:
                query, key = q[i, h * qk : (h + 1) * qk], k[j, h * qk : (h + 1) * qk]
                if config.rope:
                    query, key = (
                        rotated(query, min(i, len(x) - num_targets)),
                        rotated(key, min(j, len(x) - num_targets)),
                    )
                score = alpha * (query @ key)
                if config.relative_bias != "none":
                    score = score + p["bias.position_weight"][i - j + longest - 1]
                if config.relative_bias == "position_time":
                    elapsed = max(1.0, abs(float(query_times[i] - times[j])))
                    bucket = int(torch.tensor(elapsed, dtype=torch.float64).log().div(0.301).floor().clamp(0, 128))
                    score = score + p["bias.time_weight"][bucket]
                scores.append(score)
            scores = torch.stack(scores)
            weights = silu(scores) / longest if config.attention == "silu" else scores.exp() / scores.exp().sum()
            attended.append(weights @ v[keys, h * dv : (h + 1) * dv])
    a = torch.stack(attended).view(heads, len(x), dv).transpose(0, 1)
    if config.norm == "group_norm":
        normed_a = norm(a)
        if config.norm_affine:
            normed_a = normed_a * p["norm_attention.head_weight"] + p["norm_attention.head_bias"]
        normed_a = normed_a.flatten(1)
    else:
        normed_a = norm(a.flatten(1))
        if config.norm_affine:
            normed_a = normed_a * p["norm_attention.norm.weight"] + p["norm_attention.norm.bias"]
    gated = normed_a if config.gating == "none" else normed_a * u
    if config.gating == "concat":
        return x + torch.cat([u, a.flatten(1), gated], dim=1) @ p["output.weight"].T
    return x + gated @ p["output.weight"].T + p["output.bias"]


def formula(layer, config, x, seqs, num_contextual):
    outputs = []
    for b, (begin, end) in enumerate(itertools.pairwise(seqs.offsets.tolist())):
        if end > begin:
            outputs.append(
                layer_of_one_sequence(
                    layer,
                    config,
                    x[begin:end],
                    times=seqs.timestamps[begin:end],
                    query_times=seqs.query_timestamps[begin:end],
                    num_targets=int(seqs.num_targets[b]),
                    num_contextual=num_contextual,
                )
            )
    return torch.cat(outputs)


@pytest.mark.parametrize("settings", CASES)
def test_layer_is_the_papers_equations_with_their_gradients(settings):
    config, seqs = ModelConfig(**settings), sequences()
    mask = AttentionMask(window=config.window, full_tail=config.full_tail, prefix=config.prefix)
    layer = random_layer(config, mask)
    x = torch.randn(sum(LENGTHS), config.width, dtype=torch.float64, requires_grad=True)
    got, expected = layer(x, seqs), formula(layer, config, x, seqs, 0)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    inputs = {"x": x, **dict(layer.named_parameters())}
    upstream = torch.randn_like(got)
    got_gradients = torch.autograd.grad(got, inputs.values(), upstream)
    expected_gradients = torch.autograd.grad(expected, inputs.values(), upstream)
    for name, got_gradient, expected_gradient in zip(inputs, got_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got_gradient, expected_gradient, rtol=1e-8, atol=1e-8, msg=f"gradient of {name}")


@pytest.mark.parametrize("attention", ["silu", "softmax"])
def test_contextual_tokens_see_the_history_and_no_target(attention):
    config = ModelConfig(**RESEARCH, attention=attention)
    lengths, targets = [5, 2, 9], [1, 0, 3]
    seqs = sequences(lengths, targets)
    layer = random_layer(config, AttentionMask(num_contextual=2))
    x = torch.randn(sum(lengths), config.width, dtype=torch.float64)
    expected = formula(layer, config, x, seqs, 2)
    torch.testing.assert_close(layer(x, seqs), expected, rtol=1e-9, atol=1e-9)


def test_stack_applies_its_layers_in_order():
    config = ModelConfig(**{**RESEARCH, "num_layers": 3})
    stack = HSTUStack(config, LIMITS).double()
    x, seqs = torch.randn(sum(LENGTHS), config.width, dtype=torch.float64), sequences()
    expected = x
    for layer in stack.layers:
        expected = formula(layer, config, expected, seqs, 0)
    torch.testing.assert_close(stack(x, seqs), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_contextual", [0, 2])
@pytest.mark.parametrize("local", [{}, {"window": 2, "full_tail": 1}, {"window": 1, "prefix": 3}])
def test_the_tail_reads_contextual_tokens_the_newest_events_and_targets_and_the_rest_passes_by(num_contextual, local):
    lengths, targets = [7, 2, 12, 3, 16], [2, 0, 1, 1, 3]
    settings = {**RESEARCH, "num_layers": 2, "relative_bias": "position", **local}
    config = ModelConfig(**settings, tail={"num_layers": 2, "num_events": 4, **local})
    limits = Limits(
        num_contextual=num_contextual, max_history=13 - num_contextual, max_targets=3, context_sees_history=True
    )
    torch.manual_seed(0)
    stack = HSTUStack(config, limits).double()
    seqs = sequences(lengths, targets)
    x = torch.randn(sum(lengths), config.width, dtype=torch.float64, requires_grad=True)
    expected = x
    for layer in stack.layers:
        expected = formula(layer, config, expected, seqs, num_contextual)
    rows = []
    for begin, length, num_targets in zip(seqs.offsets.tolist(), lengths, targets, strict=False):
        kept = [i for i in range(length) if i < num_contextual or i >= length - num_targets - 4]
        rows.append(torch.tensor(kept) + begin)
    chosen = torch.cat(rows)
    cut = Sequences(
        offsets=torch.tensor([0, *itertools.accumulate(map(len, rows))]),
        num_targets=seqs.num_targets,
        timestamps=seqs.timestamps[chosen],
        query_timestamps=seqs.query_timestamps[chosen],
    )
    inner = expected[chosen]
    for layer in stack.tail.layers:
        assert layer.max_seq_len == num_contextual + 4 + 3
        inner = formula(layer, config, inner, cut, num_contextual)
    expected = expected.index_put((chosen,), inner)
    got = stack(x, seqs)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    inputs, upstream = [x, *stack.parameters()], torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


class Operators(TorchDispatchMode):
    """Notes the name of every operator that runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **kwargs or {})


def test_the_tail_parts_and_joins_tokens_by_the_operators_that_have_kernels():
    config = ModelConfig(**RESEARCH, tail={"num_layers": 1, "num_events": 4})
    limits = Limits(num_contextual=2, max_history=11, max_targets=3, context_sees_history=True)
    stack, seqs = HSTUStack(config, limits), sequences([7, 2, 12], [2, 0, 1])
    x = torch.randn(21, config.width, requires_grad=True)
    with Operators() as forward:
        out = stack(x, seqs)
    assert {"ultrarec::jagged_split", "ultrarec::jagged_concat"} <= set(forward.names)
    with Operators() as backward:
        out.sum().backward()
    assert {"ultrarec::jagged_split", "ultrarec::jagged_concat"} <= set(backward.names)


@pytest.mark.parametrize("settings", [{**RESEARCH, "relative_bias": "position_time"}, INDUSTRIAL])
def test_a_tail_of_which_targets_are_read_is_not_joined_and_changes_no_bit_of_them_nor_of_a_gradient(settings):
    config = ModelConfig(**settings, tail={"num_layers": 2, "num_events": 4})
    limits = Limits(num_contextual=2, max_history=11, max_targets=3, context_sees_history=True)
    torch.manual_seed(0)
    joined, of_targets = (
        HSTUStack(config, dataclasses.replace(limits, only_targets=only_targets)) for only_targets in (False, True)
    )
    of_targets.load_state_dict(joined.state_dict())
    seqs = sequences([7, 2, 12, 0, 16], [2, 0, 1, 0, 3])
    x = torch.randn(37, config.width, requires_grad=True)
    expected = joined(x, seqs)[seqs.is_target]
    with Operators() as forward:
        got = of_targets(x, seqs)
    assert "ultrarec::jagged_concat" not in forward.names
    assert torch.equal(got, expected)
    upstream = torch.randn_like(got)
    gradients = [
        torch.autograd.grad(out, [x, *stack.parameters()], upstream)
        for out, stack in ((got, of_targets), (expected, joined))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_tail_longer_than_the_history_is_more_layers():
    torch.manual_seed(0)
    whole = HSTUStack(ModelConfig(**{**RESEARCH, "num_layers": 3}), LIMITS)
    cut = HSTUStack(ModelConfig(**RESEARCH, tail={"num_layers": 2, "num_events": 50}), LIMITS)
    renamed = {
        name: cut.state_dict()[f"tail.layers.{int(name.split('.')[1]) - 1}.{name.split('.', 2)[2]}"]
        if not name.startswith("layers.0")
        else cut.state_dict()[name]
        for name in whole.state_dict()
    }
    whole.load_state_dict(renamed)
    x, seqs = torch.randn(sum(LENGTHS), RESEARCH["width"]), sequences()
    assert torch.equal(whole(x, seqs), cut(x, seqs))


def test_the_residual_stream_is_float32_even_where_tokens_come_in_half():
    config = ModelConfig(**RESEARCH)
    layer = HSTULayer(config, max_seq_len=N, mask=AttentionMask())
    stack = HSTUStack(config, LIMITS)
    x = torch.randn(sum(LENGTHS), config.width).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        u, v, q, k = layer.project(x)
        out = stack(x, sequences())
    assert u.dtype == v.dtype == q.dtype == k.dtype == torch.bfloat16
    assert out.dtype == torch.float32


def test_dropout_acts_on_the_gated_attention_in_training_only():
    config = ModelConfig(**{**RESEARCH, "dropout": 0.5})
    layer = random_layer(config, AttentionMask())
    x, seqs = torch.randn(sum(LENGTHS), config.width, dtype=torch.float64), sequences()
    torch.manual_seed(1)
    trained = layer(x, seqs)
    layer.eval()
    evaluated = layer(x, seqs)
    assert not torch.equal(trained, evaluated)
    torch.testing.assert_close(evaluated, formula(layer, config, x, seqs, 0), rtol=1e-9, atol=1e-9)
    # With the output weights at zero nothing but the residual and the output bias is left: dropout touched neither.
    layer.train()
    with torch.no_grad():
        layer.output.weight.zero_()
    assert torch.equal(layer(x, seqs), x + layer.output.bias)


def test_research_parameters_start_as_published():
    torch.manual_seed(0)
    config = ModelConfig(width=64, num_layers=1, num_heads=2, qk_dim=32, value_dim=32, relative_bias="position_time")
    layer = HSTULayer(config, max_seq_len=500, mask=AttentionMask())
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {
        "uvqk.weight": (256, 64),
        "bias.position_weight": (999,),
        "bias.time_weight": (129,),
        "output.weight": (64, 64),
        "output.bias": (64,),
    }
    assert layer.uvqk.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.bias.position_weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.bias.time_weight.std().item() == pytest.approx(0.02, rel=0.2)
    bound = (6 / (64 + 64)) ** 0.5
    assert 0.98 * bound < layer.output.weight.abs().max().item() <= bound
    assert not layer.output.bias.any()


def test_industrial_parameters_start_as_published():
    torch.manual_seed(0)
    config = ModelConfig(**{**INDUSTRIAL, "width": 64, "qk_dim": 32, "value_dim": 32})
    layer = HSTULayer(config, max_seq_len=8, mask=AttentionMask())
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {
        "norm_input.weight": (64,),
        "norm_input.bias": (64,),
        "uvqk.weight": (256, 64),
        "uvqk.bias": (256,),
        "norm_attention.norm.weight": (64,),
        "norm_attention.norm.bias": (64,),
        "output.weight": (64, 192),
    }
    for weight, fans in ((layer.uvqk.weight, 64 + 256), (layer.output.weight, 64 + 192)):
        bound = (6 / fans) ** 0.5
        assert 0.98 * bound < weight.abs().max().item() <= bound
    assert not layer.uvqk.bias.any()
    assert layer.norm_input.weight.eq(1).all()
    assert not layer.norm_input.bias.any()


def test_group_norm_learns_one_scale_and_shift_per_head():
    config = ModelConfig(**{**INDUSTRIAL, "norm": "group_norm"})
    layer = HSTULayer(config, max_seq_len=8, mask=AttentionMask())
    shapes = {name: tuple(p.shape) for name, p in layer.norm_attention.named_parameters()}
    assert shapes == {"head_weight": (2, 1), "head_bias": (2, 1)}


REMATERIALIZED = [
    pytest.param({**RESEARCH, "relative_bias": "position_time", "dropout": 0.4}, id="research"),
    pytest.param({**INDUSTRIAL, "dropout": 0.4}, id="industrial"),
    pytest.param({**INDUSTRIAL, "norm": "group_norm"}, id="industrial with group norm"),
    pytest.param({**INDUSTRIAL, "dropout": 0.4, "fp8_projections": True}, id="industrial in fp8"),
]


def forward_and_gradients(stack, x, seqs, *, run=None, autocast=False):
    """The output and all gradients of a stack, or of a function that runs it, under a fixed seed of its dropout."""
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = (stack if run is None else run)(x, seqs)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *stack.parameters()])]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", REMATERIALIZED)
def test_rematerialisation_changes_no_bit(settings, autocast):
    results = []
    for rematerialize in (False, True):
        torch.manual_seed(0)
        config = ModelConfig(**{**settings, "num_layers": 2, "rematerialize": rematerialize})
        stack = HSTUStack(config, WITH_CONTEXT)
        x = torch.randn(sum(LENGTHS), config.width)
        results.append(forward_and_gradients(stack, x, sequences(), autocast=autocast))
    assert all(torch.equal(kept, again) for kept, again in zip(*results, strict=True))


@pytest.mark.parametrize("rematerialize", [False, True])
@pytest.mark.parametrize("settings", REMATERIALIZED)
def test_torch_compile_makes_one_graph_of_the_stack(settings, rematerialize):
    torch.compiler.reset()
    torch.manual_seed(0)
    stack = HSTUStack(ModelConfig(**settings, rematerialize=rematerialize), WITH_CONTEXT)
    x, seqs = torch.randn(sum(LENGTHS), RESEARCH["width"]), sequences()
    eager = forward_and_gradients(stack, x, seqs)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    compiled = forward_and_gradients(stack, x, seqs, run=compiled)
    for once, traced in zip(eager, compiled, strict=True):
        torch.testing.assert_close(once, traced, rtol=1e-5, atol=1e-6)


def kept_bytes_per_token(config: ModelConfig, num_tokens: int) -> float:
    """What a layer's forward pass allocates and does not free, its output apart."""
    layer = HSTULayer(config, max_seq_len=num_tokens, mask=AttentionMask())
    x = torch.randn(num_tokens, config.width, requires_grad=True)
    seqs = sequences([num_tokens], [0])
    layer(x, seqs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = layer(x, seqs)
    kept = sum(event.self_cpu_memory_usage for event in profile.events())
    return kept / num_tokens - out.element_size() * config.width


@pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])
@pytest.mark.parametrize("gating", ["norm_times_u", "concat"])
def test_a_rematerialised_layer_keeps_the_attention_output_and_statistics(gating, fp8):
    width, heads, qk, value = 24, 2, 16, 12
    settings = {"width": width, "num_layers": 1, "num_heads": heads, "qk_dim": qk, "value_dim": value, "dropout": 0.3}
    settings["fp8_projections"] = fp8
    num_tokens = 2048
    all_kept = kept_bytes_per_token(ModelConfig(**settings, gating=gating), num_tokens)
    kept = kept_bytes_per_token(ModelConfig(**settings, gating=gating, rematerialize=True), num_tokens)
    attention, mean_and_deviation = heads * value, 2
    uvqk = 2 * heads * (qk + value)
    assert kept == pytest.approx(4 * (attention + mean_and_deviation), abs=1)
    for rematerialize, measured in ((False, all_kept), (True, kept)):
        config = ModelConfig(**settings, gating=gating, rematerialize=rematerialize)
        modelled = activation_bytes(config, Sample(history=num_tokens)) / num_tokens
        # The model of costs counts a layer's input too, which was there before the layer ran.
        assert modelled == pytest.approx(measured + 4 * width, abs=1)
    assert all_kept == pytest.approx(4 * (2 * uvqk + attention + 2 * mean_and_deviation), abs=1)
