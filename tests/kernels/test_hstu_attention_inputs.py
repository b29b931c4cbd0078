"""What hstu_attention refuses, and that the message names the value, the rule and the remedy."""

import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from ultrarec.kernels import RelativeBias, hstu_attention
from ultrarec.kernels.hstu_attention.inputs import assert_values

TIMES = torch.arange(5)


def call(**changes: Any) -> torch.Tensor:
    """A legal call on two sequences of 2 and 3 events, with changes."""
    tensors = {name: torch.ones(5, 2, 4) for name in ("q", "k", "v")}
    return hstu_attention(**{**tensors, "offsets": torch.tensor([0, 2, 5]), "max_seq_len": 3, **changes})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two dimensions": ({"q": torch.ones(5, 4)}, "q has shape (5, 4); it takes [events, heads, head width]"),
    "no heads": ({"v": torch.ones(5, 0, 4)}, "v has shape (5, 0, 4); it takes [events, heads, head width]"),
    "k unlike q": ({"k": torch.ones(5, 2, 3)}, "q has shape (5, 2, 4) but k (5, 2, 3); they take the same"),
    "v unlike q": ({"v": torch.ones(4, 2, 4)}, "v has shape (4, 2, 4) but q (5, 2, 4); events and heads take the same"),
    "mixed dtypes": (
        {"v": torch.ones(5, 2, 4).half()},
        "q, k, v are torch.float32, torch.float32, torch.float16; cast them",
    ),
    "other device": ({"v": torch.ones(5, 2, 4, device="meta")}, "v is on meta but q on cpu; move it with .to('cpu')"),
    "max_seq_len": ({"max_seq_len": 0}, "max_seq_len=0; it is at least 1"),
    "float offsets": (
        {"offsets": torch.tensor([0.0, 5.0])},
        "offsets is torch.float32 of shape (2,); it takes an int32",
    ),
    "no offsets": ({"offsets": torch.tensor([], dtype=torch.int64)}, "offsets is empty; it starts with 0"),
    "offsets from 1": (
        {"offsets": torch.tensor([1, 5])},
        "offsets go from 1 to 5; they go from 0 to the number of events, 5",
    ),
    "offsets to 4": (
        {"offsets": torch.tensor([0, 4])},
        "offsets go from 0 to 4; they go from 0 to the number of events, 5",
    ),
    "falling offsets": (
        {"offsets": torch.tensor([0, 3, 2, 5])},
        "sequence 1 has -1 events, outside 0..3=max_seq_len; make",
    ),
    "too long": (
        {"offsets": torch.tensor([0, 5])},
        "sequence 0 has 5 events, outside 0..3=max_seq_len; raise max_seq_len",
    ),
    "targets of 1": ({"num_targets": torch.tensor([1])}, "num_targets has 1 entries; it takes one per sequence, 2"),
    "float targets": (
        {"num_targets": torch.ones(2)},
        "num_targets is torch.float32 of shape (2,); it takes an int32 or int64",
    ),
    "too many targets": ({"num_targets": torch.tensor([2, 4])}, "num_targets[1]=4 is outside 0..3, the events it has"),
    "negative targets": (
        {"num_targets": torch.tensor([-1, 0])},
        "num_targets[0]=-1 is outside 0..2, the events it has",
    ),
    "scale of 3": (
        {"scale": torch.ones(3)},
        "scale is torch.float32 of shape (3,); it takes a number, or a tensor of floats (5,)",
    ),
    "integer scale": (
        {"scale": TIMES},
        "scale is torch.int64 of shape (5,); it takes a number, or a tensor of floats (5,)",
    ),
    "position weights": (
        {"bias": RelativeBias(position_weight=torch.ones(6))},
        "position_weight has 6 entries; max_seq_len=3 takes 5",
    ),
    "timestamps": (
        {"bias": RelativeBias(time_weight=torch.ones(6), timestamps=TIMES[:4])},
        "timestamps has 4 entries; it takes one per event, 5",
    ),
    "query timestamps": (
        {"bias": RelativeBias(time_weight=torch.ones(6), timestamps=TIMES, query_timestamps=TIMES[:2])},
        "query_timestamps has 2 entries; it takes one per event, 5",
    ),
    "backend": ({"backend": "cuda"}, "backend='cuda'; choose one of ['auto', 'cpu', 'reference', 'triton']"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_refused_with_value_rule_and_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**changes)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["too long", "too many targets", "offsets from 1"])
def test_every_backend_checks_values(backend: str, name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**changes, backend=backend)


def test_a_legal_call_is_not_refused() -> None:
    assert call(num_targets=torch.tensor([2, 0])).shape == (5, 2, 4)


@pytest.mark.parametrize(
    ("offsets", "num_targets"),
    [
        ([1, 5], None),
        ([0, 4], None),
        ([0, 6], None),
        ([0], None),
        ([0, 4, 5], None),
        ([0, 3, 2, 5], None),
        ([0, 2, 5], [3, 0]),
        ([0, 2, 5], [0, -1]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_a_device_asserts_is_what_a_cpu_refuses(offsets, num_targets, dtype):
    offsets = torch.tensor(offsets, dtype=dtype)
    num_targets = None if num_targets is None else torch.tensor(num_targets)
    with pytest.raises(RuntimeError, match="offsets ascend from 0 to the number of events"):
        assert_values(offsets, num_targets, num_events=5, max_seq_len=3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_device_asserts_nothing_of_a_legal_call(dtype: torch.dtype) -> None:
    assert_values(torch.tensor([0, 2, 2, 5], dtype=dtype), None, num_events=5, max_seq_len=3)
    assert_values(torch.tensor([0, 2, 2, 5], dtype=dtype), torch.tensor([2, 0, 3]), num_events=5, max_seq_len=3)
    assert_values(torch.tensor([0], dtype=dtype), None, num_events=0, max_seq_len=3)


WRONG_OFFSETS_ON_A_GPU = """
import torch
from ultrarec.kernels import hstu_attention
x = torch.ones(5, 2, 16, device="cuda")
hstu_attention(x, x, x, torch.tensor([0, 2, 4], device="cuda"), max_seq_len=3)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_wrong_offsets_on_a_gpu_end_the_process() -> None:
    run = subprocess.run([sys.executable, "-c", WRONG_OFFSETS_ON_A_GPU], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "device-side assert" in run.stderr
