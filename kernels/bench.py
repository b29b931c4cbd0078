"""Measures hstu_attention against what its users would write instead, and against the machine's own limit.

Everything that is compared runs in one process, taking turns, and the fastest run of each counts: so other load on the
machine blurs times more than ratios.
"""

# T = events of all sequences, B = sequences, H = heads, D = head width, N = length of the longest sequence

import ctypes
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .hstu_attention import AttentionMask, hstu_attention
from .products import HAS_ONEDNN

NUM_SEQUENCES, NUM_HEADS, HEAD_WIDTH = 8, 4, 64
CAUSAL = AttentionMask()
SEMI_LOCAL = AttentionMask(window=256, full_tail=256)
GEMM_SIZE, GPU_GEMM_SIZE = 2048, 8192
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SECONDS, TURN_SECONDS = 3.0, 0.2
"""How long the variants of one comparison take turns, at least; each gets three, of at least the second number."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Options of mallopt(3)."""
PADDED_TENSORS = 5
"""Tensors of B * H * N * N elements that the padded formulation holds at its peak."""


class WrongResults(Exception):
    """The operator differs from its definition, so its speed means nothing."""


@dataclass(frozen=True)
class Comparison:
    """Forward and backward over sequences of N / 4 to N events, causal, without bias."""

    length: int
    """N."""
    dtype: str
    device: str
    """ "cpu" or "cuda"."""
    milliseconds: float
    padded_milliseconds: float | None
    """The padded dense formulation; None where it does not fit in memory."""
    gflops: float
    """Of the visible pairs, two products forward and five backward, per second."""
    gemm_gflops: float
    """Of a large torch.mm: on a CPU of float32, on a GPU of the dtype."""
    onednn_gflops: float | None
    """Of the same product in oneDNN, which torch.mm does not use; None where there is none."""

    @property
    def speedup(self) -> float | None:
        """Over the padded dense formulation."""
        return None if self.padded_milliseconds is None else self.padded_milliseconds / self.milliseconds

    @property
    def gemm_share(self) -> float:
        """Of the rate of torch.mm."""
        return self.gflops / self.gemm_gflops

    @property
    def onednn_share(self) -> float | None:
        """Of the rate of oneDNN."""
        return None if self.onednn_gflops is None else self.gflops / self.onednn_gflops


@dataclass(frozen=True)
class Scaling:
    """Forward and backward over one sequence of a length and one of twice that length."""

    length: int
    causal_milliseconds: float
    semi_local_milliseconds: float
    doubled_semi_local_milliseconds: float


@dataclass(frozen=True)
class Memory:
    """Peak of forward and backward over one sequence, in a process of its own."""

    length: int
    peak_bytes: int
    tensor_bytes: int
    """q, k, v, the output and the gradients of all four."""


class Problem:
    """Random inputs; calling it runs forward and backward."""

    def __init__(
        self, lengths: list[int], dtype: torch.dtype, *, num_heads: int = NUM_HEADS, device: str = "cpu"
    ) -> None:
        self.lengths, self.max_seq_len, self.device = lengths, max(lengths), device
        self.offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
        shape = (sum(lengths), num_heads, HEAD_WIDTH)
        self.q, self.k, self.v, self.dout = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
        for x in (self.q, self.k, self.v):
            x.requires_grad_()

    def run(self, attend: Callable[["Problem"], Tensor]) -> list[Tensor]:
        """The output and the gradients of q, k and v."""
        out = attend(self)
        return [out.detach(), *torch.autograd.grad(out, (self.q, self.k, self.v), self.dout)]

    @property
    def useful_gflop(self) -> float:
        """What the visible pairs of causal attention take, forward and backward."""
        pairs = sum(n * (n + 1) // 2 for n in self.lengths)
        return 7 * 2 * pairs * self.q.shape[1] * self.q.shape[2] / 1e9


def jagged(problem: Problem, mask: AttentionMask = CAUSAL, backend: str | None = None) -> Tensor:
    """The operator that is measured, in the implementation for the device unless another is named."""
    return hstu_attention(
        problem.q,
        problem.k,
        problem.v,
        problem.offsets,
        max_seq_len=problem.max_seq_len,
        mask=mask,
        backend=backend or ("cpu" if problem.device == "cpu" else "triton"),
    )


def padded_dense(problem: Problem) -> Tensor:
    """What is usual in plain torch: pad to `[B, H, N, N]`, mask after SiLU, leave the backward to autograd."""
    q_BHND, k_BHND, v_BHND = (_pad(x, problem) for x in (problem.q, problem.k, problem.v))
    weights_BHNN = F.silu(q_BHND @ k_BHND.mT * HEAD_WIDTH**-0.5) / problem.max_seq_len
    causal_NN = torch.ones(problem.max_seq_len, problem.max_seq_len).to(weights_BHNN).tril_()
    out_BNHD = (weights_BHNN * causal_NN @ v_BHND).transpose(1, 2)
    return torch.cat([out_BNHD[b, :n] for b, n in enumerate(problem.lengths)])


def check_results(dtype: str, device: str) -> None:
    """Compare outputs and gradients, of problems like those measured, with the definition in float64.

    Raises:
        WrongResults: an error is above twice that of the definition computed in dtype.
    """
    for lengths, mask in (([300, 17, 0, 1], CAUSAL), ([700], AttentionMask(window=64, full_tail=32))):
        _check(Problem(lengths, DTYPES[dtype], num_heads=2, device=device), mask)


def check_kernels() -> None:
    """The same for the Triton kernels in bfloat16 without a GPU: interpreted, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(_check_interpreted)


def compare(length: int, dtype: str, *, device: str, available_bytes: int) -> Comparison:
    """Time the operator, the padded dense formulation and a matrix product."""
    torch.manual_seed(0)
    lengths = torch.randint(length // 4, length + 1, (NUM_SEQUENCES - 1,)).tolist()
    problem = Problem([length, *lengths], DTYPES[dtype], device=device)
    variants: dict[str, Callable[[], object]] = {**_gemms(problem), "jagged": lambda: problem.run(jagged)}
    padded_bytes = PADDED_TENSORS * NUM_SEQUENCES * NUM_HEADS * length**2 * problem.q.element_size()
    if padded_bytes < available_bytes:
        variants["padded"] = lambda: problem.run(padded_dense)
    seconds = fastest(variants, device, SECONDS)
    gemm_gflop = 2 * (GEMM_SIZE if device == "cpu" else GPU_GEMM_SIZE) ** 3 / 1e9
    return Comparison(
        length=length,
        dtype=dtype,
        device=device,
        milliseconds=seconds["jagged"] * 1e3,
        padded_milliseconds=seconds["padded"] * 1e3 if "padded" in seconds else None,
        gflops=problem.useful_gflop / seconds["jagged"],
        gemm_gflops=gemm_gflop / seconds["gemm"],
        onednn_gflops=gemm_gflop / seconds["onednn"] if "onednn" in seconds else None,
    )


def scale(length: int, dtype: str, device: str) -> Scaling:
    """Time semi-local attention at a length and at twice that, and causal attention, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds = pool.apply(_scaling_seconds, (length, dtype, device, torch.get_num_threads(), SECONDS))
    return Scaling(length, *(seconds[name] * 1e3 for name in ("causal", "semi_local", "doubled")))


def measure_memory(length: int, device: str) -> Memory:
    """Measure the peak of one sequence of two heads in float32; on a CPU in a process of its own."""
    tensor_bytes = 8 * length * 2 * HEAD_WIDTH * 4
    if device != "cpu":
        return Memory(length, _peak_bytes_on_gpu(length, device), tensor_bytes)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(_peak_bytes, (length, torch.get_num_threads()))
    return Memory(length, peak, tensor_bytes)


def fastest(variants: dict[str, Callable[[], object]], device: str, least_seconds: float) -> dict[str, float]:
    """The seconds of the fastest run of each variant; they take turns of two runs or more, the first to warm."""
    best = dict.fromkeys(variants, float("inf"))
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - start < least_seconds:
        for name, run in variants.items():
            best[name] = min(best[name], *_turn(run, device))
        rounds += 1
    return best


def _turn(run: Callable[[], object], device: str) -> list[float]:
    """The seconds of several runs in a row."""
    run()
    seconds: list[float] = []
    start = time.perf_counter()
    while not seconds or time.perf_counter() - start < TURN_SECONDS:
        seconds.append(_seconds_on_cpu(run) if device == "cpu" else _seconds_on_gpu(run))
    return seconds


def _seconds_on_cpu(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _seconds_on_gpu(run: Callable[[], object]) -> float:
    """Between two marks in the stream: so what the host does beside the GPU's work costs nothing."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _check(problem: Problem, mask: AttentionMask, backend: str | None = None) -> None:
    exact = _defined(problem, torch.float64, mask)
    plain = _defined(problem, problem.q.dtype, mask)
    got = problem.run(partial(jagged, mask=mask, backend=backend))
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), got, plain, exact, strict=True):
        error, bound = (a - c).abs().max().item(), (2 * (b - c).abs().max() + 1e-6 * c.abs().max()).item()
        if not error <= bound:
            raise WrongResults(
                f"{name} of lengths {problem.lengths} with {mask}: error {error:.1e} is above {bound:.1e}"
            )


def _check_interpreted() -> None:
    # Before the first import of Triton, which decides then.
    os.environ["TRITON_INTERPRET"] = "1"
    for mask in (CAUSAL, AttentionMask(window=20, full_tail=10)):
        _check(Problem([70, 33, 0, 1], torch.bfloat16, num_heads=1), mask, "triton")


def _scaling_seconds(length: int, dtype: str, device: str, num_threads: int, least_seconds: float) -> dict[str, float]:
    torch.set_num_threads(num_threads)
    if device == "cpu":
        _keep_freed_memory()
    once, twice = (Problem([n], DTYPES[dtype], device=device) for n in (length, 2 * length))
    return fastest(
        {
            "semi_local": lambda: once.run(partial(jagged, mask=SEMI_LOCAL)),
            "doubled": lambda: twice.run(partial(jagged, mask=SEMI_LOCAL)),
            "causal": lambda: once.run(jagged),
        },
        device,
        least_seconds,
    )


def _keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next tensor.

    By default glibc returns tensors of more than 32 MB to the system at once, and every run pays for their pages again:
    on a virtual machine 16 ms for 33 MB, against 2 ms. Doubling a length across that border would measure the border.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _pad(x_THD: Tensor, problem: Problem) -> Tensor:
    """`[B, H, N, D]`."""
    rows = [F.pad(x, (0, 0, 0, 0, 0, problem.max_seq_len - len(x))) for x in torch.split(x_THD, problem.lengths)]
    return torch.stack(rows).transpose(1, 2)


def _defined(problem: Problem, dtype: torch.dtype, mask: AttentionMask) -> list[Tensor]:
    """The definition, in dtype, of inputs of the same value."""
    other = Problem(problem.lengths, dtype, num_heads=problem.q.shape[1], device=problem.device)
    for name in ("q", "k", "v"):
        setattr(other, name, getattr(problem, name).detach().to(dtype).requires_grad_())
    other.dout = problem.dout.to(dtype)
    return other.run(
        lambda x: hstu_attention(x.q, x.k, x.v, x.offsets, max_seq_len=x.max_seq_len, mask=mask, backend="reference")
    )


def _gemms(problem: Problem) -> dict[str, Callable[[], object]]:
    """A large product by torch.mm, and on a CPU that has it by oneDNN."""
    on_cpu = problem.device == "cpu"
    size, dtype = (GEMM_SIZE, torch.float32) if on_cpu else (GPU_GEMM_SIZE, problem.q.dtype)
    a, b, out = (torch.randn(size, size, dtype=dtype, device=problem.device) for _ in range(3))
    gemms: dict[str, Callable[[], object]] = {"gemm": lambda: torch.mm(a, b, out=out)}
    if on_cpu and HAS_ONEDNN:
        gemms["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return gemms


def _peak_bytes_on_gpu(length: int, device: str) -> int:
    """Of the tensors of a run, inputs included."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    Problem([length], torch.float32, num_heads=2, device=device).run(jagged)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_bytes(length: int, num_threads: int) -> int:
    """How far the memory of this process rises, above what libraries and a small problem take."""
    torch.set_num_threads(num_threads)
    Problem([512], torch.float32, num_heads=2).run(jagged)
    before = _status_bytes("VmRSS")
    Problem([length], torch.float32, num_heads=2).run(jagged)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    # getrusage would give the peak of the process that started this one, if that is higher.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
