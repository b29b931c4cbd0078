"""What the watchdog takes for a sign of life; that it ends hanging ranks is tested with those."""

import subprocess
import sys

SCRIPT = """
import sys, time
from pathlib import Path
from ultrarec.trainer.watchdog import Watchdog
watchdog = Watchdog(Path(sys.argv[1]), rank=0, seconds=0.5)
watchdog.start(7)
for _ in range(20):
    time.sleep(0.1)
    watchdog.evaluating()
print("evaluated", flush=True)
time.sleep(60)
"""


def test_an_evaluation_lives_as_long_as_its_parts_finish(tmp_path):
    command = [sys.executable, "-c", SCRIPT, tmp_path]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=50)
    assert done.stdout == "evaluated\n"
    assert done.returncode == 75
    said = "rank 0: no part of an evaluation has finished for 0.5 s, the last step was 7; stacks of all threads in "
    assert said in done.stderr
