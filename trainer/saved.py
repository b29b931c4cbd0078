"""Where a run has saved last, noted in its folder: checkpoints that are missed later are not taken for none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..data.errors import UserError
from ..data.locations import is_uri, without_keys
from .journal import tell
from .manifest import step_of
from .storage import Location, put

SAVED_FILE = "saved.json"


@dataclass(frozen=True, slots=True)
class Saved:
    """The newest complete checkpoint of a run."""

    step: int
    home: str | None
    """Where the run keeps its checkpoints; None in the run folder itself, which may be moved."""


def remember_saved(out: Path, place: str | None, step: int) -> None:
    """Note that a checkpoint is complete; where there is no room for that, the note before stays.

    Args:
        place: `checkpoint.path`.
    """
    with suppress(OSError):
        put(out / SAVED_FILE, json.dumps({"step": step, "home": _home(out, place)}).encode())


def check_saved(out: Path, place: str | None, complete: Sequence[Location]) -> None:
    """Compare what a run noted with the complete checkpoints that are there.

    Raises:
        UserError: none is there, or older ones in another place: training from there would drop what the run wrote of
            the steps since.
    """
    saved, newest = _read(out), step_of(complete[-1]) if complete else None
    if saved is None or (newest is not None and newest >= saved.step):
        return
    noted, home = saved.home or out, _home(out, place)
    if saved.home != home:
        remedy = f"set checkpoint.path to {saved.home}" if saved.home else "take checkpoint.path out of the settings"
        raise UserError(
            f"the run in {out} saved step {saved.step} to {noted}, and {home or out} holds "
            f"{'no checkpoint' if newest is None else f'step {newest} at most'}; {remedy} to continue it, or choose "
            "another --out"
        )
    if newest is None:
        raise UserError(
            f"the run in {out} saved step {saved.step} to {noted}, which holds no complete checkpoint now; mount or "
            f"restore it to continue the run, or choose another --out, or delete {out} to begin again"
        )
    tell(f"ATTENTION: the run saved step {saved.step} to {noted}, where the newest checkpoint is now that of {newest}")


def _home(out: Path, place: str | None) -> str | None:
    if place is None or is_uri(place):
        return place and without_keys(place)
    folder = Path(place).resolve()
    return None if folder == out.resolve() else str(folder)


def _read(out: Path) -> Saved | None:
    """None without a note, or with one that a full disk or a hand has spoilt."""
    try:
        values = json.loads((out / SAVED_FILE).read_bytes())
        return Saved(int(values["step"]), values["home"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
