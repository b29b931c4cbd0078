"""What the policy `data.bad_data = "skip"` leaves out when a run opens its dataset, and what that must not change."""

from __future__ import annotations

from collections.abc import Sequence

from ..data.errors import UserError
from ..data.faults import Fault, NothingLeftError
from ..data.loader import Loader, LoaderState
from ..data.schema import DatasetInfo
from .build import build_loader
from .config import Config
from .journal import tell
from .parallel import World, gather_objects, on_main
from .report import OPENING_FILE, SkipLog


def open_loader(
    config: Config, info: DatasetInfo, world: World, skips: SkipLog, *, state: LoaderState, owns: bool
) -> Loader:
    """The training batches from `state` on; what is left out of the dataset is recorded first.

    The order of the samples depends on which can be counted, so that a position in it holds only while that stays.

    Args:
        owns: the run folder of `skips` is that of the run whose state this is.

    Raises:
        UserError: ranks see different damage, or a run within an epoch other damage than when it began.
        NothingLeftError: nothing is left to train on.
    """
    try:
        loader = build_loader(config, info, world, split="train", state=state)
    except NothingLeftError as error:
        faults = error.faults
        check_ranks(faults)
        on_main(world, lambda: _record(skips, faults))
        raise
    check_ranks(loader.faults)
    if owns and state.consumed:
        on_main(world, lambda: _check_unchanged(skips.at_opening, loader.faults))
    on_main(world, lambda: _record(skips, loader.faults))
    return loader


def _record(skips: SkipLog, faults: Sequence[Fault]) -> None:
    try:
        skips.opened(faults)
    except OSError as error:
        raise UserError(
            f"{skips.folder}: what the dataset lacks cannot be listed there ({error.strerror}); choose another --out"
        ) from None
    if faults:
        rows = sum(fault.num_rows for fault in faults)
        tell(
            f"ATTENTION: {rows} row(s) are left out as damaged (data.bad_data='skip'), first {faults[0]}: "
            f"{faults[0].problem}; all in {skips.folder / OPENING_FILE}"
        )


def check_ranks(faults: Sequence[Fault]) -> None:
    """Compare what the ranks left out on opening: each opened every file for itself, and a shared file system may show
    them different ones. Every rank takes part, also one that has nothing left.

    Raises:
        UserError: they differ, on every rank.
    """
    by_rank = gather_objects([str(fault) for fault in faults])
    for rank, found in enumerate(by_rank):
        if found != by_rank[0]:
            differing = sorted(set(found) ^ set(by_rank[0]))
            raise UserError(
                f"ranks 0 and {rank} find different data damaged, first {differing[0]}: their samples would not be the "
                "same; see that all machines see the same files, and start again"
            )


def _check_unchanged(before: Sequence[Fault], now: Sequence[Fault]) -> None:
    known = {_place(fault) for fault in before}
    changed = [str(fault) for fault in now if _place(fault) not in known]
    missing = known - {_place(fault) for fault in now}
    changed += [str(fault) for fault in before if _place(fault) in missing]
    if changed:
        raise UserError(
            f"the dataset is damaged in other places than when this epoch began, first {changed[0]}: what is left "
            "would come in another order, and samples would be lost or repeated; restore the files as they were to "
            "continue, or begin another run with the weights of this one (checkpoint.start_from)"
        )


def _place(fault: Fault) -> tuple[str, int | None, int | None]:
    """Where it is, wherever the dataset lies."""
    return "/".join(fault.file.split("/")[-2:]), fault.row_group, fault.row
