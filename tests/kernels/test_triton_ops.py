"""The Triton kernels around the attention without a GPU: interpreted, and compiled ahead for each architecture."""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import triton
from fused_ops import INTERPRETED
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ultrarec.kernels.backends import WIDEST_NORM
from ultrarec.kernels.fp8.triton import quantize_launch
from ultrarec.kernels.gated_output import triton as gated_output
from ultrarec.kernels.jagged.triton import jagged_launch
from ultrarec.kernels.launching import Launch
from ultrarec.kernels.linear.triton import linear_launch
from ultrarec.kernels.norm_uvqk import triton as norm_uvqk
from ultrarec.kernels.position_time_encoding.triton import encode_launch, sums_launch

HERE = Path(__file__).parent
INTERPRETED_FILES = (
    "test_norm_uvqk.py",
    "test_gated_output.py",
    "test_jagged.py",
    "test_position_time_encoding.py",
    "test_fp8.py",
)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
    "gfx950": (GPUTarget("hip", "gfx950", 64), 160),
}
"""Each with the KiB of shared memory that a program may have."""
NATIVE_FP8 = {"sm_90": "e4m3.e4m3", "sm_100": "kind::f8f6f4", "gfx950": "f8f6f4"}
"""Those whose matrix instructions read e4m3, with the part of their names that says so."""
MATRIX_INSTRUCTION = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma",
    "sm_100": "tcgen05.mma",
    "gfx942": "mfma",
    "gfx950": "mfma",
}
ON_CPU_ONLY = ("widen", "rounds")
"""Arguments that are true for the interpreter alone."""
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.float8_e4m3fn: "*fp8e4nv"}


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_the_kernels_keep_every_promise_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton", *(str(HERE / file) for file in INTERPRETED_FILES)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, check=False, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 80


def launches() -> dict[str, Launch]:
    """Every kernel at the width of the industrial models: bfloat16, 4 heads of 128, tokens of 512 in float32."""
    num_tokens, width, heads, dim = 1000, 512, 4, 128
    values = heads * dim
    x, y = torch.empty(num_tokens, width), torch.empty(num_tokens, 3 * values, dtype=torch.bfloat16)
    normed, uvqk = x.bfloat16(), torch.empty(num_tokens, 4 * values, dtype=torch.bfloat16)
    weight, stats = torch.empty(4 * values, width, dtype=torch.bfloat16), torch.empty(num_tokens, 1)
    affine, parts = (torch.empty(width), torch.empty(width)), torch.empty(2, 8, width)
    u, a, seed = y[:, :values].contiguous(), y[:, :values].reshape(-1, heads, dim), torch.zeros(1, dtype=torch.int64)
    gate = gated_output._arguments(u, a, *affine, seed, stats, stats, y, 0.3)
    backward = gated_output.gate_backward_launch(gate, y, u, a, scale=1.4)
    rows, table = torch.zeros(num_tokens, dtype=torch.int64), torch.empty(100, width)
    offsets, moved = torch.zeros(65, dtype=torch.int64), {"right_prefix": 2}
    return {
        "norm": norm_uvqk.norm_launch(x, *affine, normed, stats, stats, 1e-6),
        "norm_backward": norm_uvqk.norm_backward_launch(normed, x, *affine, stats, stats, x, normed, parts),
        "uvqk": linear_launch(normed, weight, weight[:, 0].contiguous(), uvqk, before_TA=uvqk[:, :values].contiguous()),
        "output": linear_launch(y, torch.empty(width, 3 * values).bfloat16(), affine[0], x, residual_TN=x, scale=1.4),
        "gate": gated_output.gate_launch(gate, eps=1e-6),
        "gate_backward": backward,
        "jagged_concat": jagged_launch(x, x[:400], x[400:], offsets, offsets, **moved, joins=True),
        "jagged_split": jagged_launch(x, x[:400], x[400:], offsets, offsets, **moved, joins=False),
        "encode": encode_launch(x, table, rows, table, rows, x, scale=22.6),
        "row_sums": sums_launch(x, rows, rows[:100], rows[:100], table),
        "row_sums_of_parts": sums_launch(x, None, rows[:100], rows[:100], table),
    }


def unusual_launch(name: str) -> Launch:
    """A product at the width of the public configuration, where no row starts at a multiple of 16 bytes; or the
    backward of the concatenated gate, or of the norm, with as many columns as they take.
    """
    num_tokens, width, values = 1000, 50, WIDEST_NORM
    if name == "norm":
        x, affine = torch.empty(num_tokens, values), (torch.empty(values),) * 2
        stats, parts = torch.empty(num_tokens, 1), torch.empty(2, 8, values)
        return norm_uvqk.norm_backward_launch(x.bfloat16(), x, *affine, stats, stats, x, x.bfloat16(), parts)
    if name == "gate":
        y, affine = torch.empty(num_tokens, 3 * values, dtype=torch.bfloat16), (torch.empty(values),) * 2
        u, stats, seed = y[:, :values].contiguous(), torch.empty(num_tokens, 1), torch.zeros(1, dtype=torch.int64)
        gate = gated_output._arguments(u, u.view(num_tokens, -1, 128), *affine, seed, stats, stats, y, 0.3)
        return gated_output.gate_backward_launch(gate, y, u, u, scale=1.4)
    tokens, x = torch.empty(num_tokens, width, dtype=torch.bfloat16), torch.empty(num_tokens, width)
    if name == "output":
        return linear_launch(tokens, tokens[:width], x[0], x, residual_TN=x, scale=1.4)
    uvqk = torch.empty(num_tokens, 4 * width, dtype=torch.bfloat16)
    return linear_launch(tokens, tokens[: 4 * width], uvqk[0], uvqk, before_TA=uvqk.clone())


def fp8_launches() -> dict[str, Launch]:
    """The kernels of FP8 at the same width."""
    x, uvqk = torch.empty(1000, 512), torch.empty(1000, 2048, dtype=torch.bfloat16)
    x_fp8, weight_fp8, scales = (
        x.to(torch.float8_e4m3fn),
        torch.empty(2048, 512).to(torch.float8_e4m3fn),
        torch.ones(2048),
    )
    output_weight, before = weight_fp8.view(512, 2048), uvqk[:, :512].contiguous()
    return {
        "quantize": quantize_launch(x.bfloat16(), x_fp8, scales),
        "uvqk": linear_launch(x_fp8, weight_fp8, scales, uvqk, before_TA=before, scales=(scales, scales)),
        "output": linear_launch(
            uvqk.to(torch.float8_e4m3fn), output_weight, None, x, residual_TN=x, scale=1.4, scales=(scales, scales)
        ),
    }


def compiled(launch: Launch, target: GPUTarget):
    """The kernel as this launch would compile it, with what Triton learns from aligned arguments."""
    arguments = {name: False if name in ON_CPU_ONLY else value for name, value in launch.arguments.items()}
    signature, constants, hints = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[place,] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            hints[place,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, hints)
    return triton.compile(source, target=target, options=launch.options)


def registers_and_stack(cubin: bytes, path: Path) -> tuple[int, int]:
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", TARGETS)
def test_every_kernel_compiles_without_spills_and_within_shared_memory(name, tmp_path):
    for kernel_name, launch in launches().items():
        code = checked_code(kernel_name, launch, name, tmp_path)
        if kernel_name in ("uvqk", "output"):
            assert MATRIX_INSTRUCTION[name] in code, kernel_name


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("kernel_name", "name"),
    [
        *product(["uvqk"], ["sm_80", "sm_90", "sm_100"]),
        ("output", "sm_90"),
        *product(["gate", "norm"], ["sm_90", "sm_100"]),
    ],
)
def test_unaligned_and_very_wide_rows_spill_nothing_either(kernel_name, name, tmp_path):
    kernel = compiled(unusual_launch(kernel_name), TARGETS[name][0])
    registers, stack = registers_and_stack(kernel.asm["cubin"], tmp_path / "cubin")
    assert stack == 0
    assert registers >= 64
    assert kernel.metadata.shared <= TARGETS[name][1] * 1024


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", NATIVE_FP8)
def test_products_in_fp8_compile_to_matrix_instructions_that_read_it(name, tmp_path):
    for kernel_name, launch in fp8_launches().items():
        code = checked_code(kernel_name, launch, name, tmp_path)
        if kernel_name != "quantize":
            assert re.search(MATRIX_INSTRUCTION[name] + ".*" + NATIVE_FP8[name], code), kernel_name


def checked_code(kernel_name: str, launch: Launch, name: str, folder: Path) -> str:
    """The assembly of a kernel for a target, once it is known to fit and to spill nothing."""
    target, shared_kib = TARGETS[name]
    kernel = compiled(launch, target)
    assert kernel.metadata.shared <= shared_kib * 1024, kernel_name
    if target.backend == "cuda":
        _, stack = registers_and_stack(kernel.asm["cubin"], folder / f"{kernel_name}.cubin")
        assert stack == 0, kernel_name
        return kernel.asm["ptx"]
    code = kernel.asm["amdgcn"]
    assert re.search(r"vgpr_spill_count: +0\b", code), kernel_name
    return code
