"""Saving beside training: what fails is told and costs nothing else; what is kept; checkpoints in an object store."""

import resource
from pathlib import Path

import pytest
import torch.distributed as dist
from moto.server import ThreadedMotoServer
from process_group import run_ranks
from small_runs import config_of, differing, final_tensors, lines, losses, train_on_ranks

from ultrarec.trainer.__main__ import main
from ultrarec.trainer.config import CheckpointConfig
from ultrarec.trainer.manifest import all_checkpoints, checkpoint_folder, complete_checkpoints, step_of
from ultrarec.trainer.retention import kept_steps
from ultrarec.trainer.storage import location


def train_here(config, out: Path, recipe: Path) -> int:
    """What `ultrarec train` does in one process."""
    recipe.write_text(config.to_toml())
    return main([str(recipe), "--out", str(out)])


def saved_steps(home) -> list[int]:
    return [step_of(folder) or 0 for folder in complete_checkpoints(home)]


def train_with_little_room(runs, full_from, full_to):
    """Trains, while rank 1 cannot write files of more than 100 kB for some of the steps."""
    from ultrarec.trainer import loop

    record, room = loop.record, resource.getrlimit(resource.RLIMIT_FSIZE)

    def record_and_fill(run, step):
        record(run, step)
        is_full = dist.get_rank() == 1 and full_from <= run.state.step < full_to
        if not is_full:
            run.saver.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, room[1]) if is_full else room)

    loop.record = record_and_fill
    train_on_ranks(runs)


def test_when_the_disk_of_one_rank_is_full_training_goes_on_and_its_last_checkpoint_stands(trained, dataset, tmp_path):
    settings = ("checkpoint.every=5", "checkpoint.keep_last=1", "trainer.log_every=1")
    config, out = config_of(dataset, "columns", *settings), tmp_path / "out"
    run_ranks(train_with_little_room, [(config, out)], 10, 19, world_size=2)
    # Steps 10 and 15 found no room; in between, 5 was the newest and was not deleted.
    assert [line.get("failed_saves") for line in lines(out)][-1] == 2
    assert saved_steps(out) == [24]
    assert losses(out) == losses(trained(2)["columns"])
    assert not differing(final_tensors(out), final_tensors(trained(2)["columns"]))


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_that_says_what_to_do(dataset, tmp_path, capsys):
    out = tmp_path / "out"
    folder = checkpoint_folder(out, 4)
    folder.parent.mkdir(parents=True)
    folder.write_text("no folder")
    config = config_of(dataset, "ranking", "checkpoint.every=2", "trainer.max_steps=4")
    assert train_here(config, out, tmp_path / "recipe.toml") == 2
    told = capsys.readouterr().err
    assert f"CHECKPOINT OF STEP 4 NOT WRITTEN to {folder}: rank 0: Not a directory; training goes on" in told
    assert f"error: the last step's checkpoint could not be written to {out}: rank 0: Not a directory" in told
    assert saved_steps(out) == [2]
    folder.unlink()
    assert train_here(config, out, tmp_path / "recipe.toml") == 0
    assert saved_steps(out) == [2, 4]


def test_a_synchronous_save_is_the_same_as_an_asynchronous_one(trained, dataset, tmp_path):
    settings = ("checkpoint.every=5", "checkpoint.asynchronous=false")
    run_ranks(train_on_ranks, [(config_of(dataset, "ranking", *settings), tmp_path / "out")], world_size=2)
    for found, expected in zip(
        complete_checkpoints(tmp_path / "out"), complete_checkpoints(trained(2)["ranking"]), strict=True
    ):
        for name in ("rank-00000.safetensors", "rank-00001.safetensors", "index.json"):
            assert (found / name).read_bytes() == (expected / name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep_last": 1}, [60]),
        ({"keep_last": 2}, [50, 60]),
        ({"keep_last": 1, "keep_every": 20}, [20, 40, 60]),
        ({"keep_last": 1, "keep_best": 1}, [30, 60]),
        ({"keep_last": 1, "keep_best": 2, "keep_every": 50}, [30, 40, 50, 60]),
    ],
)
def test_each_setting_keeps_its_own_checkpoints_and_no_others(settings, kept):
    scores = {10: 0.1, 20: 0.3, 25: 0.9, 30: 0.4, 40: 0.4 - 1e-9, 60: 0.2}
    steps = [10, 20, 30, 40, 50, 60]
    assert sorted(kept_steps(steps, CheckpointConfig(**settings), scores=scores)) == kept


@pytest.mark.parametrize(("metric", "best"), [("loss", min), ("auc/is_click", max), (None, min)])
def test_the_best_checkpoint_is_kept_however_old(dataset, tmp_path, metric, best):
    out = tmp_path / "out"
    settings = ["checkpoint.every=2", "trainer.evaluate_every=2", "checkpoint.keep_last=1", "checkpoint.keep_best=1"]
    settings += [f"checkpoint.best_metric={metric}"] if metric else []
    settings += ["trainer.max_steps=8", "optimizer.lr=0.1"]
    assert train_here(config_of(dataset, "ranking", *settings), out, tmp_path / "recipe.toml") == 0

    def value(line):
        return line[metric] if metric else line["ne/is_click"] + line["ne/long_view"]

    expected = best(lines(out, "validation"), key=value)["step"]
    assert saved_steps(out) == sorted({expected, 8})
    assert all_checkpoints(out) == complete_checkpoints(out)


@pytest.fixture(scope="module")
def object_store():
    """An S3 server on this machine, and the options by which pyarrow reaches it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    options = f"endpoint_override=http%3A%2F%2F127.0.0.1%3A{port}&region=us-east-1&allow_bucket_creation=true"
    yield server, lambda path: f"s3://key:secret@{path}?{options}"
    server.stop()


def test_a_run_saves_to_an_object_store_and_continues_from_it(trained, dataset, tmp_path, object_store, capsys):
    _, address = object_store
    home = location(address("bucket/run"))
    home.filesystem.create_dir("bucket")
    settings = ("checkpoint.every=5", "checkpoint.keep_last=2", f"checkpoint.path={address('bucket/run')}")
    out, recipe = tmp_path / "out", tmp_path / "recipe.toml"
    assert train_here(config_of(dataset, "ranking", *settings, "trainer.max_steps=12"), out, recipe) == 0
    assert saved_steps(home) == [10, 12]
    assert all_checkpoints(home) == complete_checkpoints(home)
    assert not (out / "checkpoints").exists()
    assert train_here(config_of(dataset, "ranking", *settings), out, recipe) == 0
    assert saved_steps(home) == [20, 24]
    assert "continuing from s3://bucket/run/checkpoints/step-00000012" in capsys.readouterr().err
    assert lines(out) == lines(trained(1)["ranking"])
    assert not differing(final_tensors(home), final_tensors(trained(1)["ranking"]))


def test_an_object_store_that_goes_away_costs_checkpoints_only(dataset, tmp_path, capsys):
    settings = (
        "checkpoint.every=5",
        "checkpoint.path=s3://key:secret@bucket/run?endpoint_override=http%3A%2F%2F127.0.0.1%3A9&region=x",
    )
    out = tmp_path / "out"
    assert train_here(config_of(dataset, "ranking", *settings), out, tmp_path / "recipe.toml") == 2
    assert "error: cannot" in capsys.readouterr().err
