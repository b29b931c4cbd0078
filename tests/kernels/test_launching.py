"""Starting a kernel: on the device of its tensors, which need not be the current one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ultrarec.kernels.launching import Launch


class Events(NamedTuple):
    data: Tensor
    stride: int


class Recorder:
    """A kernel that only notes with what it was started, and on the device of which tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device_of: list[Tensor] = []
        self.starts: list[tuple[tuple[int, ...], dict[str, Any], list[Tensor]]] = []
        monkeypatch.setattr(torch.cuda, "device_of", self.guard)

    @contextmanager
    def guard(self, x: Tensor) -> Iterator[None]:
        self.device_of.append(x)
        yield
        self.device_of.pop()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.starts.append((grid, arguments, [*self.device_of]))


@pytest.mark.parametrize("nested", [False, True], ids=["tensors", "tuples of tensors"])
def test_a_kernel_starts_on_the_device_of_its_tensors(nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x = Recorder(monkeypatch), torch.zeros(3)
    arguments = {"none": None, "number": 2, "x": Events(x, 1) if nested else x}
    Launch(kernel, (4, 2), arguments, {"num_warps": 8}).start()
    ((grid, got, (device_of,)),) = kernel.starts
    assert grid == (4, 2)
    assert got == {**arguments, "num_warps": 8}
    assert device_of is x


def test_nothing_is_launched_where_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Recorder(monkeypatch)
    Launch(kernel, (4, 0), {"x": torch.zeros(3)}).start()
    assert kernel.starts == []


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_the_second_gpu_are_computed_there_while_the_first_is_current() -> None:
    from ultrarec.kernels import hstu_attention, norm_uvqk

    first = (torch.randn(40, 2, 16), torch.randn(64, 32), torch.tensor([0, 40]))
    first, second = (tuple(x.to(device) for x in first) for device in ("cuda:0", "cuda:1"))
    for op in (
        lambda x, weight, offsets: hstu_attention(x, x, x, offsets, max_seq_len=40, backend="triton"),
        lambda x, weight, offsets: norm_uvqk(x.flatten(1), weight, num_activated=8, backend="triton"),
    ):
        assert torch.equal(op(*first).cpu(), op(*second).cpu())
