"""A run that was cut off and continued is the run that was not; on other ranks it still consumes each sample once."""

import dataclasses
import errno
import itertools
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from process_group import run_ranks
from small_runs import (
    audit,
    audited_steps,
    checkpoint_tensors,
    config_of,
    differing,
    final_tensors,
    interrupted,
    lines,
    losses,
    train_on_ranks,
)

from ultrarec.data.schema import DatasetInfo
from ultrarec.trainer.__main__ import main
from ultrarec.trainer.manifest import MANIFEST, Manifest, checkpoint_folder, complete_checkpoints, step_of
from ultrarec.trainer.parallel import World
from ultrarec.trainer.pieces import Source
from ultrarec.trainer.run import open_run
from ultrarec.trainer.state import TrainState

# An epoch has 12 steps: checkpoints lie inside a window of metrics (4, 8), at the end of an epoch (12), after it (16).
SETTINGS = ("model.dropout=0.3", "checkpoint.every=4", "trainer.log_every=3", "trainer.evaluate_every=6")
COSINE = ("optimizer.warmup_steps=5", "optimizer.decay=cosine", "optimizer.clip_norm=1.0", "trainer.accumulate=2")
RESUMED = {
    "ranking": SETTINGS,
    "columns": SETTINGS,
    "sampled_softmax": (*SETTINGS, *COSINE, "data.batch_rows=4"),
    "adamw_softmax": (*SETTINGS, "trainer.max_steps=16"),
}


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """Uninterrupted runs with dropout, by kind and world size."""
    root = tmp_path_factory.mktemp("whole")
    outs = {}
    for world_size in (1, 2):
        runs = {
            kind: (config_of(dataset, kind, *settings), root / f"{kind}-{world_size}")
            for kind, settings in RESUMED.items()
        }
        run_ranks(train_on_ranks, list(runs.values()), world_size=world_size)
        outs |= {(kind, world_size): out for kind, (_, out) in runs.items()}
    return outs


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole, dataset, tmp_path, world_size):
    cuts = [
        ("ranking", 4),
        ("ranking", 12),
        ("columns", 8),
        ("sampled_softmax", 8),
        ("sampled_softmax", 16),
        ("adamw_softmax", 8),
    ]
    runs = [
        (
            config_of(dataset, kind, *RESUMED[kind]),
            interrupted(whole[kind, world_size], tmp_path / f"{kind}-{step}", step=step),
        )
        for kind, step in cuts
    ]
    run_ranks(train_on_ranks, runs, world_size=world_size)
    for (kind, step), (_, out) in zip(cuts, runs, strict=True):
        uninterrupted, what = whole[kind, world_size], f"{kind} resumed at {step}"
        for split in ("train", "validation", "test"):
            assert lines(out, split) == lines(uninterrupted, split), what
            assert lines(out, split), what
        for rank in range(world_size):
            assert audited_steps(out, rank) == audited_steps(uninterrupted, rank), what
        assert not differing(final_tensors(out), final_tensors(uninterrupted)), what


def test_the_compared_checkpoints_hold_everything_that_training_changes(whole):
    tensors = final_tensors(whole["ranking", 2])
    groups = {name.split("/")[0] for name in tensors}
    assert groups == {"weights", "tables", "dense", "rank"}
    assert {name for name in tensors if name.startswith("rank/")} == {
        f"rank/{rank}/{key}" for rank in (0, 1) for key in ("cpu_rng", "window", "health")
    }
    tables = {name: tensor for name, tensor in tensors.items() if name.startswith("tables/")}
    assert tables.keys() == {
        f"tables/{table}/{what}" for table in ("item", "user_id") for what in ("weight", "momentum1/columns-0-8")
    }
    assert all(bool(tensor.any()) for tensor in tables.values())
    assert any(name.endswith("exp_avg_sq") and bool(tensor.any()) for name, tensor in tensors.items())


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (3, 2)])
def test_a_run_continues_on_another_number_of_ranks(trained, dataset, tmp_path, before, after):
    """Without dropout the losses must be those of the uninterrupted run too, give or take rounding."""
    kinds, cut = ("ranking", "columns", "full_softmax", "adamw_softmax"), 10
    whole = {kind: trained(before)[kind] for kind in kinds}
    runs = [
        (config_of(dataset, kind, "checkpoint.every=5"), interrupted(out, tmp_path / kind, step=cut))
        for kind, out in whole.items()
    ]
    run_ranks(train_on_ranks, runs, world_size=after)
    for (kind, uninterrupted), (_, out) in zip(whole.items(), runs, strict=True):
        assert losses(out)[:cut] == losses(uninterrupted)[:cut]
        assert losses(out) == pytest.approx(losses(uninterrupted), rel=1e-5), kind
        steps = [line["step"] for line in lines(out)]
        for rank in range(max(before, after)):
            first = 0 if rank < before else cut
            last = steps[-1] if rank < after else cut
            assert [line["step"] for line in audited_steps(out, rank)] == steps[first:last], f"{kind}, rank {rank}"
        assert {epoch: sorted(s) for epoch, s in audit(out).items()} == {
            epoch: sorted(s) for epoch, s in audit(uninterrupted).items()
        }, kind


@pytest.mark.parametrize(
    ("world_size", "item", "user_id"),
    [(2, "data_parallel", "row_wise"), (3, "data_parallel", "data_parallel"), (1, "table_wise", "data_parallel")],
)
def test_a_run_continues_with_another_plan(trained, dataset, tmp_path, world_size, item, user_id):
    whole = trained(2)["ranking"]
    out = interrupted(whole, tmp_path / "out", step=10)
    plan = (f"embeddings.sharding.item={item}", f"embeddings.sharding.user_id={user_id}")
    run_ranks(train_on_ranks, [(config_of(dataset, "ranking", *plan), out)], world_size=world_size)
    assert losses(out) == pytest.approx(losses(whole), rel=1e-5)
    for split in ("validation", "test"):
        (found,), (expected,) = lines(out, split), lines(whole, split)
        assert {**found, "split": 0} == pytest.approx({**expected, "split": 0}, rel=1e-4)
    expected, found = final_tensors(whole), final_tensors(out)
    for name in ("tables/item/weight", "tables/user_id/weight", "tables/item/momentum1/columns-0-8"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_a_run_may_change_its_number_of_ranks_again_and_again(trained, dataset, tmp_path):
    out = interrupted(trained(2)["ranking"], tmp_path / "out", step=5)
    for world_size, last in ((3, 11), (1, 14), (2, 100)):
        run_ranks(
            train_on_ranks, [(config_of(dataset, "ranking", f"trainer.max_steps={last}"), out)], world_size=world_size
        )
    assert losses(out) == pytest.approx(losses(trained(2)["ranking"]), rel=1e-5)
    assert {e: sorted(s) for e, s in audit(out).items()} == {
        e: sorted(s) for e, s in audit(trained(1)["ranking"]).items()
    }


def test_a_finished_run_is_left_as_it_is(trained, dataset, tmp_path):
    out = interrupted(trained(1)["ranking"], tmp_path / "out", step=24)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and "tensorboard" not in path.parts}
    run_ranks(train_on_ranks, [(config_of(dataset, "ranking", "checkpoint.every=5"), out)], world_size=1)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and "tensorboard" not in p.parts} == before


def test_a_finished_run_whose_test_metrics_were_cut_off_gets_them(trained, dataset, tmp_path):
    out = interrupted(trained(1)["ranking"], tmp_path / "out", step=24)
    metrics = out / "metrics.jsonl"
    text = metrics.read_text()
    whole_lines = text.splitlines(keepends=True)
    assert json.loads(whole_lines[-1])["split"] == "test"
    metrics.write_text("".join(whole_lines[:-1]) + whole_lines[-1][:20])
    run_ranks(train_on_ranks, [(config_of(dataset, "ranking", "checkpoint.every=5"), out)], world_size=1)
    assert lines(out, "test") == lines(trained(1)["ranking"], "test")
    assert lines(out) == lines(trained(1)["ranking"])


def test_without_its_manifest_a_checkpoint_is_passed_over_for_the_one_before(trained, dataset, tmp_path):
    out = interrupted(trained(2)["ranking"], tmp_path / "out", step=15)
    (checkpoint_folder(out, 15) / MANIFEST).unlink()
    assert complete_checkpoints(out)[-1] == checkpoint_folder(out, 10)
    run_ranks(train_on_ranks, [(config_of(dataset, "ranking", "checkpoint.every=5"), out)], world_size=2)
    assert lines(out) == lines(trained(2)["ranking"])
    assert not differing(final_tensors(out), final_tensors(trained(2)["ranking"]))
    assert Manifest.read(checkpoint_folder(out, 15)).problems(checkpoint_folder(out, 15)) == []


def damage_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "has another checksum than when it was written": damage_byte,
    "bytes, written were": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "is missing": Path.unlink,
}


@pytest.mark.parametrize("problem", DAMAGE)
@pytest.mark.parametrize("name", ["rank-00001.safetensors", "index.json"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_used(trained, dataset, tmp_path, capsys, problem, name):
    out = interrupted(trained(1)["ranking"], tmp_path / "out", step=10)
    shutil.copytree(checkpoint_folder(trained(2)["ranking"], 10), checkpoint_folder(out, 10), dirs_exist_ok=True)
    folder = checkpoint_folder(out, 10)
    DAMAGE[problem](folder / name)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(config_of(dataset, "ranking", "trainer.max_steps=11").to_toml())
    assert main([str(recipe), "--out", str(out)]) == 0
    told = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("ATTENTION"))
    assert told.startswith(f"ATTENTION: checkpoint {folder} is damaged: {name} ")
    assert problem in told
    assert told.endswith("; looking for the checkpoint before it")
    assert complete_checkpoints(out) == [checkpoint_folder(out, 5), checkpoint_folder(out, 11)]
    assert folder.with_name(f"damaged-{folder.name}").is_dir()


def test_a_checkpoint_that_the_disk_does_not_give_is_told_kept_and_replaced_by_its_step(
    trained, dataset, tmp_path, capsys, monkeypatch
):
    out, recipe = interrupted(trained(1)["ranking"], tmp_path / "out", step=10), tmp_path / "recipe.toml"
    folder, read, bad = checkpoint_folder(out, 10), Source._fill_at_once, [checkpoint_folder(out, k) for k in (5, 10)]
    damage_byte(folder / "rank-00000.safetensors")  # which nobody sees: what is there later, is written anew

    def fail(source, file, start, view):
        if source.folder in bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(source, file, start, view)

    monkeypatch.setattr(Source, "_fill_at_once", fail)
    settings = ("trainer.max_steps=10", "data.retry_seconds=0", "checkpoint.every=3", "checkpoint.keep_last=1")
    recipe.write_text(config_of(dataset, "ranking", *settings).to_toml())
    assert main([str(recipe), "--out", str(out)]) == 75
    assert f"error: {checkpoint_folder(out, 5)} cannot be read, and none" in capsys.readouterr().err
    assert complete_checkpoints(out) == [checkpoint_folder(out, 5), folder]
    bad.remove(checkpoint_folder(out, 5))
    assert main([str(recipe), "--out", str(out)]) == 0
    told = next(line for line in capsys.readouterr().err.splitlines() if line.startswith(f"ATTENTION: {folder}"))
    assert told.startswith(f"ATTENTION: {folder}/rank-00000.safetensors cannot be read: 1 attempt in 0 seconds failed ")
    assert told.endswith("; looking for the checkpoint before it")
    assert complete_checkpoints(out) == [folder]
    bad.clear()
    assert not differing(final_tensors(out), checkpoint_tensors(checkpoint_folder(trained(1)["ranking"], 10)))


@pytest.mark.parametrize("content", [b"{", b"\xff", b'{"step": 5}'])
def test_a_damaged_manifest_is_told_and_the_checkpoint_before_it_is_used(trained, dataset, tmp_path, capsys, content):
    out = interrupted(trained(1)["ranking"], tmp_path / "out", step=10)
    folder = checkpoint_folder(out, 10)
    shutil.copytree(checkpoint_folder(trained(1)["ranking"], 10), folder, dirs_exist_ok=True)
    (folder / "manifest.json").write_bytes(content)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(config_of(dataset, "ranking", "trainer.max_steps=11").to_toml())
    assert main([str(recipe), "--out", str(out)]) == 0
    told = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("ATTENTION"))
    assert "manifest.json is cut off, or not what was written" in told
    assert complete_checkpoints(out) == [checkpoint_folder(out, 5), checkpoint_folder(out, 11)]


def test_where_all_checkpoints_are_damaged_none_is_touched(trained, dataset, tmp_path, capsys):
    out = interrupted(trained(1)["ranking"], tmp_path / "out", step=10)
    for folder in complete_checkpoints(out):
        damage_byte(folder / "index.json")
    before = {path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(config_of(dataset, "ranking", "trainer.max_steps=11").to_toml())
    assert main([str(recipe), "--out", str(out)]) == 2
    assert "error: all 2 complete checkpoints of this run are damaged" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()} == before


def test_a_run_begins_from_an_older_checkpoint_where_the_newest_is_damaged(trained, dataset, tmp_path, capsys):
    old, recipe = tmp_path / "old", tmp_path / "recipe.toml"
    shutil.copytree(trained(1)["ranking"], old)
    damage_byte(checkpoint_folder(old, 24) / "index.json")
    config = config_of(dataset, "ranking", "trainer.max_steps=1", f"checkpoint.start_from={old}")
    recipe.write_text(config.to_toml())
    assert main([str(recipe), "--out", str(tmp_path / "new")]) == 0
    told = capsys.readouterr().err
    assert f"ATTENTION: checkpoint {checkpoint_folder(old, 24)} is damaged: index.json" in told
    assert f"beginning with the weights of {checkpoint_folder(old, 20)}\n" in told
    assert checkpoint_folder(old, 24) in complete_checkpoints(old), "another run's is only read"


def begun(configs, root):
    """By configuration: the weights and tables with which a run begins; what is said goes to a file."""
    os.dup2(os.open(root / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    world, found = World(rank=0, size=1, device=torch.device("cpu")), []
    for number, config in enumerate(configs):
        with open_run(config, root / str(number), world, fresh=True) as run:
            pieces = run.trainable.pieces(world)
            found.append({piece.name: piece.tensor.numpy().copy() for piece in pieces if "rank/" not in piece.name})
    return found


def test_a_run_begins_with_the_old_rows_of_features_that_grew_and_new_ones_fresh_but_never_rehashed(
    trained, dataset, tmp_path
):
    old = trained(1)["ranking"]
    grown = ["data.features.tab.num_values=9"]
    grown += [f"data.features.age.{part}" for part in ("kind=hash", "role=user", "num_values=9")]
    start = f"checkpoint.start_from={old}"
    configs = [config_of(dataset, "ranking", *grown), config_of(dataset, "ranking", *grown, start)]
    ((fresh, found),) = run_ranks(begun, configs, tmp_path, world_size=1)
    before = {name: tensor.numpy() for name, tensor in final_tensors(old).items()}
    expected = {name: before.get(name, values) for name, values in fresh.items() if name.startswith("weights/")}
    for name in ("content.tables.tables.0", "position.vectors"):
        name = f"weights/model.encoder.{name}.weight"
        rows = len(before[name])
        assert rows < len(fresh[name])
        expected[name] = np.concatenate([before[name], fresh[name][rows:]])
    expected |= {name: before[name] for name in ("tables/item/weight", "tables/user_id/weight")}
    expected["tables/age/weight"] = fresh["tables/age/weight"]
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    said = (tmp_path / "said").read_text().splitlines()
    told = next(line for line in said if line.startswith("not in it, and fresh: "))
    for each in ("tables/age/weight (new)", "content.tables.tables.0.weight (rows 6 to 9)", "projections.1.bias (new)"):
        assert each in told


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("data.features.user_id.num_values=60", "its table 'user_id' of hashed ids has 31 rows, this run's has 61"),
        ("model.width=16", "its weights/"),
    ],
)
def test_a_run_does_not_begin_with_weights_of_other_widths_or_rows_of_other_hashes(
    trained, dataset, tmp_path, capsys, change, problem
):
    start = ("--set", f"checkpoint.start_from={trained(1)['ranking']}")
    assert train_by_command(dataset, "ranking", tmp_path / "out", *start, "--set", change) == 2
    assert f"does not fit this run: {problem}" in capsys.readouterr().err


def test_open_metrics_go_from_one_number_of_ranks_to_another(trained, dataset, tmp_path):
    """The window over steps 5 to 8 is opened by two ranks, saved after step 6, and closed by three."""
    whole, out = trained(2)["ranking"], tmp_path / "out"
    shutil.copytree(interrupted(whole, tmp_path / "copy", step=5), out)
    for world_size, last in ((2, 7), (3, 8)):
        settings = ("trainer.log_every=4", "checkpoint.every=6", f"trainer.max_steps={last}")
        run_ranks(train_on_ranks, [(config_of(dataset, "ranking", *settings), out)], world_size=world_size)
        if last == 7:
            shutil.rmtree(checkpoint_folder(out, 7))
    samples = Counter[int]()
    for line in (line for rank in (0, 1) for line in audited_steps(whole, rank)):
        samples[line["step"]] += len(line["rows"])
    found = {line["step"]: line["loss"] for line in lines(out)}
    assert found.keys() == {1, 2, 3, 4, 5, 8}
    expected = sum(losses(whole)[step - 1] * samples[step] for step in (6, 7, 8))
    assert found[8] == pytest.approx(expected / sum(samples[step] for step in (6, 7, 8)), rel=1e-5)


def test_dropout_on_another_number_of_ranks_is_that_of_no_other_rank_step_or_seed():
    drawn = set()
    for seed, rank, step in itertools.product((0, 1), (0, 1, 2), (0, 5, 6)):
        state = TrainState(seed=seed)
        left = [{**state.rank_state(), "health": state.health.to_tensor()} for _ in range(2)]
        state.load_rank_states(left, rank=rank, world_size=3, step=step)
        first = torch.rand(4).tolist()
        state.load_rank_states(left, rank=rank, world_size=3, step=step)
        assert torch.rand(4).tolist() == first
        drawn.add(tuple(first))
    assert len(drawn) == 2 * 3 * 3


def train_by_command(dataset: Path, kind: str, out: Path, *arguments: str) -> int:
    recipe = out.with_suffix(".toml")
    recipe.write_text(config_of(dataset, kind).to_toml())
    return main([str(recipe), "--out", str(out), *arguments])


@pytest.mark.parametrize(
    "change",
    [
        "model.width=16",
        "model.num_layers=1",
        "embeddings.dim=8",
        "data.seed=3",
        "objective.tasks=['is_click']",
        "data.batch_rows=12",
    ],
)
def test_a_run_of_another_configuration_is_not_continued_and_what_differs_is_named(
    trained, dataset, tmp_path, capsys, change
):
    out = interrupted(trained(1)["ranking"], tmp_path / "out", step=5)
    kept = (out / "config.toml").read_text()
    assert train_by_command(dataset, "ranking", out, "--set", change) == 2
    told = capsys.readouterr().err
    name, _, value = change.partition("=")
    assert f"error: {out} holds a run of another configuration ({name} = {value}, was " in told
    assert told.endswith("restore those settings to continue it, or choose another --out\n")
    assert (out / "config.toml").read_text() == kept


def test_a_run_whose_checkpoints_are_not_there_is_refused_and_keeps_its_lines(trained, dataset, tmp_path, capsys):
    """An unmounted disk must not be taken for a run that has saved nothing."""
    out = interrupted(trained(1)["ranking"], tmp_path / "out", step=5)
    before = (out / "metrics.jsonl").read_bytes()
    (out / "checkpoints").rename(tmp_path / "elsewhere")
    assert train_by_command(dataset, "ranking", out) == 2
    told = capsys.readouterr().err
    assert f"error: the run in {out} saved step 5 to {out}, which holds no complete checkpoint now; mount or" in told
    assert (out / "metrics.jsonl").read_bytes() == before
    (tmp_path / "elsewhere").rename(out / "checkpoints")
    moved = out.rename(tmp_path / "moved")
    assert train_by_command(dataset, "ranking", moved, "--set", "trainer.max_steps=6") == 0


def test_a_run_that_kept_its_checkpoints_elsewhere_is_not_begun_again_without_them(dataset, tmp_path, capsys):
    out, home = tmp_path / "out", tmp_path / "home"
    settings = ("--set", "checkpoint.every=3", "--set", "trainer.max_steps=3")
    assert train_by_command(dataset, "ranking", out, *settings, "--set", f"checkpoint.path={home}") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    capsys.readouterr()
    assert train_by_command(dataset, "ranking", out, *settings) == 2
    told = (
        f"error: the run in {out} saved step 3 to {home}, and {out} holds no checkpoint; set checkpoint.path to {home} "
    )
    assert told in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_a_checkpoint_that_is_missed_is_told(trained, dataset, tmp_path, capsys):
    out = interrupted(trained(1)["ranking"], tmp_path / "out", step=10)
    shutil.rmtree(checkpoint_folder(out, 10))
    assert train_by_command(dataset, "ranking", out, "--set", "trainer.max_steps=6") == 0
    told = f"ATTENTION: the run saved step 10 to {out}, where the newest checkpoint is now that of 5\n"
    assert told in capsys.readouterr().err


def test_checkpoints_that_a_change_of_settings_will_cost_are_named_before_they_go(trained, dataset, tmp_path, capsys):
    out = interrupted(trained(1)["ranking"], tmp_path / "out", step=20)
    kept = [step_of(folder) for folder in complete_checkpoints(out)]
    going = ", ".join(map(str, kept))
    settings = ("--set", "checkpoint.keep_last=1", "--set", "trainer.max_steps=20")
    assert len(kept) > 1
    assert train_by_command(dataset, "ranking", out, *settings) == 0
    assert f"ATTENTION: the next save deletes the checkpoints of steps {going}, which" in capsys.readouterr().err
    assert [step_of(folder) for folder in complete_checkpoints(out)] == kept


def test_fresh_refuses_a_folder_that_holds_a_run(trained, dataset, tmp_path, capsys):
    out = interrupted(trained(1)["ranking"], tmp_path / "out", step=5)
    told = f"error: --fresh: {out} already holds a run; choose another --out, or delete that folder\n"
    assert train_by_command(dataset, "ranking", out, "--fresh") == 2
    assert told in capsys.readouterr().err
    shutil.rmtree(out / "checkpoints")
    assert train_by_command(dataset, "ranking", out, "--fresh") == 2
    assert told in capsys.readouterr().err


def refusal(dataset, out):
    with pytest.raises(RuntimeError) as caught:
        run_ranks(train_on_ranks, [(config_of(dataset, "ranking"), out)], world_size=1)
    return str(caught.value).strip().splitlines()[-1]


def test_a_run_is_not_continued_on_another_dataset_nor_its_tables_loaded_into_others(trained, dataset, tmp_path):
    out = interrupted(trained(1)["ranking"], tmp_path / "out", step=5)
    other = tmp_path / "other" / "dataset"
    shutil.copytree(dataset, other)
    info = json.loads((other / "dataset.json").read_text())
    info["vocabularies"]["items"]["size"] += 7
    (other / "dataset.json").write_text(json.dumps(info))
    told = refusal(other, out)
    assert f"UserError: {out} holds a run on another dataset than {other} is now" in told
    assert told.endswith("restore the dataset to continue it, or choose another --out")

    folder = checkpoint_folder(out, 5)
    dataclasses.replace(Manifest.read(folder), dataset=DatasetInfo.load(other).fingerprint).write(folder)
    told = refusal(other, out)
    assert f"UserError: checkpoint {folder} does not fit this run: " in told
    assert told.endswith("; it was written for other tables or another model")
