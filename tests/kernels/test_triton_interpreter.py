"""Triton without a GPU: its tests in the interpreter, which a process must choose before it imports Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ultrarec.kernels import hstu_attention

TESTS = Path(__file__).parent / "on_triton"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_promises_of_the_triton_backend_hold_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(TESTS)]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted")
def test_tensors_on_the_cpu_are_refused_outside_the_interpreter() -> None:
    x = torch.ones(2, 1, 4)
    with pytest.raises(
        ValueError, match=r"backend='triton' got tensors on cpu; move them to a GPU, .* TRITON_INTERPRET=1"
    ):
        hstu_attention(x, x, x, torch.tensor([0, 2]), max_seq_len=2, backend="triton")
