"""Saving beside training: what fails is told and costs nothing else; what is kept; checkpoints in an object store."""

import argparse
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from moto.server import ThreadedMotoServer
from process_group import limit_files, run_ranks, writer_processes
from small_runs import checkpoint_tensors, config_of, differing, final_tensors, lines, losses, train_on_ranks

from ultrarec.data.errors import UserError
from ultrarec.trainer import checkpoint_command, loop, manifest
from ultrarec.trainer import saver as saver_module
from ultrarec.trainer.__main__ import main
from ultrarec.trainer.config import CheckpointConfig
from ultrarec.trainer.manifest import (
    Manifest,
    all_checkpoints,
    checkpoint_folder,
    complete_checkpoints,
    discard,
    step_of,
)
from ultrarec.trainer.parallel import World
from ultrarec.trainer.pieces import Piece
from ultrarec.trainer.retention import kept_steps, ranked, retain, scores, set_aside, worth_keeping
from ultrarec.trainer.saver import Saver
from ultrarec.trainer.state import TrainState
from ultrarec.trainer.storage import location, put


def train_here(config, out: Path, recipe: Path) -> int:
    """What `ultrarec train` does in one process."""
    recipe.write_text(config.to_toml())
    return main([str(recipe), "--out", str(out)])


def command_line():
    """`ultrarec checkpoint`."""
    parser = argparse.ArgumentParser()
    checkpoint_command.add_arguments(parser)
    return lambda *words: checkpoint_command.run(parser.parse_args([str(word) for word in words]))


def saved_steps(home) -> list[int]:
    return [step_of(folder) or 0 for folder in complete_checkpoints(home)]


def train_with_little_room(runs, full_from, full_to):
    """Trains, while rank 1 cannot write files of more than 100 kB for some of the steps."""
    record = loop.record

    def record_and_fill(run, step):
        record(run, step)
        is_full = dist.get_rank() == 1 and full_from <= run.state.step < full_to
        run.saver.wait()
        limit_files(100_000 if is_full else resource.RLIM_INFINITY)

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
    assert f"CHECKPOINT OF STEP 4 NOT WRITTEN to {folder}: rank 0: Not a directory; the last complete" in told
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


@pytest.mark.parametrize(
    ("metric", "best"), [("loss", 2), ("ne/a", 3), ("auc/a", 1), ("unknown", None), (None, 2)], ids=str
)
def test_the_metric_tells_which_is_best(metric, best):
    validations = {
        1: {"loss": 0.5, "ne/a": 0.9, "ne/b": 0.9, "auc/a": 0.8},
        2: {"loss": 0.4, "ne/a": 0.8, "ne/b": 0.7, "auc/a": 0.7},
        3: {"loss": 0.6, "ne/a": 0.7, "ne/b": 0.9, "auc/a": None},
        4: {"loss": None, "ne/a": None, "ne/b": 0.1, "auc/a": None},
    }
    known = scores(validations, metric)
    assert 4 not in known
    assert next(iter(ranked(list(known), known)), None) == best


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
    # A save begins when nothing else is being written: storage may be slow.
    settings = ("checkpoint.every=12", "checkpoint.keep_last=1", f"checkpoint.path={address('bucket/run')}")
    out, recipe = tmp_path / "out", tmp_path / "recipe.toml"
    assert train_here(config_of(dataset, "ranking", *settings, "trainer.max_steps=12"), out, recipe) == 0
    assert saved_steps(home) == [12]
    assert all_checkpoints(home) == complete_checkpoints(home)
    assert not (out / "checkpoints").exists()
    assert train_here(config_of(dataset, "ranking", *settings), out, recipe) == 0
    assert saved_steps(home) == [24]
    assert "continuing from s3://bucket/run/checkpoints/step-00000012" in capsys.readouterr().err
    assert lines(out) == lines(trained(1)["ranking"])
    assert not differing(final_tensors(home), final_tensors(trained(1)["ranking"]))


def test_commands_read_an_object_store_as_they_read_a_folder(trained, dataset, tmp_path, object_store, capsys):
    _, address = object_store
    home = location(address("shelf/run"))
    home.filesystem.create_dir("shelf")
    source = trained(2)["ranking"]
    for folder in complete_checkpoints(source)[-2:]:
        for path in folder.iterdir():
            put(home / "checkpoints" / folder.name / path.name, path.read_bytes())
    command = command_line()
    assert command("verify", address("shelf/run")) == 0
    assert command("list", address("shelf/run")) == 0
    printed = capsys.readouterr().out
    assert printed.count("s3://shelf/run/checkpoints/step-000000") == 4
    assert command("diff", address("shelf/run"), source) == 0
    assert command("export", address("shelf/run"), "--out", tmp_path / "export", "--dataset", dataset) == 0
    (home / "checkpoints" / "step-00000024" / "rank-00001.safetensors").unlink()
    assert command("verify", address("shelf/run")) == 1
    assert "rank-00001.safetensors is missing" in capsys.readouterr().out
    set_aside(home / "checkpoints" / "step-00000024")
    assert saved_steps(home) == [20]
    assert retain(home, CheckpointConfig(), {}) == {20}


def piece(value: float) -> list[Piece]:
    """What a rank saves in tests of the saver alone."""
    return [Piece.whole(f"rank/{dist.get_rank()}/values", torch.full((10,), value))]


def new_saver(home: Path, said: list[str], *, is_prepared: bool = True, **settings) -> Saver:
    world = World(rank=dist.get_rank(), size=dist.get_world_size(), device=torch.device("cpu"))
    settings = {"config_hash": "", "dataset": "", **settings}
    saver = Saver(CheckpointConfig(every=1), home, world, say=said.append, **settings)
    if is_prepared:
        saver.prepare(piece(0.0))
    return saver


def signal_writer(number: int, *, rank: int = 1) -> None:
    """A signal to the process that writes one rank's file: with SIGSTOP, storage that hangs."""
    if dist.get_rank() == rank:
        for pid in writer_processes():
            os.kill(pid, number)


def save_onto_slow_storage(home: Path):
    """Rank 1's storage hangs; what the saves of two steps return, take and say."""
    saver_module.PATIENCE_SECONDS = 0.2
    said: list[str] = []
    saver = new_saver(home, said)
    saver.save(piece(1), TrainState(step=1), sync=[])
    saver.wait()
    signal_writer(signal.SIGSTOP)
    seconds = []
    for step in (2, 3, 4):
        started = time.monotonic()
        saver.save(piece(step), TrainState(step=step), sync=[])
        seconds.append(time.monotonic() - started)
        time.sleep(0.2)
    dist.barrier()
    complete = saved_steps(home)
    dist.barrier()
    signal_writer(signal.SIGCONT)
    error = saver.wait()
    saver.close()
    return seconds, said, complete, error, saver.failures


def test_a_step_waits_for_no_storage_and_a_save_that_is_overtaken_is_left_out(tmp_path):
    for seconds, said, complete, error, failures in run_ranks(save_onto_slow_storage, tmp_path, world_size=2):
        assert max(seconds) < 10
        first, second = said
        assert first.startswith("checkpoint of step 3 left out: that of step 2 is still being written to ")
        assert second.startswith("checkpoint of step 4 left out: that of step 2 is still being written to ")
        assert (complete, error, failures) == ([1], None, 2)
    assert saved_steps(tmp_path) == [1, 2]
    for values in checkpoint_tensors(checkpoint_folder(tmp_path, 2)).values():
        assert torch.equal(values, torch.full((10,), 2.0)), "the state of the step that was saved"


def lose_a_writer(home: Path):
    """Rank 1's writing process is killed in the middle of the second of three saves."""
    said: list[str] = []
    saver = new_saver(home, said)
    errors = []
    for step in (1, 2, 3):
        if step == 2:
            signal_writer(signal.SIGSTOP)
        saver.save(piece(step), TrainState(step=step), sync=[])
        if step == 2:
            signal_writer(signal.SIGKILL)
        errors.append(saver.wait())
    saver.close()
    return errors, said, saver.failures, writer_processes()


def test_a_writing_process_that_dies_costs_one_save_and_that_loudly(tmp_path):
    problem = "rank 1: the process that writes its file died"
    for errors, said, failures, left in run_ranks(lose_a_writer, tmp_path, world_size=2):
        assert errors == [None, problem, None]
        assert len(said) == failures == 1
        assert said[0].startswith("CHECKPOINT OF STEP 2 NOT WRITTEN to ")
        assert left == []
    assert saved_steps(tmp_path) == [1, 3]


def save_onto_storage_that_hangs(home: Path):
    """Rank 1's storage takes nothing of the second and fourth of five saves; the fourth is not waited for."""
    saver_module.PATIENCE_SECONDS = 0.1
    said: list[str] = []
    saver = new_saver(home, said, limit_seconds=2.0)
    errors = []
    started = time.monotonic()
    for step in (1, 2, 3):
        if step == 2:
            signal_writer(signal.SIGSTOP)
        saver.save(piece(step), TrainState(step=step), sync=[])
        errors.append(saver.wait())
    signal_writer(signal.SIGSTOP)
    for step in (4, 5):
        saver.save(piece(step), TrainState(step=step), sync=[])
        time.sleep(2.2 if step == 4 else 0)
    errors.append(saver.wait())
    saver.close()
    return errors, said, saver.failures, time.monotonic() - started, writer_processes()


def test_storage_that_hangs_costs_the_save_that_it_keeps_longer_than_the_limit_and_no_later_one(tmp_path):
    problem = "storage did not take it within 2 s (trainer.timeout_seconds)"
    for errors, said, failures, seconds, left in run_ranks(save_onto_storage_that_hangs, tmp_path, world_size=2):
        assert errors == [None, problem, None, None]
        told = [f"CHECKPOINT OF STEP {k} NOT WRITTEN to {checkpoint_folder(tmp_path, k)}: {problem}; " for k in (2, 4)]
        assert [line[: len(start)] for line, start in zip(said, told, strict=True)] == told
        assert failures == 2
        assert seconds < 20
        assert left == []
    assert saved_steps(tmp_path) == [3, 5]


def save_again(home: Path, config_hash: str):
    """A later process saves a step that has a complete checkpoint, with other values; what it is told."""
    said: list[str] = []
    saver = new_saver(home, said, config_hash="mine")
    saver.save(piece(1), TrainState(step=1), sync=[])
    first = saver.wait()
    saver.close()
    saver = new_saver(home, said, config_hash=config_hash)
    had = saver.has(1)
    saver.save(piece(2), TrainState(step=1), sync=[])
    second = saver.wait()
    saver.close()
    return first, had, second


@pytest.mark.parametrize("config_hash", ["mine", "of another run"])
def test_a_complete_checkpoint_is_never_deleted_to_save_its_step_again(tmp_path, config_hash):
    ((first, had, second),) = run_ranks(save_again, tmp_path, config_hash, world_size=1)
    if config_hash == "mine":
        assert (first, had, second) == (None, True, None)
    else:
        assert (first, had) == (None, False)
        assert second.endswith("is a checkpoint of another run; give each run a checkpoint.path of its own")
    assert saved_steps(tmp_path) == [1]
    for values in checkpoint_tensors(checkpoint_folder(tmp_path, 1)).values():
        assert torch.equal(values, torch.full((10,), 1.0))


def test_a_kill_while_a_checkpoint_is_deleted_leaves_none_that_counts_as_complete(tmp_path, monkeypatch):
    put_manifest(tmp_path / "step-00000001")

    def die(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest, "remove_tree", die)
    with pytest.raises(KeyboardInterrupt):
        discard(tmp_path / "step-00000001")
    assert list((tmp_path / "step-00000001").iterdir()) == []


def lack_memory(home: Path):
    """Rank 1 can have no memory for its copy: at the start, then at a save, then no longer."""
    said: list[str] = []
    saver = new_saver(home, said, is_prepared=False)
    if dist.get_rank() == 1:
        limit_files(10)  # what shared memory may hold counts as a file
    try:
        saver.prepare(piece(0.0))
        refusal = ""
    except UserError as error:
        refusal = str(error)
    errors = []
    for step in (1, 2):
        saver.save(piece(float(step)), TrainState(step=step), sync=[])
        errors.append(saver.wait())
        limit_files(resource.RLIM_INFINITY)
    saver.close()
    return refusal, errors, said


def test_memory_that_one_rank_lacks_is_told_on_all_before_the_first_step_and_costs_only_saves_later(tmp_path):
    problem = "rank 1 has no memory for a copy of its 40 bytes: File too large"
    for refusal, errors, said in run_ranks(lack_memory, tmp_path, world_size=2):
        assert refusal.startswith(problem)
        assert errors == [problem, None]
        assert len(said) == 1
        assert said[0].startswith("CHECKPOINT OF STEP 1 NOT WRITTEN to ")
    assert saved_steps(tmp_path) == [2]


def at_steps(monkeypatch, **actions):
    """Does something after some steps of runs in this process, before what is due at them: `s4=...` after step 4."""
    record = loop.record

    def record_and_act(run, step):
        record(run, step)
        if (action := actions.get(f"s{run.state.step}")) is not None:
            action(run)

    monkeypatch.setattr(loop, "record", record_and_act)


def to_writers(number: int):
    return lambda run=None: [os.kill(pid, number) for pid in writer_processes()]


def test_the_last_step_is_saved_however_slow_the_save_before_it(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(saver_module, "PATIENCE_SECONDS", 0.0)
    continue_later = threading.Timer(1.5, to_writers(signal.SIGCONT))
    at_steps(monkeypatch, s2=to_writers(signal.SIGSTOP), s4=lambda run: continue_later.start())
    config = config_of(dataset, "ranking", "checkpoint.every=2", "trainer.max_steps=4")
    assert train_here(config, tmp_path / "out", tmp_path / "recipe.toml") == 0
    continue_later.join()
    assert saved_steps(tmp_path / "out") == [2, 4]


def test_an_object_store_that_is_away_at_the_end_or_the_start_ends_no_job_for_good(
    dataset, tmp_path, monkeypatch, capsys
):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, server._port = server.get_host_and_port()  # it shall come back at the same place
    address = f"s3://key:secret@cellar/run?endpoint_override=http%3A%2F%2F127.0.0.1%3A{server._port}&region=us-east-1"
    home = location(address + "&allow_bucket_creation=true")
    home.filesystem.create_dir("cellar")

    def take_away(run):
        run.saver.wait()
        server.stop()
        server._server.server_close()

    def train(retry_seconds):
        settings = ("checkpoint.every=2", "trainer.max_steps=4", f"data.retry_seconds={retry_seconds}")
        config = config_of(dataset, "ranking", *settings, f"checkpoint.path={address}")
        code = train_here(config, tmp_path / "out", tmp_path / "recipe.toml")
        return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]

    (tmp_path / "attempt_0" / "0").mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / "0" / "error.json"))
    with monkeypatch.context() as patched:
        at_steps(patched, s4=take_away)
        code, (told,) = train(0)
    assert code == 75
    assert told.startswith("error: the last step's checkpoint could not be written to s3://cellar/run: rank 0: ")
    code, (told,) = train(0)
    assert code == 75
    assert told.startswith("error: s3://cellar/run/checkpoints cannot be read: 1 attempt in ")
    assert "secret" not in told
    back = threading.Timer(1.0, server.start)
    back.start()
    try:
        assert train(60) == (0, [])
        assert saved_steps(home) == [2, 4]
    finally:
        back.join()
        server.stop()


def test_training_goes_on_while_the_object_store_is_away_and_saves_again_when_it_is_back(
    trained, dataset, tmp_path, monkeypatch, capsys
):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, server._port = server.get_host_and_port()  # it shall come back at the same place
    address = f"s3://key:secret@attic/run?endpoint_override=http%3A%2F%2F127.0.0.1%3A{server._port}&region=us-east-1"
    home = location(address + "&allow_bucket_creation=true")
    home.filesystem.create_dir("attic")
    listed = []

    def take_away(run):
        server.stop()
        to_writers(signal.SIGCONT)()  # the save of step 10 is under way

    def bring_back(run):
        run.saver.wait()
        server.start()
        listed.extend(saved_steps(home))

    def wait(run):
        run.saver.wait()

    stop_writer = to_writers(signal.SIGSTOP)
    at_steps(monkeypatch, s6=wait, s10=stop_writer, s11=take_away, s14=bring_back, s19=wait)
    settings = ("checkpoint.every=5", "checkpoint.keep_last=9", f"checkpoint.path={address}")
    out = tmp_path / "out"
    try:
        assert train_here(config_of(dataset, "ranking", *settings), out, tmp_path / "recipe.toml") == 0
        assert "CHECKPOINT OF STEP 10 NOT WRITTEN to s3://attic/run/checkpoints/step-00000010: rank 0: " in (
            capsys.readouterr().err
        )
        assert listed == [5]
        assert saved_steps(home) == [5, 15, 20, 24]
        assert all_checkpoints(home) == complete_checkpoints(home)
        assert losses(out) == losses(trained(1)["ranking"])
        assert not differing(final_tensors(home), final_tensors(trained(1)["ranking"]))
    finally:
        server.stop()


def test_the_best_so_far_is_part_of_a_checkpoint_and_goes_where_it_goes(dataset, tmp_path):
    settings = ["checkpoint.every=2", "trainer.evaluate_every=2", "checkpoint.keep_last=1", "checkpoint.keep_best=1"]
    settings += ["checkpoint.best_metric=loss", "optimizer.lr=0.1"]
    out, copy, recipe = tmp_path / "out", tmp_path / "copy", tmp_path / "recipe.toml"
    assert train_here(config_of(dataset, "ranking", *settings, "trainer.max_steps=8"), out, recipe) == 0
    loss = {line["step"]: line["loss"] for line in lines(out, "validation")}
    best = min(loss, key=loss.get)
    newest = Manifest.read(checkpoint_folder(out, 8))
    assert {step: values["loss"] for step, values in newest.validations.items()}[best] == loss[best]
    assert len(newest.validations) <= 3, "those of checkpoints that are kept, this one and the best"
    for step in (best, 8):
        shutil.copytree(checkpoint_folder(out, step), checkpoint_folder(copy, step), dirs_exist_ok=True)
    assert train_here(config_of(dataset, "ranking", *settings, "trainer.max_steps=12"), copy, recipe) == 0
    loss |= {line["step"]: line["loss"] for line in lines(copy, "validation")}
    still_best = min(loss, key=loss.get)
    assert saved_steps(copy) == sorted({still_best, 12})
    assert Manifest.read(checkpoint_folder(copy, 12)).validations[still_best]["loss"] == loss[still_best]


def test_a_checkpoint_remembers_validations_of_kept_steps_of_later_ones_and_the_best():
    validations = {step: {"ndcg@10": score} for step, score in [(1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3), (5, None)]}
    config = CheckpointConfig()
    assert worth_keeping(validations, config, kept={3, 4}).keys() == {2, 3, 4, 5}
    assert worth_keeping(validations, config, kept=None) == validations


def test_of_checkpoints_set_aside_the_newest_stays_and_none_counts_as_complete(tmp_path):
    for step in range(1, 7):
        put_manifest(checkpoint_folder(tmp_path, step))
    for step in (5, 4):
        set_aside(checkpoint_folder(tmp_path, step))
    assert saved_steps(tmp_path) == [1, 2, 3, 6]
    assert retain(tmp_path, CheckpointConfig(keep_last=2), {}) == {3, 6}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "step-00000003",
        "step-00000006",
        "damaged-step-00000005",
    }


def test_a_checkpoint_that_the_storage_did_not_give_supersedes_none(tmp_path):
    for step in range(1, 5):
        put_manifest(checkpoint_folder(tmp_path, step))
    assert retain(tmp_path, CheckpointConfig(keep_last=1), {}, unreadable={4}) == {3}
    assert saved_steps(tmp_path) == [3, 4]


def put_manifest(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
