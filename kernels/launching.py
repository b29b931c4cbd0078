"""A Triton kernel with all that it is called with, as a value: to be started, or compiled for a device not at hand."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel; `arguments` by name, the compile-time ones too: tensors, numbers, or tuples of them."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int] = field(default_factory=lambda: {"num_warps": 4})

    def start(self) -> None:
        """Run it on the device of its tensors; nothing to do is nothing launched."""
        if all(self.grid):
            # Triton launches on the current device, which need not be that of the tensors.
            with torch.cuda.device_of(next(_tensors_in(self.arguments.values()))):  # type: ignore[no-untyped-call]
                self.kernel[self.grid](**self.arguments, **self.options)

    def compile(self) -> Any:
        """Compile it for the active driver's target, without running it."""
        return self.kernel.warmup(**self.arguments, grid=self.grid, **self.options)


def contiguous(x: Tensor | None) -> Tensor | None:
    """As kernels take vectors and tables, which they read without strides; None stays None."""
    return None if x is None else x.contiguous()


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors_in(value)
