"""Which tiles the Triton attention of a run takes, in its plan: other tiles sum in another order, and so a run that
continues with others has other bits than one that never stopped.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .journal import tell

LABEL = "attention tiles: "


def with_tiles(plan: str, device: torch.device) -> str:
    """The plan of a run and, where Triton kernels run, a line on the tiles that this process takes."""
    return plan if device.type == "cpu" else plan + tiles_line(device)


def tiles_line(device: torch.device) -> str:
    """The built-in tiles, or those that were measured on a device like this one, by their hash."""
    # Triton is for Linux only.
    from ..kernels.hstu_attention.triton_blocks import target_of
    from ..kernels.hstu_attention.triton_tuned import choices_for, device_name_of, digest_of

    name = device_name_of(device, target_of(device))
    choices = choices_for(name) if name is not None else {}
    return f"{LABEL}{f'tuned, {digest_of(choices)}' if choices else 'built-in'}\n"


def tell_of_other_tiles(plan_file: Path, plan: str) -> None:
    """Warn if a run was trained with other tiles so far than it continues with."""
    before, now = (_tiles_of(text) for text in (plan_file.read_text() if plan_file.is_file() else "", plan))
    if before is not None and now is not None and before != now:
        tell(
            f"ATTENTION: {plan_file} names other tiles of the attention ({before}) than this process takes ({now}): "
            "from here on sums are rounded otherwise than in a run that never stopped; to have the same bits, restore "
            "the file that `ultrarec bench attention --tune` wrote"
        )


def _tiles_of(plan: str) -> str | None:
    lines = [line.removeprefix(LABEL) for line in plan.splitlines() if line.startswith(LABEL)]
    return lines[0] if lines else None
