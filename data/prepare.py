"""`ultrarec prepare`: an interaction log becomes a prepared dataset, whole or not at all.

The log is staged in a DuckDB file, checked, filtered, split and sorted there within the memory limit, and streamed
into Parquet. Everything happens in a folder beside the output that is renamed when the dataset is complete.

This module imports nothing heavy, so that the command line can mount it; the steps are in `preparation/`.
"""

import argparse
import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType

from .errors import UserError, counted
from .preparation.options import PrepareOptions
from .schema import DatasetInfo, Roles

__all__ = ["PrepareOptions", "Report", "add_arguments", "options_of", "prepare", "run"]

Report = Callable[[str], None]
"""Receives one line of progress."""


def prepare(options: PrepareOptions, *, report: Report = lambda line: None) -> DatasetInfo:
    """Turn an interaction log into a prepared dataset at `options.out` (see `data.schema` for its form).

    Equal input and options give byte-identical histories, whatever the number of threads.

    Raises UserError for everything the user can mend; then, as after an interruption, nothing is left on disk.
    """
    from .preparation import sources, split, staging, writing

    log = sources.find_log(options)
    report(f"log: {counted(len(log.paths), f'{log.format} file')}, {log.num_bytes / 1e6:,.1f} MB")
    with _temporary_beside(options.out) as folder:
        work, root = folder / "work", folder / "dataset"
        work.mkdir()
        root.mkdir()
        with staging.open_database(work, memory_limit=options.memory_limit, threads=options.threads) as database:
            columns = staging.stage(database, log, options, report=report)
            counts = split.build_tables(database, options, report=report)
            declared = staging.declared_parts(options)
            files = writing.write_histories(database, declared, root, num_users=counts.users, report=report)
            vocabulary = writing.write_items(database, root)
        info = DatasetInfo(
            root=root,
            roles=Roles(
                user=options.user, item=options.item, time=options.time, order=options.order, actions=options.actions
            ),
            columns=columns,
            vocabularies={"items": vocabulary},
            counts=counts,
            split=split.describe(options),
            files=files,
            sources=log.describe(),
            created_by=f"ultrarec {version('ultrarec')}",
        )
        info.write()
        root.rename(options.out)
    totals = counted(counts.users, "user"), counted(counts.events, "event"), counted(counts.items, "item")
    report(f"{options.out}: {', '.join(totals)}")
    return replace(info, root=options.out)


@contextmanager
def _temporary_beside(out: Path) -> Iterator[Path]:
    """A folder on the file system of `out`, removed at the end whatever happens."""
    if os.path.lexists(out):  # unlike Path.exists, it takes a name of any length
        raise UserError(f"--out {out} exists already; nothing is overwritten: give a new folder, or remove that one")
    folder = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    new_parents = [parent for parent in folder.parents if not os.path.lexists(parent)]
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        _remove_empty(new_parents)
        raise UserError(f"--out {out}: {folder} cannot be made ({error.strerror}); give another place") from error
    try:
        yield folder
    except Exception as error:
        if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            raise UserError(
                f"--out {out}: the disk is full; sorting needs several times the size of the log beside the output: "
                "free some, or give another place"
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _remove_empty(new_parents)


def _remove_empty(folders: list[Path]) -> None:
    """Remove what is empty, innermost first; a folder that holds the complete dataset stays."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _termination_as_interruption() -> Iterator[None]:
    """Let SIGTERM, as job schedulers and `kill` send it, end the work as Ctrl-C does: cleaned up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ultrarec prepare` on `parser`."""
    add = parser.add_argument
    add("logs", nargs="+", metavar="LOG", help="Parquet or CSV files, folders, globs, or sample:kuairand")
    add("--out", required=True, type=Path, metavar="DIR", help="folder of the prepared dataset; must not exist")
    add("--user", required=True, metavar="COL", help="user id: integers or strings")
    add("--item", required=True, metavar="COL", help="item id: integers or strings")
    add("--time", required=True, metavar="COL", help="time of the event: integers, or timestamps (become milliseconds)")
    add("--order", metavar="COL", help="orders events of equal time (default: the order of files and rows)")
    add("--action", action="append", default=[], metavar="COL", help="boolean column; repeat, the k-th becomes bit k")
    add("--column", action="append", default=[], metavar="COL", help="further column, one value per event; repeat")
    add("--user-column", action="append", default=[], metavar="COL", help="further column, one value per user; repeat")
    add("--min-user-events", type=int, default=0, metavar="N", help="leave out users with fewer events")
    add("--min-item-events", type=int, default=0, metavar="N", help="leave out items with fewer events")
    add("--leave-last", type=int, metavar="N", help="test each user's last N events, validate on the N before")
    add("--split-time", type=int, metavar="T", help="test the events from this time on")
    add("--validation-time", type=int, metavar="V", help="validate on the events from V to --split-time")
    add("--memory-limit", default="4GB", metavar="SIZE", help="memory before spilling to disk (default: 4GB)")
    add("--threads", type=int, metavar="N", help="default: all cores")
    add("--csv-delimiter", metavar="TEXT", help="between CSV fields, for example '::' (default: detected)")
    add("--csv-columns", default="", metavar="NAMES", help="comma-separated names for CSV files without a header line")


def options_of(args: argparse.Namespace) -> PrepareOptions:
    """The parsed arguments of `add_arguments` as options."""
    return PrepareOptions(
        logs=tuple(args.logs),
        out=args.out,
        user=args.user,
        item=args.item,
        time=args.time,
        order=args.order,
        actions=tuple(args.action),
        columns=tuple(args.column),
        user_columns=tuple(args.user_column),
        min_user_events=args.min_user_events,
        min_item_events=args.min_item_events,
        leave_last=args.leave_last,
        split_time=args.split_time,
        validation_time=args.validation_time,
        memory_limit=args.memory_limit,
        threads=args.threads,
        csv_delimiter=args.csv_delimiter,
        csv_columns=tuple(name.strip() for name in args.csv_columns.split(",") if name.strip()),
    )


def run(args: argparse.Namespace) -> int:
    """The `prepare` subcommand; returns the exit status. UserError is left to the command line to print."""
    options = options_of(args)
    with _termination_as_interruption():
        prepare(options, report=lambda line: print(line, file=sys.stderr, flush=True))
    return 0
