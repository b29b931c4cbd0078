import importlib.util
import re

import pytest

from ultrarec.launch import cli, launcher
from ultrarec.trainer.config import load_config

RECIPE = "hstu_kuairand_sample"
GPUS = ["--set", "trainer.device=auto", "--set", "launch.gpus_per_node=8", "--set", "launch.cpus_per_node=96"]


def launch(capsys, *arguments):
    code = cli.main(["launch", RECIPE, *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_slurm_dry_run_prints_the_batch_script(capsys):
    arguments = ["--scheduler", "slurm", "-j", "2x8", "--dryrun", "--scheduler-arg", "partition=gpu"]
    code, out, _ = launch(capsys, *arguments, *GPUS, "--set", "launch.memory_gib_per_node=64")
    assert code == 0
    assert out.count("#SBATCH --job-name=trainer-") == 2
    assert out.count("--partition=gpu") == 2
    assert out.count("--cpus-per-task=96 --mem=65536 --gpus-per-task=8") == 2
    assert '"${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}:29500"' in out
    assert "torchrun --nnodes 2 --nproc-per-node 8" in out


def test_kubernetes_dry_run_prints_the_manifest(capsys):
    pytest.importorskip("kubernetes", reason="the extra `kubernetes` is not installed")
    import yaml

    arguments = ["--scheduler", "kubernetes", "-j", "2x4", "--dryrun", "--set", "launch.image=mine:1"]
    code, out, _ = launch(capsys, *arguments, *GPUS)
    assert code == 0
    tasks = yaml.safe_load(out)["spec"]["tasks"]
    assert [task["name"] for task in tasks] == ["trainer-0", "trainer-1"]
    for task in tasks:
        (container,) = task["template"]["spec"]["containers"]
        assert container["image"] == "mine:1"
        assert container["command"][2].startswith("exec torchrun --nnodes 2 --nproc-per-node 4")
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_aws_batch_dry_run_prints_the_job_definition(capsys):
    import yaml

    arguments = ["--scheduler", "aws_batch", "-j", "2x8", "--dryrun", "--scheduler-arg", "queue=train"]
    code, out, _ = launch(capsys, *arguments, *GPUS)
    assert code == 0
    job = yaml.safe_load(out)
    assert (job["queue"], job["job_def"]["nodeProperties"]["numNodes"]) == ("train", 2)


@pytest.mark.parametrize("recipe", ["hstu_amazon_books", "hstu_kuairand_1k", "hstu_kuairand_27k", "hstu_ml20m"])
def test_a_recipe_that_names_its_node_asks_a_cluster_for_it(capsys, recipe):
    launch_section = load_config(recipe).launch
    assert cli.main(["launch", recipe, "--scheduler", "slurm", "--dryrun"]) == 0
    out = capsys.readouterr().out
    assert f"--cpus-per-task={launch_section.cpus_per_node}" in out
    assert f"--gpus-per-task={launch_section.gpus_per_node}" in out


@pytest.mark.parametrize(
    ("settings", "remedies"),
    [
        ({"trainer.device": "auto", "launch.cpus_per_node": 8}, ["launch.gpus_per_node=8", "trainer.device=cpu"]),
        ({"trainer.device": "cuda", "launch.cpus_per_node": 8}, ["launch.gpus_per_node=8", "trainer.device=cpu"]),
        ({"trainer.device": "cpu", "launch.cpus_per_node": 7}, ["launch.cpus_per_node=8"]),
        (
            {"trainer.device": "auto", "launch.cpus_per_node": 2},
            ["launch.gpus_per_node=8", "trainer.device=cpu", "launch.cpus_per_node=8"],
        ),
    ],
)
def test_a_node_too_small_for_its_processes_is_refused_with_what_would_do(capsys, settings, remedies):
    arguments = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    code, out, err = launch(
        capsys, "--scheduler", "slurm", "-j", "4x8", "--dryrun", "--set", "launch.gpus_per_node=0", *arguments
    )
    assert (code, out) == (2, "")
    assert err.startswith("error: 8 process(es) on a node of slurm: ")
    assert re.findall(r"--set ([^ ,;]+)", err) == remedies


def test_this_machine_is_not_held_to_what_a_cluster_node_must_offer(capsys):
    arguments = ["--set", "trainer.device=cpu", "--set", "launch.cpus_per_node=1"]
    code, _, _ = launch(capsys, "--scheduler", "local_cwd", "-j", "1x8", "--dryrun", *arguments)
    assert code == 0


def test_local_nodes_share_the_visible_gpus_and_no_gpu_twice(capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,8")
    arguments = ["-j", "2x2", "--dryrun", "--set", "trainer.device=auto"]
    for asked in (0, 8):
        code, out, _ = launch(capsys, "--scheduler", "local_cwd", *arguments, "--set", f"launch.gpus_per_node={asked}")
        assert code == 0
        assert re.findall(r"'CUDA_VISIBLE_DEVICES': '([^']*)'", out) == ["4,5", "6,7"]


def test_a_local_run_on_the_cpu_takes_no_gpu(capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    code, out, _ = launch(capsys, "--scheduler", "local_cwd", "-j", "2x2", "--dryrun", "--set", "trainer.device=cpu")
    assert code == 0
    assert "CUDA_VISIBLE_DEVICES" not in out


def test_local_dry_run_creates_nothing(capsys, tmp_path):
    arguments = ["--scheduler", "local_cwd", "--dryrun", "--set", "trainer.device=cpu"]
    code, out, _ = launch(capsys, *arguments, "--out", str(tmp_path / "run"))
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
    code, out, err = launch(capsys, "--set", "trainer.device=cpu", *arguments, "--dryrun")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


def test_slurm_without_sbatch_names_the_way_out(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = launch(capsys, "--scheduler", "slurm", *GPUS)
    assert code == 2
    assert "sbatch is not on PATH" in err


@pytest.mark.parametrize("scheduler", ["kubernetes", "aws_batch"])
def test_a_missing_client_is_answered_with_the_extra_of_the_checkout(capsys, monkeypatch, scheduler):
    monkeypatch.setitem(launcher.CLIENTS, scheduler, "no_such_client")
    code, _, err = launch(capsys, "--scheduler", scheduler, *GPUS)
    assert code == 2
    assert f"pip install '.[{scheduler}]' in the checkout" in err


@pytest.mark.skipif(importlib.util.find_spec("kubernetes") is None, reason="the extra `kubernetes` is not installed")
def test_a_cluster_that_does_not_answer_ends_in_one_message(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err = launch(capsys, "--scheduler", "kubernetes", *GPUS)
    assert code == 2
    assert "error: kubernetes did not accept the job" in err


def test_a_file_for_a_container_is_pointed_out(capsys, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(load_config(RECIPE).to_toml())
    arguments = ["--scheduler", "aws_batch", "--dryrun", "--scheduler-arg", "queue=q", *GPUS]
    assert cli.main(["launch", str(path), *arguments]) == 0
    assert "is read inside the image" in capsys.readouterr().err
