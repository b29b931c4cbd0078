"""Tuning of tiles, with times that are given, and once with real ones from end to end."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attention_cases import Case, assert_as_exact_as_plain_torch
from triton_device import DEVICE, needs_triton

from ultrarec.kernels import tuning
from ultrarec.kernels.bench import WrongResults
from ultrarec.kernels.hstu_attention import triton_tuned
from ultrarec.kernels.hstu_attention.triton_blocks import Blocks, target_of
from ultrarec.kernels.hstu_attention.triton_launch import blocks_for
from ultrarec.kernels.hstu_attention.triton_tuned import Shape

pytestmark = needs_triton

FORWARD = Shape("forward", "float32", 16, False)
SMALL, LARGE = Blocks(16, 16, 4, 1), Blocks(64, 16, 4, 1)


@pytest.fixture(autouse=True)
def a_small_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "NUM_SEQUENCES", 2)
    monkeypatch.setattr(tuning, "NUM_HEADS", 1)


def tuned(
    seconds: list[float], shape: Shape = FORWARD, is_clean: Callable[..., bool] = lambda *_: True
) -> tuning.Choice:
    """With the built-in tiles and then SMALL and LARGE taking so long, as far as they are timed."""
    times = iter(seconds)
    choice = tuning.tune(
        shape,
        tuning.problem_for(shape, 40, DEVICE),
        target_of(torch.device(DEVICE)),
        candidates=[SMALL, LARGE],
        is_clean=is_clean,
        seconds_of=lambda _: next(times),
    )
    assert list(times) == []
    return choice


def test_the_fastest_tiles_are_chosen() -> None:
    choice = tuned([1.0, 0.9, 0.8])
    assert (choice.blocks, choice.seconds, choice.builtin_seconds, choice.num_timed) == (LARGE, 0.8, 1.0, 3)


def test_the_built_in_tiles_stay_unless_they_are_clearly_beaten() -> None:
    choice = tuned([1.0, 0.985, 1.2])
    assert choice.blocks == choice.builtin_blocks
    assert choice.seconds == 1.0


def test_tiles_that_spill_are_not_timed() -> None:
    assert tuned([1.0, 0.9], is_clean=lambda shape, target, blocks: blocks == LARGE).blocks == LARGE


def test_tiles_with_other_results_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tuning.launch_of

    def slightly_wrong(name, problem, target, blocks):
        launch, results = right(name, problem, target, blocks)
        return launch, lambda: [x * (1.001 if blocks == LARGE else 1) for x in results()]

    monkeypatch.setattr(tuning, "launch_of", slightly_wrong)
    with pytest.raises(WrongResults, match="off the built-in tiles"):
        tuned([1.0, 0.9, 0.8])


def test_tiles_that_are_right_on_a_causal_problem_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tuning.launch_of

    def wrong_where_masked(name, problem, target, blocks):
        launch, results = right(name, problem, target, blocks)
        factor = 1.001 if blocks == LARGE and any(problem.rule) else 1
        return launch, lambda: [x * factor for x in results()]

    monkeypatch.setattr(tuning, "launch_of", wrong_where_masked)
    with pytest.raises(WrongResults, match="all masks"):
        tuned([1.0, 0.9, 0.8])


def test_the_second_problem_asks_for_all_that_kernels_can_do() -> None:
    problem = tuning.everything(tuning.problem_for(FORWARD, 40, DEVICE))
    assert all(problem.rule)
    assert problem.num_targets is not None
    assert len(problem.scale.unique()) == len(problem.q)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_candidates_fill_no_thread_and_are_square_for_the_bias_gradient(target: str) -> None:
    for width in (16, 64, 256):
        for shape in tuning.shapes_of(width, torch.bfloat16):
            candidates = tuning.candidates_of(shape, target)
            assert candidates
            assert shape.kernel != "bias" or all(blocks.rows == blocks.keys for blocks in candidates)


def test_candidates_leave_registers_by_the_threads_and_registers_of_the_device() -> None:
    # 64 rows of 256 columns are 128 sums for each thread of 4 warps, 128 of them 256.
    wide = tuning.candidates_of(Shape("forward", "bfloat16", 256, False), "sm_90")
    assert {blocks.rows for blocks in wide if blocks.num_warps == 4} == {16, 32, 64}
    # AMD's wavefronts have twice as many threads, and those twice as many registers.
    wide = tuning.candidates_of(Shape("forward", "bfloat16", 256, False), "gfx942")
    assert {blocks.rows for blocks in wide if blocks.num_warps == 4} == {16, 32, 64, 128}


class Clock:
    """Real seconds; the built-in tiles, which are timed first, take a thousand more: others compile in less."""

    def __init__(self) -> None:
        self.handicap = 1000.0

    def seconds_of(self, run: Callable[[], None]) -> float:
        begin = time.perf_counter()
        run()
        seconds, self.handicap = time.perf_counter() - begin + self.handicap, 0.0
        return seconds


def test_attention_runs_with_what_was_measured_and_stays_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = torch.device(DEVICE)
    target = target_of(device)
    device_name = triton_tuned.device_name_of(device, target)
    assert device_name is not None
    choices = {}
    for shape in tuning.shapes_of(16, torch.float32):
        problem = tuning.problem_for(shape, 40, DEVICE)
        choice = tuning.tune(
            shape, problem, target, candidates=[SMALL], is_clean=lambda *_: True, seconds_of=Clock().seconds_of
        )
        assert choice.seconds > 0
        assert choice.blocks == SMALL
        choices[shape] = choice.blocks
    triton_tuned.write(triton_tuned.default_path(), device_name, choices)
    triton_tuned.choices_for.cache_clear()
    try:
        for shape in choices:
            problem = tuning.problem_for(shape, 40, DEVICE)
            assert blocks_for(shape.kernel, problem, target) == choices[shape]
        for bias in ("", "position time"):
            case = Case(lengths=(40, 0, 33), num_heads=1, bias=bias, device=DEVICE)
            assert_as_exact_as_plain_torch(case, "triton")
    finally:
        triton_tuned.choices_for.cache_clear()
