import importlib.util

import pytest

from ultrarec.launch import cli

RECIPE = "hstu_kuairand_sample"


def launch(capsys, *arguments):
    code = cli.main(["launch", RECIPE, *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_slurm_dry_run_prints_the_batch_script(capsys):
    arguments = ["--scheduler", "slurm", "-j", "2x8", "--dryrun", "--scheduler-arg", "partition=gpu"]
    code, out, _ = launch(
        capsys, *arguments, "--set", "launch.gpus_per_node=8", "--set", "launch.memory_gib_per_node=64"
    )
    assert code == 0
    assert out.count("#SBATCH --job-name=trainer-") == 2
    assert out.count("--partition=gpu") == 2
    assert out.count("--mem=65536 --gpus-per-task=8") == 2
    assert '"${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}:29500"' in out
    assert "torchrun --nnodes 2 --nproc-per-node 8" in out


def test_kubernetes_dry_run_prints_the_manifest(capsys):
    pytest.importorskip("kubernetes", reason="the extra `kubernetes` is not installed")
    import yaml

    code, out, _ = launch(capsys, "--scheduler", "kubernetes", "-j", "2x4", "--dryrun", "--set", "launch.image=mine:1")
    assert code == 0
    tasks = yaml.safe_load(out)["spec"]["tasks"]
    assert [task["name"] for task in tasks] == ["trainer-0", "trainer-1"]
    for task in tasks:
        (container,) = task["template"]["spec"]["containers"]
        assert container["image"] == "mine:1"
        assert container["command"][2].startswith("exec torchrun --nnodes 2 --nproc-per-node 4")


def test_aws_batch_dry_run_prints_the_job_definition(capsys):
    import yaml

    arguments = ["--scheduler", "aws_batch", "-j", "2x8", "--dryrun", "--scheduler-arg", "queue=train"]
    code, out, _ = launch(capsys, *arguments)
    assert code == 0
    job = yaml.safe_load(out)
    assert (job["queue"], job["job_def"]["nodeProperties"]["numNodes"]) == ("train", 2)


def test_local_dry_run_creates_nothing(capsys, tmp_path):
    code, out, _ = launch(capsys, "--scheduler", "local_cwd", "--dryrun", "--out", str(tmp_path / "run"))
    assert code == 0
    assert "-m ultrarec.trainer" in " ".join(out.replace("'", "").split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheduler", "slurm", "-j", "two"], "-j two: expected NODESxPROCS"),
        (["--scheduler", "slurm", "--set", "trainer.max_stepz=3"], "did you mean 'max_steps'?"),
        (["--scheduler", "slurm", "--set", "max_steps"], "expected section.field=value"),
        (["--scheduler", "slurm", "--scheduler-arg", "partition"], "expected KEY=VALUE; slurm knows comment"),
        (["--scheduler", "slurm", "--scheduler-arg", "queue=x"], "expected KEY=VALUE; slurm knows comment"),
        (["--scheduler", "aws_batch"], "aws_batch needs --scheduler-arg queue=VALUE"),
        (["--scheduler", "aws_batch", "--scheduler-arg", "priority=high"], "--scheduler-arg priority=high: "),
    ],
)
def test_what_cannot_be_launched_is_said_in_one_message(capsys, arguments, message):
    code, out, err = launch(capsys, *arguments, "--dryrun")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


def test_slurm_without_sbatch_names_the_way_out(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = launch(capsys, "--scheduler", "slurm")
    assert code == 2
    assert "sbatch is not on PATH" in err


@pytest.mark.skipif(importlib.util.find_spec("kubernetes") is None, reason="the extra `kubernetes` is not installed")
def test_a_cluster_that_does_not_answer_ends_in_one_message(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err = launch(capsys, "--scheduler", "kubernetes")
    assert code == 2
    assert "error: kubernetes did not accept the job" in err


def test_a_file_for_a_container_is_pointed_out(capsys, tmp_path):
    from ultrarec.trainer.config import load_config

    path = tmp_path / "mine.toml"
    path.write_text(load_config(RECIPE).to_toml())
    arguments = ["--scheduler", "aws_batch", "--dryrun", "--scheduler-arg", "queue=q"]
    assert cli.main(["launch", str(path), *arguments]) == 0
    assert "is read inside the image" in capsys.readouterr().err
