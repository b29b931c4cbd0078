import json

from process_group import start_server

from ultrarec.launch.cli import main


def test_each_rank_is_measured_in_its_own_process_against_a_bare_scan(tmp_path, capsys):
    start_server()  # before the command does, for whatever comes after this test
    out = tmp_path / "loader.json"
    assert main(["bench", "loader", "--quick", "--ranks", "2", "--threads", "1", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())["figures"]
    assert [row["dataset"] for row in figures] == ["mean length 500", "mean length 2000"]
    for row in figures:
        assert len(row["ranks"]) == 2
        for found in (*row["ranks"], row["all"]):
            assert found["share"] == found["epoch"] / found["scan"] > 0
            assert found["first"] == found["first epoch"] / found["first scan"] > 0
            assert found["peak MiB"] > found["own MiB"] > 1
        first, second, together = (found["turns"] for found in (*row["ranks"], row["all"]))
        for what in ("scan", "loader"):
            assert together[what][0]["events"] == first[what][0]["events"] + second[what][0]["events"]
            assert together[what][0]["seconds"] == max(first[what][0]["seconds"], second[what][0]["seconds"])
        # Both read the same dataset, of whose users the last event is predicted and never read.
        assert 0.9 < together["loader"][0]["events"] / together["scan"][0]["events"] < 1
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2 * 3
