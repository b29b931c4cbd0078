import json
import os

import pytest
import torch

from ultrarec.kernels import bench as measurements
from ultrarec.launch import bench_attention, cli


@pytest.fixture
def in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure next to nothing, but all of it."""
    for owner, name, value in (
        (measurements, "SECONDS", 0.0),
        (measurements, "TURN_SECONDS", 0.0),
        (measurements, "GEMM_SIZE", 64),
        (bench_attention, "QUICK_SCALING_LENGTH", 300),
        (bench_attention, "QUICK_MEMORY_LENGTH", 300),
    ):
        monkeypatch.setattr(owner, name, value)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("in_no_time")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bench_prints_a_row_per_length_and_writes_the_same_figures(tmp_path, capsys, dtype):
    pytest.importorskip("matplotlib")
    argv = ["bench", "attention", "--quick", "--lengths", "8,40", "--dtype", dtype, "--threads", "1"]
    assert cli.main([*argv, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "attention.json").read_text())
    assert [row["length"] for row in report["comparisons"]] == [8, 40]
    for row in report["comparisons"]:
        assert row["dtype"] == dtype
        assert f"{row['milliseconds']:.1f}" in shown
        assert row["speedup"] == row["padded_milliseconds"] / row["milliseconds"]
        assert row["onednn_share"] is None or f"{row['onednn_share']:.0%}" in shown
    assert report["machine"]["threads"] == 1
    assert report["memory"]["peak_bytes"] >= 0
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_bench_gives_no_figure_when_results_are_wrong(monkeypatch, capsys):
    right = measurements.hstu_attention

    def slightly_wrong(*args, backend, **kwargs):
        return right(*args, backend=backend, **kwargs) * (1.01 if backend == "cpu" else 1)

    monkeypatch.setattr(measurements, "hstu_attention", slightly_wrong)
    assert cli.main(["bench", "attention", "--quick"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("no figures, as the results are wrong: out of lengths [300, 17, 0, 1]")


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_attention, "find_spec", lambda name: None)
    assert cli.main(["bench", "attention", "--quick", "--out", str(tmp_path)]) == 2
    assert "pip install 'ultrarec[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lengths", "1024,x"], "'x' is not a positive number"),
        (["--lengths", "2"], "2 is below 4"),
        (["--threads", "0"], "'0' is not a positive number"),
        (["--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_arguments_that_make_no_sense_exit_2(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "attention", *argv])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_padded_formulation_that_is_compared_computes_the_same():
    problem = measurements.Problem([5, 9, 1], torch.float64)
    got, padded = problem.run(measurements.jagged), problem.run(measurements.padded_dense)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, padded, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arch", "sm_90"], "add --static"),
        (["--static", "--arch", "sm_90,sm_1"], "--arch 'sm_1' is not known; choose from sm_80, sm_90"),
        (["--static", "--threads", "2"], "--static times nothing, so --threads has no meaning"),
        (["--static", "--device", "cpu"], "--static compiles for --arch, not for --device cpu"),
        (["--tune", "--static"], "--tune measures tiles and nothing else, so --static has no meaning"),
        (["--tune", "--device", "cpu"], "--tune measures kernels that run on a GPU, not on --device cpu"),
        (["--tune", "--lengths", "64,128"], "--tune takes one length, not 2"),
    ],
)
def test_options_that_contradict_each_other_exit_2(argv, message, capsys):
    assert cli.main(["bench", "attention", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_that_is_not_there_exits_2(capsys):
    assert cli.main(["bench", "attention", "--device", "cuda"]) == 2
    assert "--device cuda, but torch finds no CUDA device here" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_exits_2_and_says_what_is_used_instead(capsys):
    assert cli.main(["bench", "attention", "--tune"]) == 2
    assert "torch finds none here; the built-in tiles need no tuning" in capsys.readouterr().err


@pytest.mark.parametrize(("target", "num_special"), [("sm_90", 1), ("gfx942", 2)])
def test_the_static_report_shows_and_writes_what_each_kernel_costs_once_results_are_right(
    monkeypatch, tmp_path, capsys, target, num_special
):
    pytest.importorskip("triton")
    from ultrarec.kernels import static_report

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setattr(static_report, "SETTINGS", (static_report.Setting(64),))
    monkeypatch.setattr(static_report, "NUM_PRODUCTS", {"forward": 2})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    forward = static_report.launches_of
    monkeypatch.setattr(static_report, "launches_of", lambda *a: {"forward": forward(*a)["forward"]})
    assert cli.main(["bench", "attention", "--static", "--arch", target, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    (kernel,) = json.loads((tmp_path / "attention_static.json").read_text())["kernels"]
    assert (kernel["target"], kernel["spilled"]) == (target, 0)
    interior, boundary = kernel["loops"]
    assert f"{interior['issued']:.2f}" in shown
    assert interior["by_kind"]["special"] == boundary["by_kind"]["special"] == num_special
    assert interior["redundancy"] == 1
    assert interior["issued"] < boundary["issued"]
    assert sum(interior["by_kind"].values()) == pytest.approx(interior["issued"], abs=0.05)


def test_the_static_report_is_empty_when_results_are_wrong(monkeypatch, capsys):
    def wrong():
        raise measurements.WrongResults("dq is off")

    monkeypatch.setattr(measurements, "check_kernels", wrong)
    assert cli.main(["bench", "attention", "--static", "--arch", "sm_90"]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "no figures, as the results are wrong: dq is off\n")
