"""The file of measured tiles: what the launcher takes from it, and what it makes of one that it cannot use."""

import json
import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton

from ultrarec.kernels.hstu_attention.triton_blocks import INTERPRETER, Blocks, blocks_of
from ultrarec.kernels.hstu_attention.triton_launch import blocks_for
from ultrarec.kernels.hstu_attention.triton_tuned import Shape, choices_for, default_path, digest_of, read, write
from ultrarec.kernels.static_report import Setting, problem_of

FORWARD, BIAS = Shape("forward", "bfloat16", 64, False), Shape("bias", "bfloat16", 64, True)
TILES, OTHER_TILES = Blocks(64, 32, 4, 3), Blocks(32, 32, 8, 1)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the launcher looks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choices_for.cache_clear()
    yield default_path()
    choices_for.cache_clear()


def test_what_is_written_is_read_and_what_was_there_stays(path: Path) -> None:
    write(path, "A", {FORWARD: TILES})
    write(path, "A", {BIAS: OTHER_TILES})
    write(path, "B", {FORWARD: OTHER_TILES})
    assert read(path, "A") == {FORWARD: TILES, BIAS: OTHER_TILES}
    assert read(path, "B") == {FORWARD: OTHER_TILES}
    assert [each.name for each in path.parent.iterdir()] == ["attention_tiles.json"]


def test_the_launcher_takes_tiles_of_its_device_and_shape_and_the_built_in_ones_otherwise(path: Path) -> None:
    write(path, INTERPRETER, {FORWARD: TILES})
    write(path, "another device", {FORWARD: OTHER_TILES})
    assert blocks_for("forward", problem_of(Setting(64)), INTERPRETER) == TILES
    # Heads of 50 fill the same tiles as those of 64.
    assert blocks_for("forward", problem_of(Setting(50)), INTERPRETER) == TILES
    for setting in (Setting(64, biased=True), Setting(128), Setting(64, dtype=torch.float16)):
        builtin = blocks_of("forward", INTERPRETER, setting.width, setting.dtype, biased=setting.biased)
        assert blocks_for("forward", problem_of(setting), INTERPRETER) == builtin
    builtin = blocks_of("forward", "sm_90", 64, torch.bfloat16, biased=False)
    assert blocks_for("forward", problem_of(Setting(64)), "sm_90") == builtin, "compiled for a device that is not there"


def test_the_file_is_read_once_in_a_process(path: Path) -> None:
    write(path, INTERPRETER, {FORWARD: TILES})
    first = blocks_for("forward", problem_of(Setting(64)), INTERPRETER)
    write(path, INTERPRETER, {FORWARD: OTHER_TILES})
    assert blocks_for("forward", problem_of(Setting(64)), INTERPRETER) == first == TILES


def contents(**changed: object) -> str:
    tile = {"kernel": "bias", "dtype": "bfloat16", "width": 64, "biased": True, "rows": 32, "keys": 32}
    tile |= {"num_warps": 8, "num_stages": 1} | changed
    device = {"triton": triton.__version__, "tiles": [{name: x for name, x in tile.items() if x is not None}]}
    return json.dumps({"format": 1, "devices": {"A": device}})


def test_the_contents_that_the_next_test_damages_are_sound(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(contents())
    assert read(path, "A") == {BIAS: OTHER_TILES}


@pytest.mark.parametrize(
    "text",
    [
        "",
        contents()[:-20],
        "[]",
        '{"format": 2, "devices": {}}',
        '{"format": 1}',
        '{"format": 1, "devices": {"A": []}}',
        contents(kernel="backward"),
        contents(dtype="int8"),
        contents(width=50),
        contents(rows=48),
        contents(rows=64),
        contents(rows="32"),
        contents(num_warps=3),
        contents(num_stages=0),
        contents(num_stages=None),
    ],
)
def test_a_damaged_file_is_named_with_a_remedy_and_the_built_in_tiles_are_used(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match=f"{path} cannot be used .* Delete it, or run ultrarec bench attention --tune"):
        assert read(path, "A") == {}


def test_tiles_measured_with_another_triton_are_not_used(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(contents().replace(triton.__version__, "2.0.0"))
    with pytest.warns(UserWarning, match=r"was made with Triton 2\.0\.0, but this is"):
        assert read(path, "A") == {}


def test_a_damaged_file_is_replaced_whole(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("{")
    write(path, "A", {FORWARD: TILES})
    assert read(path, "A") == {FORWARD: TILES}


def test_a_write_that_fails_leaves_nothing_behind(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        write(path, "A", {FORWARD: TILES})
    assert list(path.parent.iterdir()) == [path]


def test_a_user_without_a_home_gets_the_built_in_tiles(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    builtin = blocks_of("forward", INTERPRETER, 64, torch.bfloat16, biased=False)
    assert blocks_for("forward", problem_of(Setting(64)), INTERPRETER) == builtin


def test_a_digest_is_that_of_the_choices_and_not_of_their_order() -> None:
    choices = {FORWARD: TILES, BIAS: OTHER_TILES}
    assert digest_of(choices) == digest_of(dict(reversed(choices.items())))
    others = [{FORWARD: OTHER_TILES, BIAS: OTHER_TILES}, {FORWARD: TILES}, {}]
    assert len({digest_of(each) for each in (choices, *others)}) == 4
