import json

from ultrarec.launch.cli import main


def test_the_loader_is_measured_against_a_bare_scan(tmp_path, capsys):
    assert main(["bench", "loader", "--quick", "--threads", "1", "--out", str(tmp_path / "loader.json")]) == 0
    figures = json.loads((tmp_path / "loader.json").read_text())["figures"]
    assert [row["dataset"] for row in figures] == ["mean length 500", "mean length 2000"]
    for row in figures:
        assert row["share"] == row["loader"] / row["scan"] > 0
        assert row["peak_bytes"] > 2**20
    assert len(capsys.readouterr().out.splitlines()) == 4
