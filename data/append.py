"""`ultrarec prepare --append`: newer logs join a prepared dataset; what they do not touch stays as it is.

New files are written beside the old and brought to the disk, `dataset.json` is replaced in one step, and what it no
longer names is removed: at any moment, a power cut included, the folder is either the old dataset or the new one. The
steps are in `preparation/`.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .atomic import full_disk_explained, sync, undisturbed
from .errors import UserError, counted
from .locations import is_uri
from .locks import is_locked, open_lock
from .preparation.options import EngineName, PrepareOptions
from .schema import DATASET_FILE, HISTORIES_FOLDER, DatasetInfo, HistoryFile, SourceFile, Vocabulary, file_sha256

TEMPORARY = "append.tmp-"
_OURS = re.compile(r"items(-\d+)?\.parquet|part-\d+\.parquet")
"""Names that `prepare` and `append` give; whatever else lies in a dataset's folders is the user's."""


def append(
    out: Path,
    logs: tuple[str, ...],
    *,
    engine: EngineName = "duckdb",
    spark_master: str | None = None,
    memory_limit: str = "4GB",
    threads: int | None = None,
    csv_delimiter: str | None = None,
    csv_columns: tuple[str, ...] = (),
    report: Callable[[str], None] = lambda line: None,
) -> DatasetInfo:
    """Add the events of newer logs to the dataset at `out`, with its own roles, columns and split.

    The result is that of preparing the old logs and then the new ones together, but for two things: items keep their
    ids, and new ones follow in the order of their original ids; rows keep their places, and new users follow.
    Only files with users who have new events are written again.

    Raises UserError for everything the user can mend, in particular where the histories do not hold what the result
    depends on; then, as after an interruption, the dataset is what it was.
    """
    with _locked(out), full_disk_explained(out):
        info = DatasetInfo.load(out)
        _check_can_grow(info)
        _check_files(info, report)
        options = PrepareOptions(
            logs=logs,
            out=out,
            user=info.roles.user,
            item=info.roles.item,
            time=info.roles.time,
            order=info.roles.order,
            actions=info.roles.actions,
            columns=tuple(info.event_columns),
            user_columns=tuple(info.user_columns),
            leave_last=info.split.num_events,
            split_time=info.split.time,
            validation_time=info.split.validation_time,
            engine=engine,
            spark_master=spark_master,
            memory_limit=memory_limit,
            threads=threads,
            csv_delimiter=csv_delimiter,
            csv_columns=csv_columns,
        )
        try:
            _remove_what_is_not_named(info)
            grown = _grow(info, options, report)
            grown.write()
            sync(out)
        finally:
            # What the file says, and not how far this came: a signal may come between its being written and the next
            # line.
            with undisturbed():
                info = DatasetInfo.load(out)
                _remove_what_is_not_named(info)
    counts = info.counts
    totals = counted(counts.users, "user"), counted(counts.events, "event"), counted(counts.items, "item")
    report(f"{out}: {', '.join(totals)}")
    report("runs that began with the dataset as it was before cannot continue on it; begin new ones")
    return info


def _grow(info: DatasetInfo, options: PrepareOptions, report: Callable[[str], None]) -> DatasetInfo:
    """Move all new files into the dataset's folder; what `dataset.json` is to say of them."""
    from .preparation import engines, sources
    from .preparation.growth import grow

    log = sources.find_log(options)
    sources_of_log = log.describe()
    _check_are_new(info, sources_of_log)
    report(f"log: {counted(len(log.paths), f'{log.format} file')}, {log.num_bytes / 1e6:,.1f} MB")
    root = info.folder / f"{TEMPORARY}{os.getpid()}"
    work = root / "work"
    work.mkdir(parents=True)
    read = engines.readable(log, options, work, report)
    with engines.open_engine(options, work, report) as engine:
        grown = grow(engine, info, read, options, root, first_number=_first_free_number(info.folder), report=report)
    new = [*(root / HISTORIES_FOLDER).iterdir(), *root.glob("items-*.parquet")]
    for path in new:
        sync(path)
        path.rename(info.folder / path.relative_to(root))
    for folder in (info.folder / HISTORIES_FOLDER, info.folder):
        sync(folder)
    return replace(grown, sources=info.sources + sources_of_log)


def _check_are_new(info: DatasetInfo, files: tuple[SourceFile, ...]) -> None:
    """Raises UserError for a log that the dataset holds, under whatever name."""
    known = {source.sha256: source.path for source in info.sources if source.sha256}
    # Of older datasets, whose sources have no checksum.
    places = {(_place(source.path), source.bytes): source.path for source in info.sources if not source.sha256}
    for file in files:
        was = known.get(file.sha256) or places.get((_place(file.path), file.bytes))
        if was is not None:
            name = "" if was == file.path else f", as {was}"
            raise UserError(f"{file.path} is in {info.root} already{name}; append newer logs only")


def _place(path: str) -> str:
    return path if is_uri(path) else str(Path(path).resolve())


def _check_files(info: DatasetInfo, report: Callable[[str], None]) -> None:
    """Raises UserError for a file that is not as it was written, before anything is read into the result.

    Whole files, and not what an append reads of them: the checksums of pages do not cover the footers, and new files
    with checksums of their own would vouch for what came of a damaged one.
    """
    report("checking the files of the dataset")
    written: list[HistoryFile | Vocabulary] = [*info.files, *info.vocabularies.values()]
    for file in written:
        path = info.locate(file.path)
        if problem := _problem(path, file):
            raise UserError(
                f"--append: {path} {problem}; restore it, or prepare all logs together; nothing was changed"
            )


def _problem(path: Path, file: HistoryFile | Vocabulary) -> str | None:
    """How a file differs from what `dataset.json` says of it."""
    try:
        if isinstance(file, HistoryFile) and (found := file.damage(path.stat().st_size if path.is_file() else None)):
            return found
        if file_sha256(path) != file.sha256:
            return "is damaged: its SHA-256 is not the one in dataset.json"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _check_can_grow(info: DatasetInfo) -> None:
    remedy = "prepare all logs together instead"
    if info.minimums is None:
        raise UserError(f"--append: {info.root} was prepared by an older version, which kept too little; {remedy}")
    if info.minimums.user_events or info.minimums.item_events:
        raise UserError(
            f"--append: {info.root} was prepared with --min-user-events {info.minimums.user_events} and "
            f"--min-item-events {info.minimums.item_events}; the users and items left out might reach these by the new "
            f"events, but theirs before are not kept: {remedy}"
        )
    if info.split.kind == "leave_last" and info.user_columns:
        raise UserError(
            f"--append: {info.root} has --leave-last {info.split.num_events} and the user column "
            f"{info.user_columns[0]!r}: its value at events that become training events is not kept; {remedy}"
        )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One process at a time; the lock goes with its process, however that ends."""
    if not (out / DATASET_FILE).is_file():
        DatasetInfo.load(out)  # says what is wrong
    try:
        descriptor = open_lock(out)
    except OSError as error:
        raise UserError(f"--append: cannot write to {out} ({error.strerror}); see who may write there") from None
    try:
        if not is_locked(descriptor):
            raise UserError(f"--append: another process is appending to {out} now; wait for it")
        yield
    finally:
        os.close(descriptor)


def _remove_what_is_not_named(info: DatasetInfo) -> None:
    """Remove files that only a stopped or a finished append can have left: neither readers nor users know them."""
    named = {*info.history_paths, *(info.locate(each.path) for each in info.vocabularies.values())}
    for path in [*info.folder.glob(f"{HISTORIES_FOLDER}/part-*.parquet"), *info.folder.glob("items*.parquet")]:
        if _OURS.fullmatch(path.name) and path not in named:
            path.unlink()
    for path in info.folder.glob(f".{DATASET_FILE}.*"):
        path.unlink()
    for folder in info.folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _first_free_number(root: Path) -> int:
    numbers = [re.fullmatch(r"part-(\d+)", path.stem) for path in (root / HISTORIES_FOLDER).iterdir()]
    return 1 + max((int(found[1]) for found in numbers if found), default=-1)
