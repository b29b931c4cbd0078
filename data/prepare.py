"""`ultrarec prepare`: an interaction log becomes a prepared dataset, or joins one, whole or not at all.

An engine (DuckDB, within a memory limit, or Spark) checks, filters, splits and sorts the log; what comes back sorted is
streamed into Parquet. Everything happens in a folder beside the output that is renamed when the dataset is complete.

This module imports nothing heavy, so that the command line can mount it; the steps are in `preparation/`.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from .atomic import give_name, run_until_signalled, sync, sync_tree, temporary_beside, what_is_left
from .errors import UserError, counted
from .locations import is_uri, shown
from .preparation.options import ENGINES, PrepareOptions
from .schema import ITEMS_FILE, Counts, DatasetInfo, Minimums

if TYPE_CHECKING:
    from .preparation.engine import Engine
    from .preparation.sources import Log

__all__ = ["PrepareOptions", "Report", "add_arguments", "options_of", "prepare", "run"]

Report = Callable[[str], None]
"""Receives one line of progress."""


def prepare(options: PrepareOptions, *, report: Report = lambda line: None) -> DatasetInfo:
    """Turn an interaction log into a prepared dataset at `options.out` (see `data.schema` for its form).

    Equal input and options give byte-identical histories, whatever the number of threads.

    Raises UserError for everything the user can mend; then, as after an interruption, nothing is left on disk.
    """
    from .preparation import engines, sources

    log = sources.find_log(options)
    report(f"log: {counted(len(log.paths), f'{log.format} file')}, {log.num_bytes / 1e6:,.1f} MB")
    with temporary_beside(options.out) as folder:
        work, root = folder / "work", folder / "dataset"
        work.mkdir()
        root.mkdir()
        read = engines.readable(log, options, work, report)
        with engines.open_engine(options, work, report) as engine:
            info = replace(_build(engine, read, options, root, report), sources=log.describe())
        sync_tree(root)
        info.write()
        sync(root)
        give_name(root, options.out)
        sync(options.out.parent)
    _report_totals(options.out, info, report)
    return replace(info, root=options.out)


def _build(engine: "Engine", log: "Log", options: PrepareOptions, root: Path, report: Report) -> DatasetInfo:
    """Write all files of the dataset but dataset.json to `root`; `log` as the engine reads it, which is not stated."""
    from .preparation import split, staging, writing

    staged = staging.stage(engine, log, options, report=report)
    totals = split.build_tables(engine, options, report=report)
    written = writing.write_histories(
        split.users_in_order(engine, staged),
        split.events_in_order(engine, options, staged),
        staged.columns,
        root,
        text_bytes=staged.text_bytes,
        num_users=totals["users"],
        num_items=totals["items"],
        report=report,
    )
    items = split.items_in_order(engine, staged)
    vocabulary = writing.write_items(items, written.items.counts, root / ITEMS_FILE, relative_to=root)
    return DatasetInfo(
        root=root,
        roles=options.roles(),
        columns=staged.columns,
        vocabularies={"items": vocabulary},
        counts=Counts(**totals, unknown_item_events=written.unknown_item_events),
        split=split.describe(options),
        files=written.files,
        sources=(),
        created_by=f"ultrarec {version('ultrarec')}",
        lengths=written.lengths.summary(),
        minimums=Minimums(user_events=options.min_user_events, item_events=options.min_item_events),
    )


def _report_totals(out: Path, info: DatasetInfo, report: Report) -> None:
    counts = info.counts
    totals = counted(counts.users, "user"), counted(counts.events, "event"), counted(counts.items, "item")
    report(f"{out}: {', '.join(totals)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ultrarec prepare` on `parser`."""
    add = parser.add_argument
    add(
        "logs",
        nargs="+",
        metavar="LOG",
        help="Parquet or CSV files, folders, globs, local or s3://…, gs://…, hdfs://…; or sample:kuairand",
    )
    add(
        "--out", required=True, type=_local_folder, metavar="DIR", help="folder of the prepared dataset; must not exist"
    )
    add("--append", action="store_true", help="add newer logs to the dataset at --out, with its columns and split")
    add("--user", metavar="COL", help="user id: integers or strings")
    add("--item", metavar="COL", help="item id: integers or strings")
    add("--time", metavar="COL", help="time of the event: integers, or timestamps (become milliseconds)")
    add("--order", metavar="COL", help="orders events of equal time (default: the order of files and rows)")
    add("--action", action="append", default=[], metavar="COL", help="boolean column; repeat, the k-th becomes bit k")
    add("--column", action="append", default=[], metavar="COL", help="further column, one value per event; repeat")
    add("--user-column", action="append", default=[], metavar="COL", help="further column, one value per user; repeat")
    add("--min-user-events", type=int, default=0, metavar="N", help="leave out users with fewer events")
    add("--min-item-events", type=int, default=0, metavar="N", help="leave out items with fewer events")
    add("--leave-last", type=int, metavar="N", help="test each user's last N events, validate on the N before")
    add("--split-time", type=int, metavar="T", help="test the events from this time on")
    add("--validation-time", type=int, metavar="V", help="validate on the events from V to --split-time")
    add("--engine", choices=ENGINES, default="duckdb", help="what reads and sorts the log (default: duckdb)")
    add("--spark-master", metavar="URL", help="with --engine spark; default: the session or settings that Spark finds")
    add("--memory-limit", default="4GB", metavar="SIZE", help="of DuckDB, before it spills to disk (default: 4GB)")
    add("--threads", type=int, metavar="N", help="of DuckDB; default: all cores")
    add("--csv-delimiter", metavar="TEXT", help="between CSV fields, for example '::' (default: detected)")
    add("--csv-columns", default="", metavar="NAMES", help="comma-separated names for CSV files without a header line")


def _local_folder(text: str) -> Path:
    if is_uri(text):
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is in an object store; prepare in a folder of this machine, then copy it there with the "
            "store's own tool"
        )
    return Path(text)


def options_of(args: argparse.Namespace) -> PrepareOptions:
    """The parsed arguments of `add_arguments` as options.

    Raises UserError where they contradict each other, or leave out what a new dataset needs.
    """
    for name in ("user", "item", "time"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing: name the column of the log that has it")
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
        engine=args.engine,
        spark_master=args.spark_master,
        memory_limit=args.memory_limit,
        threads=args.threads,
        csv_delimiter=args.csv_delimiter,
        csv_columns=_csv_columns(args),
    )


def _csv_columns(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(name.strip() for name in args.csv_columns.split(",") if name.strip())


DECIDED_BY_THE_DATASET = (
    "user", "item", "time", "order", "action", "column", "user_column", "min_user_events", "min_item_events",
    "leave_last", "split_time", "validation_time",
)  # fmt: skip


def _prepare(args: argparse.Namespace, report: Report) -> None:
    prepare(options_of(args), report=report)


def _append(args: argparse.Namespace, report: Report) -> None:
    from .append import append

    for name in DECIDED_BY_THE_DATASET:
        if getattr(args, name):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} {getattr(args, name)} with --append: {args.out} has decided that; leave it out")
    append(
        args.out,
        tuple(args.logs),
        engine=args.engine,
        spark_master=args.spark_master,
        memory_limit=args.memory_limit,
        threads=args.threads,
        csv_delimiter=args.csv_delimiter,
        csv_columns=_csv_columns(args),
        report=report,
    )


def run(args: argparse.Namespace) -> int:
    """The `prepare` subcommand; returns the exit status. UserError is left to the command line to print."""

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if not args.append:
        return run_until_signalled(lambda: _prepare(args, report), left=lambda: what_is_left(args.out))
    before = DatasetInfo.load(args.out).fingerprint

    def left() -> str:
        is_old = DatasetInfo.load(args.out).fingerprint == before
        return f"{args.out} is {'as it was, without' if is_old else 'complete, with'} the new logs"

    return run_until_signalled(lambda: _append(args, report), left=left)
