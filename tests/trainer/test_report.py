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
        path.write_text(line + "\n")
        with pytest.raises(UserError, match=r"jsonl has a line that no run wrote: .*remove that line"):
            forget_after(tmp_path, 5)
        path.unlink()
