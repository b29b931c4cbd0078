"""What a checkpoint is made of, how it is kept, and what the commands say about it."""

import argparse
import dataclasses
import json
import random
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from process_group import run_ranks
from safetensors.torch import load_file
from small_runs import checkpoint_tensors, config_of, differing, final_tensors, train_on_ranks

from ultrarec.data.errors import UserError
from ultrarec.trainer.checkpoint_command import add_arguments, run
from ultrarec.trainer.manifest import (
    MANIFEST,
    DamagedError,
    Manifest,
    all_checkpoints,
    checkpoint_folder,
    complete_checkpoints,
    step_of,
)
from ultrarec.trainer.pieces import DTYPES
from ultrarec.trainer.retention import set_aside


@pytest.fixture
def command():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return lambda *words: run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def run_folder(trained, tmp_path):
    """A copy of a run of two ranks, to be damaged."""
    shutil.copytree(trained(2)["ranking"] / "checkpoints", tmp_path / "out" / "checkpoints")
    return tmp_path / "out"


def test_the_manifest_lists_every_file_with_size_and_checksum(trained):
    folder = complete_checkpoints(trained(2)["ranking"])[-1]
    written = json.loads((folder / MANIFEST).read_text())
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}
    assert {"rank-00000.safetensors", "rank-00001.safetensors", "index.json"} <= files.keys()
    assert {record["name"]: record["blocks"][-1]["end"] for record in written["files"]} == {
        name: len(content) for name, content in files.items()
    }
    for record in written["files"]:
        start = 0
        for block in record["blocks"]:
            assert zlib.crc32(files[record["name"]][start : block["end"]]) == block["crc32"]
            start = block["end"]
    assert (written["step"], written["batches"], written["world_size"]) == (24, 24, 2)
    assert written["loader"] == {"epoch": 2, "consumed": 0}
    assert written["versions"].keys() == {"ultrarec", "torch", "torchrec"}


def test_checkpoints_lie_at_the_period_and_at_the_end(trained):
    assert [step_of(folder) for folder in complete_checkpoints(trained(1)["ranking"])] == [5, 10, 15, 20, 24]


def test_a_checkpoint_holds_the_state_of_its_own_step(trained):
    out = trained(1)["ranking"]
    first, last = checkpoint_tensors(checkpoint_folder(out, 5)), final_tensors(out)
    assert first.keys() == last.keys()
    # Unchanged: what dropout never draws from, and a window that each line of metrics empties.
    assert set(first) - set(differing(first, last)) == {"rank/0/cpu_rng", "rank/0/window"}


@pytest.mark.parametrize("keep_last", [1, 2])
def test_only_the_newest_checkpoints_are_kept_and_what_a_kill_left_goes(dataset, tmp_path, keep_last):
    out = tmp_path / "out"
    abandoned = checkpoint_folder(out, 3)
    abandoned.mkdir(parents=True)
    settings = ("checkpoint.every=2", "trainer.max_steps=7", f"checkpoint.keep_last={keep_last}")
    run_ranks(train_on_ranks, [(config_of(dataset, "ranking", *settings), out)], world_size=1)
    assert [step_of(folder) for folder in all_checkpoints(out)] == [2, 4, 6, 7][-keep_last:]
    assert all_checkpoints(out) == complete_checkpoints(out)


def test_verify_finds_whole_checkpoints_whole(run_folder, command, capsys):
    assert command("verify", run_folder) == 0
    assert capsys.readouterr().out == "".join(f"ok       {folder}\n" for folder in complete_checkpoints(run_folder))
    assert command("verify", checkpoint_folder(run_folder, 5)) == 0


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00001.safetensors", "index.json"])
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("flip", "{name} has another checksum than when it was written"),
        ("truncate", "{name} has {less} bytes, written were {size}"),
        ("remove", "{name} is missing"),
    ],
)
def test_verify_names_a_damaged_file_and_exits_with_1(run_folder, command, capsys, name, damage, told):
    path = checkpoint_folder(run_folder, 10) / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(flipped if damage == "flip" else content[:-1])
    assert command("verify", run_folder) == 1
    printed = capsys.readouterr().out
    expected = told.format(name=name, less=len(content) - 1, size=len(content))
    assert f"DAMAGED  {path.parent}\n         {expected}\n" in printed
    assert printed.count("DAMAGED") == 1
    assert command("verify", checkpoint_folder(run_folder, 5)) == 0


def test_list_shows_every_checkpoint_and_marks_what_is_incomplete(run_folder, command, capsys):
    (checkpoint_folder(run_folder, 15) / MANIFEST).unlink()
    assert command("list", run_folder) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "epoch", "ranks", "bytes", "folder"]
    assert [row.split()[0] for row in rows] == ["5", "10", "15", "20", "24"]
    assert "incomplete" in rows[2]
    folder = checkpoint_folder(run_folder, 5)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST)
    assert rows[0].split() == ["5", "0", "2", f"{size:,}", str(folder)]


def test_inspect_shows_position_versions_and_every_tensor(run_folder, command, capsys):
    assert command("inspect", run_folder) == 0
    printed = capsys.readouterr().out
    folder = complete_checkpoints(run_folder)[-1]
    dataset = Manifest.read(folder).dataset
    expected = f"{folder}\nstep 24, written by 2 rank(s), continues at sample 0 of epoch 2, dataset {dataset}\n"
    assert printed.startswith(expected)
    for name, tensor in checkpoint_tensors(folder).items():
        (line,) = [line for line in printed.splitlines() if line.endswith(f" {name}")]
        assert line.split()[0] == f"{tensor.numel() * tensor.element_size():,}"
        assert str(list(tensor.shape)) in line
        assert DTYPES[tensor.dtype] in line
    (item,) = [line for line in printed.splitlines() if line.endswith("tables/item/weight")]
    assert item.split()[1] == "2", "a row-wise table of two ranks has two shards"


def flip_bit(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


@pytest.fixture
def damaged_run(run_folder):
    """A run whose newest checkpoint has a flipped bit in the weights of the item table."""
    folder = complete_checkpoints(run_folder)[-1]
    index = json.loads((folder / "index.json").read_text())
    chunk = index["tables/item/weight"]["chunks"][0]
    flip_bit(folder / chunk["file"], chunk["offset"])
    return run_folder


def test_a_flipped_bit_of_the_manifest_is_found_wherever_it_is(run_folder):
    folder = complete_checkpoints(run_folder)[-1]
    whole, dice = (folder / MANIFEST).read_bytes(), random.Random(1)
    for place in range(len(whole)):
        flipped = whole[place] ^ (1 << dice.randrange(8))
        (folder / MANIFEST).write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
        with pytest.raises(DamagedError):
            Manifest.read(folder)
    for size in range(0, len(whole), 17):
        (folder / MANIFEST).write_bytes(whole[:size])
        with pytest.raises(DamagedError):
            Manifest.read(folder)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00001.safetensors", "index.json"])
def test_a_flipped_bit_of_a_file_is_found_by_verify_and_by_loading_unless_it_changes_nothing(run_folder, name):
    folder = complete_checkpoints(run_folder)[-1]
    whole, dice = checkpoint_tensors(folder), random.Random(name)
    size = (folder / name).stat().st_size
    found_by_loading = 0
    for place in (0, size - 1, *(dice.randrange(size) for _ in range(25))):
        bit = dice.randrange(8)
        flip_bit(folder / name, place, bit)
        assert Manifest.read(folder).problems(folder) == [f"{name} has another checksum than when it was written"]
        try:
            assert not differing(checkpoint_tensors(folder), whole)
        except DamagedError:
            found_by_loading += 1
        flip_bit(folder / name, place, bit)
    # The rest hit the header of a file, which is for other programs: loading finds values by the index.
    assert found_by_loading >= 10


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_it_used(damaged_run, command, capsys, tmp_path):
    told = "rank-00000.safetensors has another checksum than when it was written; looking for the checkpoint before it"
    before = checkpoint_folder(damaged_run, 20)
    assert command("export", damaged_run, "--out", tmp_path / "new") == 0
    printed = capsys.readouterr()
    assert told in printed.err
    assert f"step 20 of {before} exported" in printed.out
    assert command("diff", damaged_run, before) == 0
    assert told in capsys.readouterr().err
    (damaged_run / "checkpoints" / "step-00000024" / "index.json").write_bytes(b"nothing")
    assert command("inspect", damaged_run) == 0
    printed = capsys.readouterr()
    assert "is damaged: index.json has 7 bytes, written were" in printed.err
    assert printed.out.startswith(f"{before}\nstep 20")


@pytest.mark.parametrize("action", ["export", "diff"])
def test_a_damaged_checkpoint_that_was_asked_for_is_refused_with_the_one_before_it(
    damaged_run, command, tmp_path, action
):
    folder, before = (checkpoint_folder(damaged_run, step) for step in (24, 20))
    more = {"export": ["--out", tmp_path / "new"], "diff": [folder]}[action]
    with pytest.raises(DamagedError, match=f"; the one before it is {before}: give that instead"):
        command(action, folder, *more)
    for step in (5, 10, 15, 20):
        shutil.rmtree(checkpoint_folder(damaged_run, step))
    with pytest.raises(DamagedError, match="; there is none before it: restore its files from a copy"):
        command(action, damaged_run, *more)


def test_what_a_checkpoint_that_was_set_aside_suffered_can_be_seen(damaged_run, command, capsys):
    folder = checkpoint_folder(damaged_run, 24)
    set_aside(folder)
    assert command("verify", damaged_run) == 0
    aside = folder.with_name("damaged-step-00000024")
    assert command("verify", aside) == 1
    assert f"DAMAGED  {aside}\n         rank-00000.safetensors has another checksum" in capsys.readouterr().out


def test_diff_names_every_tensor_that_differs_and_by_how_much(run_folder, command, capsys):
    first, last = checkpoint_folder(run_folder, 5), checkpoint_folder(run_folder, 24)
    assert command("diff", first, first) == 0
    assert capsys.readouterr().out == f"equal, tensor by tensor: {first} and {first}\n"
    assert command("diff", first, run_folder) == 1
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    left, right = checkpoint_tensors(first), checkpoint_tensors(last)
    assert printed.keys() == set(differing(left, right))
    for name, text in printed.items():
        differs = left[name] != right[name]
        # An infinity less itself would be no number.
        difference = torch.where(differs, left[name].double() - right[name].double(), 0.0).abs()
        count = int(differs.sum())
        assert text == f"{count} of {difference.numel()} values differ, by at most {difference.max():.3g}"


def test_diff_of_other_tables_names_what_only_one_side_has(trained, command, capsys):
    ranking, next_item = (complete_checkpoints(trained(1)[kind])[-1] for kind in ("ranking", "full_softmax"))
    assert command("diff", ranking, next_item) == 1
    printed = capsys.readouterr().out
    assert f"tables/user_id/weight: only in {ranking}\n" in printed


@pytest.fixture
def exported(trained, dataset, tmp_path, command):
    out = tmp_path / "export"
    assert command("export", trained(2)["ranking"], "--out", out) == 0
    return out


def test_an_export_refuses_a_dataset_that_is_not_there(trained, tmp_path, command):
    with pytest.raises(UserError, match="typo"):
        command("export", trained(2)["ranking"], "--out", tmp_path / "out", "--dataset", tmp_path / "typo")
    assert not (tmp_path / "out").exists()


def test_an_export_holds_dense_weights_and_the_vector_of_every_item(trained, dataset, exported):
    tensors = final_tensors(trained(2)["ranking"])
    dense = load_file(exported / "dense.safetensors")
    assert not differing(dense, {n.removeprefix("weights/"): t for n, t in tensors.items() if n.startswith("weights/")})
    items = pq.read_table(exported / "tables" / "item.parquet")
    assert items["row"].to_pylist() == list(range(46))
    assert torch.equal(torch.tensor(items["vector"].to_pylist()), tensors["tables/item/weight"])
    original = pq.read_table(dataset / "items.parquet").sort_by("id")["item_id"].to_pylist()
    assert items["item_id"].to_pylist() == [None, *original]
    users = pq.read_table(exported / "tables" / "user_id.parquet")
    assert users.column_names == ["row", "vector"]
    assert torch.equal(torch.tensor(users["vector"].to_pylist()), tensors["tables/user_id/weight"])
    about = json.loads((exported / "export.json").read_text())
    assert about["step"] == 24
    assert about["tables"] == {"item": {"rows": 46, "columns": 6}, "user_id": {"rows": 31, "columns": 6}}


def test_an_export_that_fails_leaves_nothing(run_folder, command, tmp_path, dataset):
    damaged = checkpoint_folder(run_folder, 10) / "rank-00001.safetensors"
    index = json.loads((damaged.parent / "index.json").read_text())
    place = next(c["offset"] for c in index["tables/item/weight"]["chunks"] if c["file"] == damaged.name)
    content = damaged.read_bytes()
    damaged.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(UserError, match=r"is damaged: rank-00001.safetensors has another checksum"):
        command("export", damaged.parent, "--out", tmp_path / "new")
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    info = json.loads((other / "dataset.json").read_text())
    info["vocabularies"]["items"]["size"] += 7
    (other / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="is not the dataset of"):
        command("export", run_folder, "--out", tmp_path / "new", "--dataset", other)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}


def test_an_export_to_a_folder_that_exists_is_refused_before_anything_heavy_is_imported(tmp_path):
    code = "import sys; from ultrarec.launch.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    words = ["checkpoint", "export", str(tmp_path), "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
    assert done.stderr == f"error: --out {tmp_path} exists; choose another folder, or delete it\n"


@pytest.mark.parametrize("action", ["list", "verify", "inspect"])
def test_a_path_without_checkpoints_is_refused(tmp_path, command, action):
    with pytest.raises(UserError, match=r"is neither a checkpoint nor a run folder|is no complete checkpoint"):
        command(action, tmp_path / "nowhere")


def test_a_run_that_has_not_saved_yet_is_told_from_a_wrong_path(trained, tmp_path, command):
    shutil.copy(trained(1)["ranking"] / "config.toml", tmp_path)
    with pytest.raises(UserError, match="has not saved yet"):
        command("list", tmp_path)


def test_verify_of_a_checkpoint_without_manifest_is_refused(run_folder, command):
    folder = checkpoint_folder(run_folder, 5)
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        command("verify", folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 5}', '{"format_version": 4}'])
def test_a_manifest_that_is_none_is_damage(run_folder, command, capsys, text):
    folder = checkpoint_folder(run_folder, 5)
    (folder / MANIFEST).write_text(text)
    with pytest.raises(DamagedError, match=r"is damaged: manifest.json is cut off, or not what was written"):
        Manifest.read(folder)
    assert command("verify", run_folder) == 1
    told = f"DAMAGED  {folder}\n         manifest.json is cut off, or not what was written\n"
    assert capsys.readouterr().out.startswith(told)
    assert command("list", run_folder) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["5", "damaged", str(folder)]


def test_a_manifest_of_another_format_is_refused_with_both_versions(run_folder):
    folder = checkpoint_folder(run_folder, 5)
    dataclasses.replace(Manifest.read(folder), format_version=99).write(folder)
    with pytest.raises(UserError, match="has format version 99; this version of ultrarec reads 4"):
        Manifest.read(folder)
    (folder / MANIFEST).write_text('{"format_version":2}')
    with pytest.raises(UserError, match="has format version 2; this version of ultrarec reads 4"):
        Manifest.read(folder)
