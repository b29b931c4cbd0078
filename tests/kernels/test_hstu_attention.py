"""hstu_attention against its definition in float64: outputs, every gradient, and what surrounds the numbers."""

# T = events of all sequences, H = heads, Dqk and Dv = head widths, N = max_seq_len

from dataclasses import replace

import pytest
import torch
from attention_cases import (
    MASKS,
    Case,
    assert_as_exact_as_plain_torch,
    attend,
    bias_of,
    inputs_of,
    outputs_and_gradients,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ultrarec.kernels import AttentionMask, RelativeBias, hstu_attention


@pytest.mark.usefixtures("nan_filled_empty")
class TestAgainstTheDefinition:
    @pytest.mark.parametrize("targets", [False, True], ids=["history", "targets"])
    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    def test_every_mask_with_both_biases(self, mask: AttentionMask, targets: bool) -> None:
        assert_as_exact_as_plain_torch(Case(mask=mask, targets=targets, bias="position time query", scale="tensor"))

    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    def test_every_mask_without_bias(self, mask: AttentionMask) -> None:
        assert_as_exact_as_plain_torch(Case(mask=mask, dqk=8, dv=24))

    @pytest.mark.parametrize("bias", ["position", "time", "time query", "position time"])
    def test_each_part_of_the_bias_alone(self, bias: str) -> None:
        assert_as_exact_as_plain_torch(Case(bias=bias))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    @pytest.mark.parametrize("bias", ["", "position time query"], ids=["unbiased", "biased"])
    def test_half_precision(self, dtype: torch.dtype, bias: str) -> None:
        assert_as_exact_as_plain_torch(Case(dtype=dtype, bias=bias, scale="tensor", mask=MASKS["all"], targets=True))

    @pytest.mark.parametrize("lengths", [(0,), (0, 0, 0), (1,), (1, 1, 1), (63,), (65,), (256,), (257,), (513, 5, 512)])
    def test_lengths_at_the_edges_of_tiles(self, lengths: tuple[int, ...]) -> None:
        assert_as_exact_as_plain_torch(Case(lengths=lengths, num_heads=1, bias="position time", scale="tensor"))

    def test_many_short_sequences(self) -> None:
        lengths = tuple(int(n) for n in torch.randint(0, 41, (150,), generator=torch.Generator().manual_seed(3)))
        assert_as_exact_as_plain_torch(Case(lengths=lengths, bias="position time query", targets=True))

    @pytest.mark.parametrize("num_heads", [1, 3])
    @pytest.mark.parametrize(("dqk", "dv"), [(1, 1), (5, 33), (64, 16)])
    def test_head_widths_that_differ(self, num_heads: int, dqk: int, dv: int) -> None:
        assert_as_exact_as_plain_torch(Case(num_heads=num_heads, dqk=dqk, dv=dv, bias="position"))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
    @pytest.mark.parametrize("everything", [False, True], ids=["causal", "all masks, both biases"])
    @pytest.mark.parametrize("width", [50, 96, 128, 256])
    def test_head_widths_of_published_models(self, width: int, everything: bool, dtype: torch.dtype) -> None:
        rest = {"mask": MASKS["all"], "targets": True, "bias": "position time query"} if everything else {}
        assert_as_exact_as_plain_torch(Case(lengths=(70,), dqk=width, dv=width, dtype=dtype, **rest))

    @pytest.mark.parametrize("scale", ["default", "number", "tensor"])
    def test_every_form_of_scale(self, scale: str) -> None:
        assert_as_exact_as_plain_torch(Case(scale=scale))

    def test_max_seq_len_beyond_the_longest_sequence(self) -> None:
        assert_as_exact_as_plain_torch(Case(slack=50, bias="position"))

    def test_sequences_shorter_than_the_contextual_tokens_see_only_themselves(self) -> None:
        case = Case(lengths=(1, 2, 3, 4, 9), mask=AttentionMask(num_contextual=4), targets=True, bias="position")
        assert_as_exact_as_plain_torch(case)
        assert_as_exact_as_plain_torch(replace(case, targets=False))

    def test_gradients_of_the_blocked_backward_match_finite_differences(self) -> None:
        case = Case(
            lengths=(5, 0, 3), dqk=2, dv=3, targets=True, bias="position time", scale="tensor", mask=MASKS["all"]
        )
        inputs = {name: x.double().requires_grad_() for name, x in inputs_of(case).items()}

        def of(*tensors: torch.Tensor) -> torch.Tensor:
            return attend(case, dict(zip(inputs, tensors, strict=True)), "cpu")

        assert torch.autograd.gradcheck(of, tuple(inputs.values()))


SHORT = st.integers(0, 40)
LENGTHS = st.lists(SHORT, min_size=1, max_size=6)
LONG = st.builds(lambda short, long: (*short, long), st.lists(SHORT, max_size=2), st.integers(250, 420))
COUNTS = st.integers(0, 12)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    # The largest error of few 16-bit numbers is too much a matter of luck to be compared.
    widths = st.sampled_from([1, 5, 16, 25, 32] if dtype is torch.float32 else [16, 25, 32])
    mask = AttentionMask(*(draw(st.sampled_from([0, draw(COUNTS)])) for _ in range(4)))
    return Case(
        lengths=tuple(draw(LENGTHS if draw(st.integers(0, 9)) else LONG)),
        num_heads=draw(st.integers(1, 3)),
        dqk=draw(widths),
        dv=draw(widths),
        slack=draw(st.integers(0, 9)),
        mask=mask,
        targets=draw(st.booleans()),
        bias=draw(st.sampled_from(["", "position", "time", "time query", "position time", "position time query"])),
        scale=draw(st.sampled_from(["default", "number", "tensor"])),
        dtype=dtype,
    )


@pytest.mark.usefixtures("nan_filled_empty")
@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(cases())
def test_random_problems_are_as_exact_as_plain_torch(case: Case) -> None:
    assert_as_exact_as_plain_torch(case, "cpu")


def test_int32_offsets_give_the_same_result() -> None:
    case = Case(bias="time")
    wide, narrow = (outputs_and_gradients(replace(case, offsets_dtype=t), "cpu") for t in (torch.int64, torch.int32))
    assert all(torch.equal(wide[name], narrow[name]) for name in wide)


def test_strided_views_give_the_same_result_as_copies() -> None:
    torch.manual_seed(0)
    offsets = torch.tensor([0, 40, 41, 300])
    packed = torch.randn(300, 4, 2, 16, requires_grad=True)
    _, v, q, k = packed.unbind(1)
    viewed = hstu_attention(q, k, v, offsets, max_seq_len=300)
    copied = hstu_attention(q.contiguous(), k.contiguous(), v.contiguous(), offsets, max_seq_len=300)
    assert not q.is_contiguous()
    assert torch.equal(viewed, copied)
    dout = torch.randn(16, 2, 300).permute(2, 1, 0)
    strided, plain = torch.autograd.grad(viewed, packed, dout), torch.autograd.grad(copied, packed, dout.contiguous())
    assert torch.equal(strided[0], plain[0])


def test_repeated_calls_give_the_same_bits() -> None:
    case = Case(bias="position time query", scale="tensor", targets=True, mask=MASKS["all"])
    first, second = (outputs_and_gradients(case, "cpu") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_sequence_gets_the_same_output_whatever_else_is_in_the_batch() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(100, 2, 8) for _ in range(3))
    together = hstu_attention(q, k, v, torch.tensor([0, 30, 60, 100]), max_seq_len=64)
    alone = hstu_attention(q[30:60], k[30:60], v[30:60], torch.tensor([0, 30]), max_seq_len=64)
    torch.testing.assert_close(together[30:60], alone, rtol=1e-6, atol=1e-7)


def test_later_events_change_nothing_before_them() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(300, 2, 8) for _ in range(3))
    offsets = torch.tensor([0, 300])
    before = hstu_attention(q, k, v, offsets, max_seq_len=300)
    for x in (q, k, v):
        x[200:] = 1e6
    after = hstu_attention(q, k, v, offsets, max_seq_len=300)
    assert torch.equal(before[:200], after[:200])


def test_nothing_of_size_n_by_n_is_allocated() -> None:
    n = 2048
    q, k, v = (torch.randn(n, 1, 4, requires_grad=True) for _ in range(3))
    weights = (torch.randn(2 * n - 1, requires_grad=True), torch.randn(9, requires_grad=True))
    bias = RelativeBias(*weights, torch.arange(n))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = hstu_attention(q, k, v, torch.tensor([0, n]), max_seq_len=n, bias=bias, mask=AttentionMask(window=99))
        out.sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 4 * n < largest < n * n / 2, "the largest allocation in bytes, far from one byte per pair"


@pytest.mark.parametrize("bias", ["", "position time query"], ids=["unbiased", "biased"])
def test_torch_compile_makes_one_graph_with_the_same_result(bias: str) -> None:
    torch.compiler.reset()
    case = Case(lengths=(5, 0, 70, 3), bias=bias, scale="tensor", targets=True)

    def model(inputs: dict[str, torch.Tensor], offsets: torch.Tensor, timestamps: torch.Tensor) -> torch.Tensor:
        bias = None
        if "time_weight" in inputs:
            bias = RelativeBias(inputs["position_weight"], inputs["time_weight"], timestamps)
        mask = AttentionMask(window=9, full_tail=2)
        q, k, v, scale = (inputs[name] for name in ("q", "k", "v", "scale"))
        return hstu_attention(2 * q, k, v, offsets, max_seq_len=70, mask=mask, bias=bias, scale=scale).relu()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for function in (model, compiled):
        inputs = {name: x.requires_grad_() for name, x in inputs_of(case).items()}
        out = function(inputs, torch.tensor([0, 5, 5, 75, 78]), torch.arange(78))
        results.append([out, *torch.autograd.grad(out.sum(), list(inputs.values()))])
    assert all(torch.equal(eager, traced) for eager, traced in zip(*results, strict=True))


@pytest.mark.parametrize("bias", ["", "position time query"], ids=["unbiased", "biased"])
def test_the_operator_passes_opcheck(bias: str) -> None:
    case = Case(lengths=(5, 0, 7), bias=bias, scale="tensor")
    inputs = {name: x.requires_grad_() for name, x in inputs_of(case).items()}
    relative = bias_of(case, inputs)
    times = (None, None) if relative is None else (relative.timestamps, relative.query_timestamps)
    weights = (inputs.get("position_weight"), inputs.get("time_weight"))
    args = (inputs["q"], inputs["k"], inputs["v"], inputs["scale"], *weights, *times)
    rest = (torch.tensor([0, 5, 5, 12]), torch.tensor([2, 0, 1]), 7, 0.25, [3, 1, 1, 1])
    torch.library.opcheck(torch.ops.ultrarec.hstu_attention_cpu.default, args + rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_around_the_op_changes_nothing(dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(20, 2, 8).to(dtype).requires_grad_() for _ in range(3)]
    offsets = torch.tensor([0, 13, 20])
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = hstu_attention(*inputs, offsets, max_seq_len=13)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    for name, plain, cast in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert plain.dtype == cast.dtype == dtype
        assert torch.equal(plain, cast), name


@pytest.mark.parametrize("length", [40, 400], ids=["short", "long"])
def test_autocast_around_forward_and_backward_changes_no_bit(length: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(length, 2, 16, requires_grad=True) for _ in range(3))
    dout, offsets = torch.randn(length, 2, 16), torch.tensor([0, length])

    def outputs_and_gradients(*, autocast: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = hstu_attention(q, k, v, offsets, max_seq_len=length)
            return [out, *torch.autograd.grad(out, (q, k, v), dout)]

    outside, inside = outputs_and_gradients(autocast=False), outputs_and_gradients(autocast=True)
    for name, a, b in zip(("out", "dq", "dk", "dv"), inside, outside, strict=True):
        assert torch.equal(a, b), name
