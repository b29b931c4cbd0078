"""What several threads must not change."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ultrarec.kernels import AttentionMask, RelativeBias, hstu_attention
from ultrarec.kernels.bench import measure_memory


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def problem(lengths: list[int], *, biased: bool) -> list[torch.Tensor]:
    """The output and all gradients."""
    torch.manual_seed(0)
    num_events, n = sum(lengths), max(lengths)
    leaves = [torch.randn(num_events, 3, 16, requires_grad=True) for _ in range(3)]
    bias = None
    if biased:
        weights = [torch.randn(2 * n - 1, requires_grad=True), torch.randn(9, requires_grad=True)]
        bias = RelativeBias(*weights, torch.arange(num_events) ** 2)
        leaves += weights
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    mask = AttentionMask(window=400, full_tail=50)
    out = hstu_attention(*leaves[:3], offsets, max_seq_len=n, mask=mask, bias=bias)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("lengths", [[2000], [1500, 900, 40, 30, 0, 20]], ids=["one sequence", "long and short"])
def test_the_number_of_threads_changes_no_bit_without_bias(threads, lengths):
    threads(1)
    alone = problem(lengths, biased=False)
    threads(3)
    together = problem(lengths, biased=False)
    assert torch.get_num_threads() == 3
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("lengths", [[2000], [1500, 900, 40, 30, 0, 20]], ids=["one sequence", "long and short"])
def test_repeated_calls_on_the_same_number_of_threads_give_the_same_bits(threads, lengths):
    threads(3)
    first, second = (problem(lengths, biased=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_threads_that_start_later_are_not_slowed_down(threads):
    threads(3)
    problem([2000], biased=False)

    def threads_of_a_new_thread() -> int:
        torch.ones(8).sum()
        return torch.get_num_threads()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(threads_of_a_new_thread).result() == 3


def test_inference_mode_works_on_several_threads(threads):
    threads(2)
    q, k, v = (torch.randn(1500, 2, 32) for _ in range(3))
    offsets = torch.tensor([0, 1500])
    expected = hstu_attention(q, k, v, offsets, max_seq_len=1500)
    with torch.inference_mode():
        assert torch.equal(hstu_attention(q, k, v, offsets, max_seq_len=1500), expected)


def test_a_batch_changed_in_place_is_not_mistaken_for_the_one_before():
    torch.manual_seed(0)
    q, k, v = (torch.randn(40, 2, 8) for _ in range(3))
    offsets, times = torch.tensor([0, 10, 40]), torch.arange(40)
    bias = RelativeBias(time_weight=torch.randn(9), timestamps=times)
    hstu_attention(q, k, v, offsets, max_seq_len=40, bias=bias)
    offsets[1] = 25
    times *= 7
    got, exact = (hstu_attention(q, k, v, offsets, max_seq_len=40, bias=bias, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(got, exact)


def test_memory_of_a_long_sequence_stays_below_six_times_its_tensors():
    memory = measure_memory(16384, "cpu")
    assert memory.peak_bytes > memory.tensor_bytes / 2, "the inputs alone"
    assert memory.peak_bytes < 6 * memory.tensor_bytes
