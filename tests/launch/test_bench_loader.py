import json
import os
import re

import pyarrow.parquet as pq
import pytest
from process_group import start_server
from random_datasets import random_histories, write_dataset

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


@pytest.mark.parametrize(
    ("ranks", "out", "message"),
    [
        (1, "nowhere/figures.json", r"--out .*figures.json: there is no folder .*nowhere; make it first"),
        (5, "figures.json", "--ranks 5: each scans row groups of its own, and there are 4; give fewer"),
        (2, "figures.json", r"part-00001.parquet cannot be read \(.*\); restore it, or prepare the dataset again"),
    ],
)
def test_what_cannot_be_measured_or_kept_is_refused_before_anything_is_printed(tmp_path, capsys, ranks, out, message):
    histories = random_histories(num_users=40, num_items=9, mean_events=4, seed=0)
    info = write_dataset(tmp_path / "dataset", histories, num_items=9, num_files=2, rows_per_group=10)
    if ranks == 2:
        os.truncate(info.history_paths[1], 100)
    command = ["bench", "loader", str(info.root), "--ranks", str(ranks), "--out", str(tmp_path / out)]
    assert main(command) == 2
    shown = capsys.readouterr()
    assert re.search(message, shown.err)
    assert shown.out == ""


@pytest.mark.parametrize("ranks", [1, 2])
def test_damaged_pages_end_in_one_line_that_names_them_whichever_rank_reads_them(tmp_path, capsys, ranks):
    histories = random_histories(num_users=400, num_items=90, mean_events=40, seed=0)
    info = write_dataset(tmp_path / "dataset", histories, num_items=90, num_files=2, rows_per_group=200)
    file = info.history_paths[1]
    whole = bytearray(file.read_bytes())
    column = pq.read_metadata(file).row_group(0).column(2)
    begin = column.data_page_offset + column.total_compressed_size // 4
    whole[begin : begin + 400] = bytes(400)
    file.write_bytes(whole)
    start_server()
    assert main(["bench", "loader", "--quick", str(info.root), "--ranks", str(ranks)]) == 2
    shown = capsys.readouterr().err
    assert re.search(r"part-00001.parquet, row group 0.*restore", shown)
    assert "Traceback" not in shown


def test_a_missing_dataset_is_named_before_anything_is_printed(tmp_path, capsys):
    assert main(["bench", "loader", str(tmp_path / "nowhere")]) == 2
    shown = capsys.readouterr()
    assert "nowhere does not exist" in shown.err
    assert shown.out == ""
