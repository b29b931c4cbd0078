"""Memory in huge pages: fewer faults where the system has them, the same tensor everywhere."""

import resource
from pathlib import Path

import pytest
import torch

from ultrarec.kernels.pages import in_huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="the system hands out no huge pages"
)
def test_a_large_tensor_is_written_with_a_tenth_of_the_page_faults() -> None:
    x = in_huge_pages(torch.empty(16 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x.fill_(1)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < x.nbytes // resource.getpagesize() / 10


@pytest.mark.parametrize("num_bytes", [0, 1, (4 << 20) - 1, 4 << 20, (4 << 20) + 1])
def test_tensors_of_any_size_stay_where_they_are(num_bytes: int) -> None:
    x = torch.empty(num_bytes, dtype=torch.uint8)
    assert in_huge_pages(x) is x
    assert (x.fill_(7) == 7).all()
