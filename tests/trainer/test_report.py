"""Files of JSON lines that a kill or a hand has spoiled."""

import pytest

from ultrarec.data.errors import UserError
from ultrarec.trainer.journal import read_lines
from ultrarec.trainer.report import forget_after


def test_a_last_line_cut_off_by_a_kill_is_passed_over_and_dropped_at_the_restart(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    forget_after(tmp_path, 1)
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("line", ["nonsense", "[1]", "{}", '{"step": "x"}'])
def test_a_line_that_no_run_wrote_is_named(tmp_path, line):
    (tmp_path / "audit").mkdir()
    for path in (tmp_path / "metrics.jsonl", tmp_path / "audit" / "rank-0.jsonl"):
        path.write_text(line + '\n{"step": 5}\n')
        with pytest.raises(UserError, match=r"jsonl has a line that no run wrote: .*remove that line"):
            forget_after(tmp_path, 5)
        path.unlink()


@pytest.mark.parametrize("garbage", [b"\0" * 5000, b"nonsense\n[1]\n", b'\0\0\0\n{"step": 3}\n', b'{"step": 3}\n\0\0'])
def test_what_a_power_cut_leaves_behind_the_lines_of_a_checkpoint_is_told_and_cut_off(tmp_path, capsys, garbage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + garbage)
    forget_after(tmp_path, 2)
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    is_told = f"ATTENTION: {path} ended in what no run wrote, behind step 2: " in capsys.readouterr().err
    assert is_told == (garbage[:1] != b"{")  # else it lies behind lines that are dropped anyway
