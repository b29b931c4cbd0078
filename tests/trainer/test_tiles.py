"""The tiles of the attention are part of a run's plan, and whoever continues with others is told."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ultrarec.kernels.hstu_attention.triton_blocks import INTERPRETER, Blocks
from ultrarec.kernels.hstu_attention.triton_tuned import Shape, choices_for, default_path, write
from ultrarec.trainer.tiles import tell_of_other_tiles, tiles_line, with_tiles

CPU = torch.device("cpu")
FORWARD = Shape("forward", "bfloat16", 64, False)
PLAN = "table  sharding\nitem   row_wise\n"


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where measured tiles are looked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choices_for.cache_clear()
    yield default_path()
    choices_for.cache_clear()


def tuned_line(path: Path, blocks: Blocks) -> str:
    """What a new process would say of a file with these tiles."""
    write(path, INTERPRETER, {FORWARD: blocks})
    choices_for.cache_clear()
    return tiles_line(CPU)


def test_the_line_tells_built_in_and_measured_tiles_apart(path: Path) -> None:
    assert tiles_line(CPU) == "attention tiles: built-in\n"
    first, second = tuned_line(path, Blocks(64, 32)), tuned_line(path, Blocks(32, 32))
    assert first != second
    assert first.startswith("attention tiles: tuned, ")
    assert tuned_line(path, Blocks(64, 32)) == first


def test_the_plan_of_a_run_without_triton_kernels_is_as_it_was() -> None:
    assert with_tiles(PLAN, CPU) == PLAN


def test_continuing_with_other_tiles_is_told(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_file = tmp_path / "plan.txt"
    plan_file.write_text(PLAN + tuned_line(path, Blocks(64, 32)))
    tell_of_other_tiles(plan_file, PLAN + tuned_line(path, Blocks(64, 32)))
    assert capsys.readouterr().err == ""
    tell_of_other_tiles(plan_file, PLAN + tuned_line(path, Blocks(32, 32)))
    said = capsys.readouterr().err
    assert f"{plan_file} names other tiles" in said
    assert "restore the file" in said


def test_a_run_that_named_no_tiles_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_file = tmp_path / "plan.txt"
    tell_of_other_tiles(plan_file, PLAN + tiles_line(CPU))
    plan_file.write_text(PLAN)
    tell_of_other_tiles(plan_file, PLAN + tiles_line(CPU))
    assert capsys.readouterr().err == ""
