"""`--out` of benchmarks: a folder that cannot be written to is named before anything is measured."""

from pathlib import Path

import pytest

from ultrarec.data.errors import UserError
from ultrarec.kernels import bench
from ultrarec.launch import bench_attention, bench_checkpoint, cli
from ultrarec.launch.figures import check_folder, new_files


def measured(*args: object, **options: object) -> None:
    raise AssertionError("measured, though the figures have no place")


@pytest.mark.parametrize(
    "argv", [["attention"], ["attention", "--static"], ["checkpoint"]], ids=["attention", "static", "checkpoint"]
)
@pytest.mark.parametrize("name", ["file", "file/folder"])
def test_a_place_that_cannot_be_written_to_exits_2_before_anything_is_measured(
    argv, name, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("triton" if "--static" in argv else "matplotlib")
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(bench, "check_results", measured)
    monkeypatch.setattr(bench, "check_kernels", measured)
    monkeypatch.setattr(bench_attention, "_measure", measured)
    monkeypatch.setattr(bench_checkpoint, "_measure", measured)
    assert cli.main(["bench", *argv, "--out", str(tmp_path / name)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"--out {tmp_path / name} cannot be written to: " in shown.err
    assert "give a folder of yours with room" in shown.err
    assert (tmp_path / "file").read_text() == "mine"


def test_trying_a_folder_makes_it_and_leaves_nothing_in_it(tmp_path):
    check_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def write_one_and_fill_the_disk(place: Path) -> None:
    with new_files(place) as folder:
        (folder / "one").write_text("new")
        Path("/dev/full").write_text("two")


def test_files_are_there_all_together_or_not_at_all(tmp_path):
    (tmp_path / "one").write_text("old")
    with pytest.raises(UserError, match="No space left on device"):
        write_one_and_fill_the_disk(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("one", "old")]
    with new_files(tmp_path) as folder:
        (folder / "one").write_text("new")
        (folder / "two").write_text("two")
    assert sorted((path.name, path.read_text()) for path in tmp_path.iterdir()) == [("one", "new"), ("two", "two")]
