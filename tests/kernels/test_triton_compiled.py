"""The Triton kernels as they ship, compiled for devices that this machine lacks: nothing spilled, tensor cores in use.

Compiling needs no GPU. It happens in a process of its own, because the interpreter cannot be left once chosen; see
compile_attention.py for what is compiled each time, and what only if it is not the same as recorded.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
TOOL, RECORD = TESTS / "compile_attention.py", TESTS / "golden" / "attention_kernels.jsonl"
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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> list[Facts]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(TOOL)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def promised(
    shipped: list[Facts], name: str, width: int, *, target: str = "sm_90", scale_per_query: bool = False
) -> Facts:
    """The kernel of causal attention in bfloat16."""
    wanted = {"target": target, "name": name, "width": width, "dtype": "bfloat16", "biased": False, "masked": False}
    (kernel,) = (each for each in shipped if each.items() >= {**wanted, "scale_per_query": scale_per_query}.items())
    return kernel


def test_no_shipped_kernel_spills_or_outgrows_its_device(shipped: list[Facts]) -> None:
    assert {kernel["target"] for kernel in shipped} == SHARED_MEMORY.keys()
    assert len(shipped) > 80
    for kernel in shipped:
        assert kernel["spilled"] == 0, kernel
        assert kernel["registers"] >= 64, kernel
        assert kernel["shared_bytes"] <= SHARED_MEMORY[kernel["target"]], kernel


def test_every_shipped_kernel_of_half_precision_multiplies_on_tensor_cores(shipped: list[Facts]) -> None:
    for kernel in shipped:
        if kernel["dtype"] == "float32":
            continue
        # Some tiles are too small for the instructions of a group of warps, because larger ones spill: those of the
        # bias gradient, and of the backward of the widest heads on sm_90.
        wide_backward = kernel["target"] == "sm_90" and kernel["width"] > 128 and kernel["name"] != "forward"
        is_small = kernel["name"] == "bias" or wide_backward
        wanted = {TENSOR_INSTRUCTION[kernel["target"]], *(["mma.sync"] if is_small else [])}
        assert wanted & {*kernel["tensor_instructions"]}, kernel


def test_tiles_that_are_visible_in_full_run_a_loop_without_a_mask(shipped: list[Facts]) -> None:
    for kernel in shipped:
        if kernel["name"] != "bias":
            full, edge = kernel["masked_values"]
            # With a time bias one comparison decides the bucket.
            assert full == int(kernel["biased"]), kernel
            assert edge > 1, kernel


@pytest.mark.parametrize(("width", "most"), [(64, 6.5), (128, 6.0)])
def test_the_forward_issues_few_instructions_for_a_score_and_one_of_them_special(
    shipped: list[Facts], width: int, most: float
) -> None:
    interior, boundary = promised(shipped, "forward", width)["loops"]
    assert interior["issued"] <= most
    assert boundary["issued"] <= 12
    assert interior["by_kind"]["special"] == boundary["by_kind"]["special"] == 1
    assert interior["redundancy"] == 1


@pytest.mark.parametrize("scale_per_query", [False, True])
def test_both_passes_of_the_backward_together_issue_at_most_28_instructions_for_a_score(
    shipped: list[Facts], scale_per_query: bool
) -> None:
    passes = [promised(shipped, name, 128, scale_per_query=scale_per_query) for name in ("keys", "queries")]
    interiors = [kernel["loops"][0] for kernel in passes]
    assert sum(loop["issued"] for loop in interiors) <= 28
    assert [loop["by_kind"]["special"] for loop in interiors] == [1, 1]
    assert [loop["redundancy"] for loop in interiors] == [1, 1]


def test_on_amd_devices_no_wavefront_repeats_the_work_of_another(shipped: list[Facts]) -> None:
    amd = [kernel for kernel in shipped if kernel["target"] in ("gfx942", "gfx950")]
    assert amd
    for kernel in amd:
        # In float32, larger tiles of the backward of the widest heads spill.
        spills = kernel["name"] != "forward" and kernel["width"] == 256 and kernel["dtype"] == "float32"
        assert all(loop["redundancy"] <= (1.7 if spills else 1) for loop in kernel["loops"]), kernel


@pytest.mark.parametrize(("target", "most_forward", "most_backward"), [("gfx942", 19, 58), ("gfx950", 12, 35)])
def test_on_amd_devices_silu_takes_no_division_rounded_correctly(
    shipped: list[Facts], target: str, most_forward: float, most_backward: float
) -> None:
    kernels = {name: promised(shipped, name, 128, target=target) for name in ("forward", "keys", "queries")}
    interiors = {name: kernel["loops"][0] for name, kernel in kernels.items()}
    assert {loop["by_kind"]["special"] for loop in interiors.values()} == {2}
    assert not any(kernel["divides_exactly"] for kernel in kernels.values())
    assert interiors["forward"]["issued"] <= most_forward
    assert interiors["keys"]["issued"] + interiors["queries"]["issued"] <= most_backward


def test_what_is_recorded_of_kernels_is_what_the_compiler_makes_of_them(shipped: list[Facts]) -> None:
    """Of those compiled here; if this fails, run `python tests/compile_attention.py --record`."""
    records = {line["key"]: line for line in map(json.loads, RECORD.read_text().splitlines())}
    for kernel in shipped:
        assert records.get(kernel["key"]) == kernel
