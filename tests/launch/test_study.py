"""`ultrarec study`: what it trains, what it keeps, and what it writes down."""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import NEXT_ITEM, make_dataset

from ultrarec.data.atomic import run_until_signalled
from ultrarec.data.errors import UserError
from ultrarec.launch import cli
from ultrarec.launch.study import command, compute, page, results, runs
from ultrarec.launch.study.config import ComputeStudy, QualityStudy, list_studies, load_study
from ultrarec.launch.study.runs import _cost, _result, _run, finished, runs_of
from ultrarec.trainer.journal import read_lines

# Of four evaluated steps the third is the best on validation, so that the last one is not what must be reported.
STUDY = """
kind = "quality"
title = "A small study"
about = "Nothing to learn here."
prepare = "ultrarec prepare small.csv"
checkpoint = "best"
metrics = ["hr@10", "mrr"]

[variants.one]
label = "the first"
recipe = "{recipe}"
set = ["data.batch_rows=20", "trainer.epochs=4", "trainer.evaluate_every=3", "checkpoint.every=3",
       "checkpoint.keep_last=1", "checkpoint.keep_best=1"]

[variants.two]
label = "the second"
recipe = "{recipe}"
set = ["data.batch_rows=10", "data.max_history=6"]

[[published]]
label = "of others"
source = "a paper"
metrics = {{ "mrr" = 0.25 }}

[[published_tables]]
title = "a larger log"
setting = "Twice the events."
source = "another paper"
columns = ["model", "mrr", "cost"]
rows = [["of a paper", "0.35", "3 TFLOP"], ["of another", "0.45", ""]]

[[pictures]]
name = "rank"
x = "train_mflop"
y = "mrr"
"""

COMPUTE = """
kind = "compute"
title = "A small comparison"
about = "Few events."
lengths = [30, 60]
targets = 3
users = 2
repeats = 2

[variants.full]
label = "full"
recipe = "hstu_kuairand_27k"
set = {settings}

[variants.window]
label = "window"
recipe = "hstu_kuairand_27k"
set = {windowed}
"""
SMALL = [
    "data.features={}",
    "embeddings.dim=8",
    "model.width=8",
    "model.num_layers=1",
    "model.num_heads=1",
    "model.qk_dim=8",
    "model.value_dim=8",
    "model.token_hidden=8",
    'objective.tasks=["is_click", "long_view"]',
    "trainer.precision=fp32",
    "trainer.device=cpu",
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("prepared") / "dataset")


@pytest.fixture(scope="module")
def study(dataset) -> Path:
    recipe = dataset.parent / "small_recipe.toml"
    recipe.write_text(NEXT_ITEM.format(path=dataset))
    path = dataset.parent / "small.toml"
    path.write_text(STUDY.format(recipe=recipe))
    return path


@pytest.fixture(scope="module")
def out(study, dataset) -> Path:
    """A study of which one variant has run, with one seed; the second has not begun."""
    folder = dataset.parent / "out"
    argv = ["study", str(study), "--data", str(dataset), "--out", str(folder), "--only", "one"]
    assert cli.main([*argv, "--page", str(dataset.parent / "docs" / "results.md")]) == 0
    return folder


@pytest.mark.parametrize("name", list_studies())
def test_every_study_asks_for_runs_that_can_be_configured(name):
    study = load_study(name)
    for variant in study.variants.values():
        config = variant.config(data="somewhere", seed=3)
        assert (config.data.path, config.trainer.seed, config.data.seed) == ("somewhere", 3, 3)
        if isinstance(study, QualityStudy) and study.checkpoint == "best":
            assert config.checkpoint.keep_best, "the best checkpoint must still be there in the end"


def test_a_study_reports_the_test_metrics_of_the_best_validation_step(out):
    lines = read_lines(out / "one" / "seed-0" / "metrics.jsonl")
    scores = {line["step"]: line["ndcg@10"] for line in lines if line["split"] == "validation"}
    (result,) = results.read(out / "results.json").results
    best = max(scores, key=lambda step: (scores[step], step))
    assert result.step == best < result.last_step, "the checkpoint must be one that the run itself has not tested"
    assert result.validation["ndcg@10"] == pytest.approx(scores[best])
    assert result.test.keys() == result.validation.keys()
    assert result.cpu_minutes > 0
    assert result.peak_mib > 50
    assert result.train_mflop > result.inference_mflop > 0


def test_the_same_command_again_trains_nothing_and_writes_the_same(out, study, dataset, capfd):
    before = (out / "results.json").read_text(), (out / "small-rank.svg").read_text()
    argv = ["study", str(study), "--data", str(dataset), "--out", str(out), "--only", "one"]
    assert cli.main(argv) == 0
    assert "1 runs, 1 of them finished" in capfd.readouterr().err
    assert ((out / "results.json").read_text(), (out / "small-rank.svg").read_text()) == before


def test_the_page_has_what_has_finished_beside_what_others_published(out, dataset):
    written = (dataset.parent / "docs" / "results.md").read_text()
    assert "| the first | 1 |" in written
    assert "| *of others* |  |  | 0.2500 |" in written
    assert "- *of others*: a paper" in written
    assert "the second" not in written
    assert (dataset.parent / "docs" / "results" / "small-rank.svg").is_file()
    assert "*Published, in another setting: a larger log.*\nTwice the events.\nSource: another paper.\n" in written
    assert "| model | mrr | cost |\n| --- | ---: | ---: |\n| of a paper | 0.35 | 3 TFLOP |\n" in written
    assert "\n| of another | 0.45 |  |\n" in written
    assert written == page.page(dataset.parent / "docs" / "results")


def test_what_a_page_keeps_is_told_anew_without_runs_or_data(out, study, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dataset.parent / "docs" / "results", tmp_path / "docs" / "results")
    changed = tmp_path / "small.toml"
    changed.write_text(study.read_text().replace("Nothing to learn here.", "Little to learn here."))
    argv = ["study", str(changed), "--report", "--page", "docs/results.md"]
    assert cli.main(argv) == 0
    before = (dataset.parent / "docs" / "results.md").read_text()
    told = Path("docs/results.md").read_text()
    assert told == before.replace("Nothing to learn here.", "Little to learn here.") != before
    changed.write_text(study.read_text().replace("data.batch_rows=20", "data.batch_rows=30"))
    assert cli.main(argv) == 2
    assert "was made with other settings of 'one' than this study has now" in capsys.readouterr().err
    assert Path("docs/results.md").read_text() == told
    shutil.rmtree("docs/results")
    assert cli.main(argv) == 2
    assert "is there to report; run the study, or give its --out" in capsys.readouterr().err


def test_a_published_row_that_lacks_a_cell_is_refused(study, dataset, tmp_path, capsys):
    changed = tmp_path / "small.toml"
    changed.write_text(study.read_text().replace('["of another", "0.45", ""]', '["of another", "0.45"]'))
    assert cli.main(["study", str(changed), "--data", str(dataset), "--out", str(tmp_path / "out")]) == 2
    assert "has 2 cells for 3 columns; give one per column" in capsys.readouterr().err


@pytest.mark.parametrize(("setting", "value"), [("data.batch_rows=20", 30), ("checkpoint.keep_best=1", 2)])
def test_a_run_of_other_settings_is_refused_and_named(setting, value, out, study, dataset, capsys):
    changed = study.with_name("changed.toml")
    name = setting.partition("=")[0]
    changed.write_text(study.read_text().replace(setting, f"{name}={value}"))
    assert cli.main(["study", str(changed), "--data", str(dataset), "--out", str(out)]) == 2
    shown = capsys.readouterr().err
    assert f"holds a run with {setting}, and this study asks for {value}" in shown
    assert "remove that folder" in shown


def test_how_many_checkpoints_are_kept_makes_no_other_run(out, study, dataset, tmp_path):
    changed = tmp_path / "small.toml"
    changed.write_text(study.read_text().replace("checkpoint.keep_last=1", "checkpoint.keep_last=2"))
    (run,) = runs_of(load_study(str(changed)), ["one"], seeds=1, data=str(dataset), out=out)
    assert finished(run) is not None


def test_a_metric_without_a_value_is_none_in_the_result(out, study, dataset, monkeypatch):
    (run,) = runs_of(load_study(str(study)), ["one"], seeds=1, data=str(dataset), out=out)
    found = {"step": 3, "hr@10": 0.5, "mrr": math.nan, "loss": math.inf}
    monkeypatch.setattr(runs, "_evaluated", lambda run, step: {"test": found})
    assert _result(run, load_study(str(study))).test == {"hr@10": 0.5, "mrr": None, "loss": None}


def test_a_metric_of_exactly_zero_is_told_as_such(out, study, dataset, tmp_path, monkeypatch, capsys):
    (result,) = results.read(out / "results.json").results
    bad = replace(result, test={"hr@10": 0.0, "mrr": None})
    monkeypatch.setattr(runs, "complete", lambda run, study, *, procs: bad)
    args = argparse.Namespace(seeds=1, procs=1)
    command._train(load_study(str(study)), ["one"], args=args, data=str(dataset), out=tmp_path)
    assert "hr@10 0.0000, mrr -\n" in capsys.readouterr().err


def test_a_picture_of_what_is_no_metric_is_refused_before_anything_is_trained(study, dataset, tmp_path, capsys):
    changed = tmp_path / "small.toml"
    changed.write_text(study.read_text().replace('y = "mrr"', 'y = "mmr"'))
    assert cli.main(["study", str(changed), "--data", str(dataset), "--out", str(tmp_path / "out")]) == 2
    assert "picture 'rank' shows y='mmr', which is not in metrics=['hr@10', 'mrr']" in capsys.readouterr().err


def test_a_metric_that_finished_runs_do_not_have_is_named_and_nothing_written(out, study, dataset, tmp_path, capsys):
    before = (out / "results.json").read_text()
    changed = tmp_path / "small.toml"
    changed.write_text(study.read_text().replace('"mrr"]', '"mrr", "hr@7"]'))
    assert cli.main(["study", str(changed), "--data", str(dataset), "--out", str(out), "--report"]) == 2
    assert "metrics names 'hr@7', but one with seed 0 was tested without it; name some of" in capsys.readouterr().err
    assert (out / "results.json").read_text() == before


def test_a_run_on_another_dataset_is_refused(out, study, tmp_path, capsys):
    other = make_dataset(tmp_path / "other", num_users=20)
    assert cli.main(["study", str(study), "--data", str(other), "--out", str(out), "--only", "one"]) == 2
    assert "another dataset" in capsys.readouterr().err


def test_a_missing_dataset_is_answered_with_the_command_that_makes_it(study, tmp_path, capsys):
    for argv in ([], ["--data", str(tmp_path / "nothing")]):
        assert cli.main(["study", str(study), *argv]) == 2
        assert "ultrarec prepare small.csv" in capsys.readouterr().err


def test_unknown_studies_and_parts_are_named(study, dataset, capsys):
    assert cli.main(["study", "kuairnad"]) == 2
    assert "did you mean 'kuairand'?" in capsys.readouterr().err
    assert cli.main(["study", str(study), "--data", str(dataset), "--only", "three"]) == 2
    assert "--only three: this study has one, two" in capsys.readouterr().err


def test_nothing_finished_is_no_result(study, dataset, tmp_path, capsys):
    argv = ["study", str(study), "--data", str(dataset), "--out", str(tmp_path / "empty"), "--report"]
    assert cli.main(argv) == 2
    assert "no finished part" in capsys.readouterr().err
    assert not (tmp_path / "empty").exists()


def test_a_cost_that_is_not_known_whole_is_not_given(out, tmp_path):
    attempts = out / "one" / "seed-0" / "attempts.jsonl"
    minutes, memory = _cost(attempts.parent)
    start, end = attempts.read_text().splitlines()
    shutil.copy(attempts, tmp_path)
    again = tmp_path / "attempts.jsonl"
    # Continued after an attempt that was seen to its end: both count.
    again.write_text("\n".join([start, end, json.dumps({"event": "start", "new": False}), end]))
    assert _cost(tmp_path) == (pytest.approx(2 * minutes), memory)
    # Killed together with the study, or begun by another command.
    again.write_text("\n".join([start, json.dumps({"event": "start", "new": False}), end]))
    assert _cost(tmp_path) == (None, None)
    again.write_text("\n".join([json.dumps({"event": "start", "new": False}), end]))
    assert _cost(tmp_path) == (None, None)


SAVES = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path(sys.argv[1], "saving").touch()
    time.sleep(0.3)
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("moments", [("ready",), ("ready", "saving")], ids=["once", "twice"])
def test_a_study_that_is_stopped_waits_until_its_run_has_saved(moments, tmp_path):
    def stop() -> None:
        for moment in moments:
            while not (tmp_path / moment).exists():
                timer.wait(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Event()
    threading.Thread(target=stop, daemon=True).start()
    ended = []

    def work() -> None:
        ended.append(_run([sys.executable, "-c", SAVES, str(tmp_path)]))
        ended[0].require_success()

    assert run_until_signalled(work, left=lambda: "all") == 128 + signal.SIGTERM
    assert (tmp_path / "saved").exists()
    assert ended[0].usage.ru_utime > 0, "an attempt that was stopped counts too"


def test_a_run_that_fails_says_how_to_go_on():
    ended = _run([sys.executable, "-c", "import sys; sys.exit(2)"])
    with pytest.raises(UserError, match="code 2, and has said why above; mend that and give the same command again"):
        ended.require_success()


def test_a_mean_over_seeds_needs_every_seed(out):
    found = results.read(out / "results.json")
    (first,) = found.results
    second = replace(first, seed=1, test={**first.test, "mrr": first.test["mrr"] + 0.5})
    both = replace(found, results=(second, first))
    assert [each.seed for each in both.of("one")] == [0, 1]
    assert both.test("one", "mrr") == pytest.approx(first.test["mrr"] + 0.25)
    lacking = replace(found, results=(first, replace(second, test={**first.test, "mrr": None})))
    assert lacking.test("one", "mrr") is None
    assert f"| the first | 1 | {first.step} |" in page.section(both, pictures=".")


def test_times_of_both_variants_stand_beside_the_ratio_of_their_operations(tmp_path, capsys):
    path = tmp_path / "small.toml"
    path.write_text(COMPUTE.format(settings=SMALL, windowed=[*SMALL, "model.window=5"]))
    assert isinstance(load_study(str(path)), ComputeStudy)
    argv = ["study", str(path), "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--only", "60"]) == 0
    (only,) = results.read(tmp_path / "out" / "results.json").comparisons
    assert only.length == 60
    full, window = only.costs["full"], only.costs["window"]
    assert min(full.train_seconds, full.inference_seconds, window.train_seconds, window.inference_seconds) > 0
    # A head of 8 columns: 32 operations a pair. Without a window 60 * 61 / 2 pairs of the history and 3 * 61 of the
    # targets; with one, 5 before each token and itself, less what the first five lack.
    pairs = 60 * 61 // 2 + 3 * 61 - (63 * 6 - 15)
    assert 1e9 * (full.inference_gflop - window.inference_gflop) == pytest.approx(32 * pairs)
    assert f"{full.train_gflop / window.train_gflop:.1f} |" in capsys.readouterr().out
    written = compute.path_of(tmp_path / "out", 60).read_text()
    assert cli.main(argv) == 0
    assert compute.path_of(tmp_path / "out", 60).read_text() == written, "what is there is not measured again"
    path.write_text(COMPUTE.format(settings=SMALL, windowed=[*SMALL, "model.window=6"]))
    assert cli.main(argv) == 2
    assert "other settings" in capsys.readouterr().err
    assert cli.main([*argv, "--seeds", "2"]) == 2
    assert "--seeds" in capsys.readouterr().err
