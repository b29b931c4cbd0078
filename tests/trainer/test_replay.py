"""`ultrarec replay`: a step of a run again, with the very numbers that the run had, and without touching it."""

import contextlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from process_group import run_ranks
from small_runs import KINDS, config_of, lines, train_on_ranks

from ultrarec.data.errors import UserError
from ultrarec.trainer import parallel, replay_command
from ultrarec.trainer import run as opening
from ultrarec.trainer.config import load_config
from ultrarec.trainer.journal import METRICS_FILE
from ultrarec.trainer.parallel import World

SETTINGS = ("model.dropout=0.3", "checkpoint.every=5", "trainer.max_steps=12")
STEPS = (1, 8)


def replayed(out: Path, step: int, *settings: str) -> str:
    """What the command prints on this rank, in the group that the test has made."""

    @contextlib.contextmanager
    def joined(config):
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), device=torch.device("cpu"))

    shown = io.StringIO()
    with patch.object(parallel, "join", joined), contextlib.redirect_stdout(shown):
        replay_command.run(Namespace(run_dir=out, step=step, set=list(settings)))
    return shown.getvalue()


def replayed_each(jobs: list[tuple[Path, int]]) -> list[str]:
    return [replayed(out, step) for out, step in jobs]


def content(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def replays(dataset, tmp_path_factory):
    """By kind, a run on two ranks and its files; by kind and step, what each rank prints when it is replayed."""
    root = tmp_path_factory.mktemp("replayed")
    runs = {kind: root / kind for kind in KINDS}
    run_ranks(train_on_ranks, [(config_of(dataset, kind, *SETTINGS), out) for kind, out in runs.items()], world_size=2)
    before = {kind: content(out) for kind, out in runs.items()}
    cases = [(kind, step) for kind in KINDS for step in STEPS]
    shown = run_ranks(replayed_each, [(runs[kind], step) for kind, step in cases], world_size=2)
    return runs, before, dict(zip(cases, zip(*shown, strict=True), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_a_replayed_step_has_the_numbers_of_the_run_and_names_its_rows(replays, kind, step):
    runs, before, printed = replays
    shown, silent = printed[kind, step]
    assert silent == ""
    line = lines(runs[kind])[step - 1]
    assert f"step {step}: loss {line['loss']:.6g}, dense gradient norm {line['grad_norm']:.6g}," in shown
    assert "faults: none" in shown
    assert "not finite, in the order of computing: 0" in shown
    rows = [row.split() for row in shown.split("samples by loss")[1].split("gradients by")[0].splitlines()[3:] if row]
    total = sum(float(row[0]) * int(row[1]) for row in rows)
    labels = sum(int(row[1]) for row in rows)
    if len(rows) < 20:  # all are shown
        assert total / labels == pytest.approx(line["loss"], rel=1e-3)
    assert [float(row[0]) for row in rows] == sorted((float(row[0]) for row in rows), reverse=True)
    assert re.search(r"\d  embeddings of 'item'", shown)
    assert content(runs[kind]) == before[kind]


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory):
    """A run on one rank, which tests read and copy."""
    out = tmp_path_factory.mktemp("alone") / "out"
    run_ranks(train_on_ranks, [(config_of(dataset, "ranking", *SETTINGS), out)], world_size=1)
    return out


def test_replay_passes_over_a_damaged_checkpoint_and_leaves_it_as_it_is(alone, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(alone, out)
    (shard,) = (out / "checkpoints" / "step-00000010").glob("*.safetensors")
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    before = content(out)
    ((whole, passed_over),) = run_ranks(replayed_each, [(alone, 11), (out, 11)], world_size=1)
    assert passed_over == whole
    assert content(out) == before


def replayed_with_an_infinite_weight(out: Path, step: int) -> tuple[str, str]:
    take_up, broken = opening._take_up, []

    def break_one(trainable, *args, **keywords):
        found = take_up(trainable, *args, **keywords)
        name, weight = next(iter(trainable.optimizer.dense.items()))
        broken.append(name)
        with torch.no_grad():
            weight.fill_(math.inf)
        return found

    with patch.object(opening, "_take_up", break_one):
        return replayed(out, step), broken[0]


def test_what_is_not_finite_is_named_in_the_order_of_computing(alone):
    ((shown, name),) = run_ranks(replayed_with_an_infinite_weight, alone, 7, world_size=1)
    assert "faults: rank 0: the loss\n" in shown
    listed = shown.split("in the order of computing: ")[1].splitlines()[1:]
    assert listed[0] == f"  rank 0: weight {name}"
    assert listed[1].startswith("  rank 0: output of model.encoder.")


@pytest.mark.parametrize(("step", "said"), [(0, "steps are counted from 1"), (13, "step 13: the run has 12 steps")])
def test_a_step_that_the_run_does_not_have_is_refused(alone, step, said):
    with pytest.raises(RuntimeError, match=said):
        run_ranks(replayed, alone, step, world_size=1)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no run folder: it has no config\.toml; check the path"):
        replay_command.run(Namespace(run_dir=tmp_path, step=1, set=[]))
    assert not (tmp_path / METRICS_FILE).exists()


def replay_by_command(out: Path, step: int, *settings: str) -> tuple[int, str]:
    """Exit code and messages of the command, which must not have loaded torch."""
    script = (
        "import sys\nfrom ultrarec.launch.cli import main\n"
        "code = main(['replay', *sys.argv[1:]])\nsys.exit(99 if 'torch' in sys.modules else code)"
    )
    command = [
        sys.executable,
        "-c",
        script,
        str(out),
        str(step),
        *(word for each in settings for word in ("--set", each)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stderr


def test_another_dataset_or_a_step_that_never_was_is_refused_before_anything_heavy_is_loaded(trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained(1)["ranking"], out)
    code, said = replay_by_command(out, 25)
    assert (code, said) == (2, f"error: step 25: {out} has come to step 24; choose one from 1 to 24\n")
    path = load_config(str(out / "config.toml")).data.path
    other = tmp_path / "other" / "dataset"
    shutil.copytree(path, other)
    info = json.loads((other / "dataset.json").read_text())
    info["vocabularies"]["items"]["size"] += 7
    (other / "dataset.json").write_text(json.dumps(info))
    (out / "config.toml").write_text((out / "config.toml").read_text().replace(path, str(other)))
    code, said = replay_by_command(out, 3)
    assert code == 2
    assert said.startswith(f"error: {out} was trained on another dataset than {other} is now (fingerprints ")
    assert said.endswith("; restore that dataset to replay the run\n")


def test_a_step_behind_the_last_line_of_a_run_that_broke_off_may_have_been_trained(tmp_path, trained):
    out = tmp_path / "out"
    shutil.copytree(trained(1)["ranking"], out)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 22))
    shutil.rmtree(out / "checkpoints" / "step-00000024")
    assert "step 23: loss " in run_ranks(replayed, out, 23, world_size=1)[0]
    assert replay_by_command(out, 24)[1] == f"error: step 24: {out} has come to step 22; choose one from 1 to 22\n"


def test_replay_finds_the_dataset_where_it_is_said_to_be(dataset, trained, tmp_path):
    out, moved = tmp_path / "out", tmp_path / "moved"
    shutil.copytree(trained(1)["ranking"], out)
    shutil.copytree(dataset, moved)
    file = out / "config.toml"
    file.write_text(file.read_text().replace(str(dataset), str(tmp_path / "gone")))
    code, said = replay_by_command(out, 3)
    assert (code, str(tmp_path / "gone") in said) == (2, True)
    (shown,) = run_ranks(replayed, out, 3, f"data.path={moved}", world_size=1)
    assert f"step 3: loss {lines(out)[2]['loss']:.6g}, " in shown


@pytest.mark.parametrize("setting", ["data.batch_rows=25", "optimizer.lr=0.5", "trainer.seed=9"])
def test_settings_that_would_make_it_another_step_are_refused(trained, setting):
    out = trained(1)["ranking"]
    code, said = replay_by_command(out, 3, setting)
    assert code == 2
    assert said.startswith(f"error: --set {setting.partition('=')[0]}: the step would not be that of {out}, ")


def test_replay_repeats_no_key_and_waits_for_storage_as_long_as_it_is_told(trained):
    address = "s3://AKIAKEY:tops3cret@logs/shop?scheme=http&endpoint_override=127.0.0.1:1&region=us-east-1"
    code, said = replay_by_command(trained(1)["ranking"], 3, f"data.path={address}", "data.retry_seconds=0")
    assert code == 75
    assert "error: s3://logs/shop/dataset.json cannot be read: 1 attempt in " in said
    assert "AKIAKEY" not in said
    assert "s3cret" not in said
