"""A Triton kernel with all that it is called with, as a value: to be started, or compiled for a device not at hand."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel; `arguments` by name, the compile-time ones too."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int] = field(default_factory=lambda: {"num_warps": 4})

    def start(self) -> None:
        """Run it on the device of its tensors; nothing to do is nothing launched."""
        if all(self.grid):
            self.kernel[self.grid](**self.arguments, **self.options)
