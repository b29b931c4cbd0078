import json
import subprocess
import sys

import pytest

from ultrarec.launch import cli


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_each_command_shows_arguments_and_examples(capsys, name):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert f"examples:\n  ultrarec {name}" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("ultrarec 0.")


@pytest.mark.parametrize("argv", [[], ["trian"], ["launch"], ["launch", "x", "--scheduler", "cloud"]])
def test_a_command_line_that_does_not_parse_exits_2(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    assert "usage: ultrarec" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train"], ["launch", "--scheduler", "slurm", "--dryrun"]])
def test_an_unknown_recipe_is_answered_with_the_closest_one(command, capsys):
    assert cli.main([*command, "hstu_kuairand_sampel"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: no recipe 'hstu_kuairand_sampel'; did you mean 'hstu_kuairand_sample'?")
    assert "Traceback" not in err


def test_ctrl_c_exits_130(monkeypatch):
    def interrupted(parser):
        def run(args):
            raise KeyboardInterrupt

        return run

    monkeypatch.setitem(cli.COMMANDS, "doctor", cli.Command(interrupted, "stops", ""))
    assert cli.main(["doctor"]) == 130


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def broken(parser):
        return lambda args: int("not for the user")

    monkeypatch.setitem(cli.COMMANDS, "doctor", cli.Command(broken, "breaks", ""))
    with pytest.raises(ValueError, match="not for the user"):
        cli.main(["doctor"])


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["launch", "--help"],
        ["launch", "hstu_kuairand_1k", "--scheduler", "slurm", "-j", "2x8", "--dryrun"],
        ["launch", "hstu_kuairand_sample", "--scheduler", "local_cwd", "--dryrun"],
        ["train", "no_such_recipe"],
    ],
)
def test_answers_without_importing_anything_heavy(argv):
    code = (
        "import json, sys, time\n"
        "from ultrarec.launch import cli\n"
        "start = time.process_time()\n"
        "try:\n    cli.main(json.loads(sys.argv[1]))\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'duckdb', 'fbgemm_gpu', 'torchrec'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() - start < 1, time.process_time() - start\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(argv)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_output_cut_off_by_a_pipe_is_no_error():
    command = f"{sys.executable} -m ultrarec.launch.cli launch hstu_kuairand_1k --scheduler slurm --dryrun | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""
