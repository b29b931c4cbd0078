"""The Triton backend of hstu_attention: on the GPU, or in the interpreter if TRITON_INTERPRET=1 was set from the start.

Without either all is skipped here, and test_triton_interpreter.py runs it. Random problems are in the file next to it.
"""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from attention_cases import MASKS, Case, assert_as_exact_as_plain_torch, attend, bias_of, inputs_of
from attention_cases import outputs_and_gradients as outputs_and_gradients_of
from triton_device import DEVICE, INTERPRETED, needs_triton

from ultrarec.kernels import AttentionMask, hstu_attention
from ultrarec.kernels.hstu_attention.operator import Problem
from ultrarec.kernels.hstu_attention.triton_kernels.scores import Events, Sequence, row_pointers
from ultrarec.kernels.hstu_attention.triton_launch import sequences_of
from ultrarec.kernels.hstu_attention.triton_padding import LARGEST_EVENT_STRIDE, padded

# In the interpreter tiles are of 16 or 32 queries and keys: these lengths are at and off their edges.
LENGTHS = (0, 1, 31, 33, 0, 7, 80, 64)

pytestmark = needs_triton


def case_of(**fields: object) -> Case:
    return Case(**{"lengths": LENGTHS, "num_heads": 1, "dqk": 8, "dv": 8, "device": DEVICE, **fields})


def assert_exact(**fields: object) -> None:
    assert_as_exact_as_plain_torch(case_of(**fields), "triton")


@pytest.mark.usefixtures("nan_filled_empty")
class TestAgainstTheDefinition:
    @pytest.mark.parametrize("targets", [False, True], ids=["history", "targets"])
    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    def test_every_mask_with_both_biases(self, mask: AttentionMask, targets: bool) -> None:
        assert_exact(lengths=(80, 0, 33), mask=mask, targets=targets, bias="position time query", scale="tensor")

    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    def test_every_mask_without_bias(self, mask: AttentionMask) -> None:
        assert_exact(mask=mask)

    @pytest.mark.parametrize("bias", ["position", "time", "time query", "position time"])
    def test_each_part_of_the_bias_alone(self, bias: str) -> None:
        assert_exact(lengths=(33, 1, 50), num_heads=2, bias=bias)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    @pytest.mark.parametrize("bias", ["", "position time query"], ids=["unbiased", "biased"])
    def test_half_precision(self, dtype: torch.dtype, bias: str) -> None:
        assert_exact(lengths=(80, 33), dtype=dtype, bias=bias, scale="tensor", mask=MASKS["all"], targets=True)

    @pytest.mark.parametrize("lengths", [(0,), (0, 0, 0), (1,), (1, 1, 1), (16,), (32,), (65, 5, 64)])
    def test_lengths_at_the_edges_of_tiles(self, lengths: tuple[int, ...]) -> None:
        assert_exact(lengths=lengths, bias="position time", scale="tensor")

    @pytest.mark.parametrize(("dqk", "dv"), [(1, 1), (5, 33), (25, 25), (50, 96), (20, 200), (256, 128)])
    def test_head_widths_that_differ_and_are_no_power_of_two(self, dqk: int, dv: int) -> None:
        assert_exact(lengths=(40, 3), num_heads=3, dqk=dqk, dv=dv)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    @pytest.mark.parametrize("everything", [False, True], ids=["causal", "all masks, both biases"])
    @pytest.mark.parametrize("width", [64, 96, 128, 256])
    def test_head_widths_of_published_models(self, width: int, everything: bool, dtype: torch.dtype) -> None:
        rest = {"mask": MASKS["all"], "targets": True, "bias": "position time query"} if everything else {}
        assert_exact(lengths=(70,), dqk=width, dv=width, dtype=dtype, **rest)

    @pytest.mark.parametrize("scale", ["default", "number", "tensor"])
    def test_every_form_of_scale(self, scale: str) -> None:
        assert_exact(scale=scale)

    def test_max_seq_len_beyond_the_longest_sequence(self) -> None:
        assert_exact(lengths=(40, 3), slack=50, bias="position", mask=MASKS["contextual"])

    def test_sequences_shorter_than_the_contextual_tokens_see_only_themselves(self) -> None:
        mask = AttentionMask(num_contextual=4)
        assert_exact(lengths=(1, 2, 3, 4, 9), mask=mask, targets=True, bias="position")
        assert_exact(lengths=(1, 2, 3, 4, 9), mask=mask, bias="position")

    @pytest.mark.parametrize("num_contextual", [31, 40])
    def test_more_contextual_tokens_than_a_tile_has_queries(self, num_contextual: int) -> None:
        assert_exact(lengths=(100, 35), mask=AttentionMask(num_contextual=num_contextual, window=20, prefix=50))

    def test_more_targets_than_a_tile_has_queries(self) -> None:
        lengths, num_targets = (100, 70), torch.tensor([70, 70], device=DEVICE)
        for mask in (MASKS["causal"], MASKS["all"]):
            case = case_of(lengths=lengths, mask=mask)
            inputs = inputs_of(case)
            offsets = torch.tensor([0, 100, 170], device=DEVICE)
            outs = [
                hstu_attention(
                    inputs["q"], inputs["k"], inputs["v"], offsets, max_seq_len=100, num_targets=num_targets, mask=mask,
                    backend=backend,
                )
                for backend in ("reference", "triton")
            ]  # fmt: skip
            torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def test_strided_views_give_the_same_result_as_copies() -> None:
    torch.manual_seed(0)
    offsets = torch.tensor([0, 40, 41, 100], device=DEVICE)
    packed = torch.randn(100, 4, 2, 16, device=DEVICE, requires_grad=True)
    _, v, q, k = packed.unbind(1)
    viewed = hstu_attention(q, k, v, offsets, max_seq_len=100, backend="triton")
    copies = (x.contiguous() for x in (q, k, v))
    copied = hstu_attention(*copies, offsets, max_seq_len=100, backend="triton")
    assert not q.is_contiguous()
    assert torch.equal(viewed, copied)
    dout = torch.randn(16, 2, 100, device=DEVICE).permute(2, 1, 0)
    strided, plain = torch.autograd.grad(viewed, packed, dout), torch.autograd.grad(copied, packed, dout.contiguous())
    assert torch.equal(strided[0], plain[0])


def test_repeated_calls_give_the_same_bits() -> None:
    case = case_of(lengths=(70, 9), bias="position time query", scale="tensor", targets=True, mask=MASKS["all"])
    first, second = (outputs_and_gradients_of(case, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_int32_offsets_give_the_same_result() -> None:
    case = case_of(lengths=(40, 3))
    wide, narrow = (
        outputs_and_gradients_of(replace(case, offsets_dtype=dtype), "triton") for dtype in (torch.int64, torch.int32)
    )
    assert all(torch.equal(wide[name], narrow[name]) for name in wide)


def test_nan_in_one_sequence_stays_there() -> None:
    case = case_of(lengths=(40, 37, 35), num_heads=2)
    inputs = inputs_of(case)
    clean = attend(case, inputs, "triton")
    for x in inputs.values():
        x[40:77] = float("nan")
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    out = attend(case, inputs, "triton")
    assert torch.equal(out[:40], clean[:40])
    assert torch.equal(out[77:], clean[77:])
    for grad in torch.autograd.grad(out.sum(), list(inputs.values())):
        assert grad[:40].isfinite().all()
        assert grad[77:].isfinite().all()
        assert grad[40:77].isnan().all()


def test_programs_start_with_the_longest_sequence() -> None:
    offsets = torch.tensor([0, 3, 3, 90, 100], device=DEVICE)
    x = torch.zeros(100, 1, 8, device=DEVICE)
    scale = torch.ones(1, device=DEVICE).expand(100)
    problem = Problem(x, x, x, scale, None, None, None, None, offsets, None, 90, 0.3, [0, 0, 0, 0])
    assert sequences_of(problem, 32).order.tolist() == [2, 3, 0, 1]


@triton.jit
def addresses_kernel(events, first, start, head, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    sequence = Sequence(tl.cast(start, tl.int64), 0, 0, head, 0)
    pointers = row_pointers(events, sequence, first, ROWS, COLUMNS)
    places = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + places, pointers.to(tl.int64) - events.data.to(tl.int64))


@pytest.mark.parametrize("event_stride", [4096, LARGEST_EVENT_STRIDE])
@pytest.mark.parametrize("head_stride", [128, 2**31 - 1, 2**33])
def test_addresses_beyond_32_bits_are_exact(event_stride: int, head_stride: int) -> None:
    """In the interpreter an integer that overflows on the way fails, too."""
    x, out = torch.zeros(1, device=DEVICE), torch.zeros(256, 16, dtype=torch.int64, device=DEVICE)
    addresses_kernel[(1,)](Events(x, event_stride, head_stride), 1000, 2**30, 7, out, 256, 16)
    rows, columns = torch.arange(256)[:, None], torch.arange(16)[None, :]
    elements = (2**30 + 1000 + rows) * event_stride + 7 * head_stride + columns
    assert torch.equal(out.cpu(), elements * x.element_size())


def test_events_too_far_apart_for_32_bits_within_a_tile_are_copied() -> None:
    x = torch.zeros(32, device=DEVICE).as_strided((1, 2, 16), (16 * (LARGEST_EVENT_STRIDE // 16 + 1), 16, 1))
    assert padded(x).stride() == (32, 16, 1)


@pytest.mark.parametrize("width", [16, 48, 50])
def test_unaligned_tensors_give_the_same_result_as_aligned_ones(width: int) -> None:
    """The first element 4 bytes behind an aligned address, and strides that no 16-byte load takes."""
    torch.manual_seed(0)
    buffers = torch.randn(3, 40 * 2 * (width + 1) + 1, device=DEVICE)
    strided = [x[1:].view(40, 2, width + 1)[..., :width] for x in buffers]
    offsets = torch.tensor([0, 33, 40], device=DEVICE)
    results = []
    for inputs in (strided, [x.contiguous() for x in strided]):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = hstu_attention(*inputs, offsets, max_seq_len=33, backend="triton")
        # Summed up, the gradient of the output is one element for all: its strides are zero.
        results.append([out, *torch.autograd.grad(out.sum(), inputs)])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


def test_the_operator_passes_opcheck() -> None:
    case = case_of(lengths=(5, 0, 7), bias="position time query", scale="tensor")
    inputs = {name: x.requires_grad_() for name, x in inputs_of(case).items()}
    relative = bias_of(case, inputs)
    assert relative is not None
    hstu_attention(
        inputs["q"], inputs["k"], inputs["v"], torch.tensor([0, 12], device=DEVICE), max_seq_len=12, backend="triton"
    )
    times = (relative.timestamps, relative.query_timestamps)
    args = (inputs["q"], inputs["k"], inputs["v"], inputs["scale"], *list(inputs.values())[3:5], *times)
    counts = (torch.tensor([0, 5, 5, 12], device=DEVICE), torch.tensor([2, 0, 1], device=DEVICE))
    torch.library.opcheck(torch.ops.ultrarec.hstu_attention_triton.default, (*args, *counts, 7, 0.25, [3, 1, 1, 1]))


def test_torch_compile_makes_one_graph_with_the_same_result() -> None:
    torch.compiler.reset()
    offsets = torch.tensor([0, 5, 5, 40, 43], device=DEVICE)

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return hstu_attention(2 * q, k, v, offsets, max_seq_len=40, backend="triton").relu()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for function in (model, compiled):
        torch.manual_seed(0)
        inputs = [torch.randn(43, 1, 8, device=DEVICE, requires_grad=True) for _ in range(3)]
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out.sum(), inputs)])
    assert all(torch.equal(eager, traced) for eager, traced in zip(*results, strict=True))


def test_float64_is_refused_with_a_remedy() -> None:
    x = torch.ones(2, 1, 4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="backend='triton' takes no float64; choose backend='cpu'"):
        hstu_attention(x, x, x, torch.tensor([0, 2], device=DEVICE), max_seq_len=2, backend="triton")


def test_heads_above_256_are_refused_with_a_remedy() -> None:
    x = torch.ones(2, 1, 257, device=DEVICE)
    with pytest.raises(ValueError, match="takes heads up to 256 wide, not 257; choose backend='cpu'"):
        hstu_attention(x, x, x, torch.tensor([0, 2], device=DEVICE), max_seq_len=2, backend="triton")


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU values are not read")
def test_the_interpreter_checks_values() -> None:
    x = torch.ones(2, 1, 4)
    with pytest.raises(ValueError, match="sequence 0 has 2 events, outside"):
        hstu_attention(x, x, x, torch.tensor([0, 2]), max_seq_len=1, backend="triton")
