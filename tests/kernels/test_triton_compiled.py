"""The Triton kernels as they ship, compiled for devices that this machine lacks: nothing spilled, tensor cores in use.

Compiling needs no GPU. It happens in a process of its own, because the interpreter cannot be left once chosen.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[1] / "compile_attention.py"
# What a block may have at most: bytes of shared memory (LDS on AMD). The tiles of sm_80 are also those of sm_86, sm_89
# and sm_120, which have 99 KiB.
SHARED_MEMORY = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10}
TENSOR_INSTRUCTION = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
    "gfx950": "v_mfma",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(TOOL)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_shipped_kernel_spills_or_outgrows_its_device(compiled: list[dict[str, Any]]) -> None:
    assert {kernel["target"] for kernel in compiled} == SHARED_MEMORY.keys()
    for kernel in compiled:
        assert kernel["spilled"] == 0, kernel
        assert kernel["registers"] >= 64, kernel
        assert kernel["shared"] <= SHARED_MEMORY[kernel["target"]], kernel


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_shipped_kernel_of_half_precision_multiplies_on_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        if kernel["dtype"] == "float32":
            continue
        # Some tiles are too small for the instructions of a group of warps, because larger ones spill: those of the
        # bias gradient, of the backward of the widest heads on sm_90, and of biased heads without a descriptor.
        wide_backward = kernel["target"] == "sm_90" and kernel["width"] > 128 and kernel["kernel"] != "forward"
        by_pointers = kernel["target"] in ("sm_90", "sm_100") and kernel["width"] == 50 and kernel["biased"]
        is_small = kernel["kernel"] == "bias" or wide_backward or by_pointers
        wanted = {TENSOR_INSTRUCTION[kernel["target"]], *(["mma.sync"] if is_small else [])}
        assert wanted & {*kernel["tensor_instructions"]}, kernel


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tiles_that_are_visible_in_full_run_a_loop_without_a_mask(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        # Heads of 50 fill tiles of 64 columns, of which loads leave out some.
        if kernel["kernel"] != "bias" and kernel["width"] != 50:
            full, edge = kernel["masked_values"]
            # With a time bias one comparison decides the bucket.
            assert full == int(kernel["biased"]), kernel
            assert edge > 1, kernel
