"""Random problems for the Triton attention, in the interpreter; see test_triton_interpreter.py."""

from pathlib import Path

import pytest
from triton_device import assert_passes_in_the_interpreter


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_random_problems_are_as_exact_as_plain_torch_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter(Path(__file__).parent / "on_triton" / "test_triton_attention_random.py")
