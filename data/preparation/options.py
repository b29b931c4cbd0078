"""What `ultrarec prepare` can be asked for; imports nothing heavy."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..errors import UserError
from ..locations import is_uri, shown
from ..schema import BUILT_IN_COLUMNS, MAX_ACTIONS, Roles

EngineName = Literal["duckdb", "spark"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
MEMORY_LIMIT = re.compile(r"(?P<size>\d+(\.\d+)?)\s*(?P<unit>[KMGT]i?B)", re.IGNORECASE)
MOST_THREADS = 1024  # of DuckDB; each takes memory for itself, and far more cannot be started
LONGEST_DELIMITER = 4  # bytes; the limit of DuckDB's CSV reader


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareOptions:
    """What to prepare, and how; raises UserError where the options contradict each other."""

    logs: tuple[str, ...]
    """Files, folders and globs, local or addresses of a store (s3://, gs://, hdfs://, file://), or "sample:NAME" for a
    log that comes with ultrarec; read in this order."""
    out: Path
    """Folder of the prepared dataset; must not exist yet."""
    user: str
    item: str
    time: str
    order: str | None = None
    """Column that orders events of equal time; without it the order of files and rows does."""
    actions: tuple[str, ...] = ()
    """Boolean columns (true/false or 1/0); the k-th becomes bit k of the `actions` mask."""
    columns: tuple[str, ...] = ()
    """Further columns, kept with one value per event."""
    user_columns: tuple[str, ...] = ()
    """Further columns, kept with one value per user: that of all the training events, null without any."""
    min_user_events: int = 0
    """Users with fewer events are left out. With `split_time` only training events count."""
    min_item_events: int = 0
    """Events of items with fewer events are left out. With `split_time` only training events count, and the events
    stay, their item unknown: they are exposures of the test period all the same."""
    leave_last: int | None = None
    """Test the last N events of each user and validate on the N before, where the user has at least 2N + 1."""
    split_time: int | None = None
    """Test the events from this time on; in the unit of the time column, milliseconds for timestamp types."""
    validation_time: int | None = None
    """Validate on the events from this time on and before `split_time`."""
    engine: EngineName = "duckdb"
    """What reads, counts and sorts the log; the result does not depend on it."""
    spark_master: str | None = None
    """Where Spark runs; by default what the session that is there, or Spark's own settings, say."""
    memory_limit: str = "4GB"
    """Memory for the process; what DuckDB cannot hold of it goes to disk, beside the output."""
    threads: int | None = None
    """Threads for DuckDB, all cores by default; the result does not depend on it."""
    csv_delimiter: str | None = None
    """Between the fields of CSV files, up to four bytes; detected in the first line by default."""
    csv_columns: tuple[str, ...] = ()
    """Names of the columns of CSV files that have no header line."""

    def __post_init__(self) -> None:
        self._check_columns()
        self._check_split()
        self._check_limits()

    def roles(self) -> Roles:
        """The columns that are not further ones."""
        return Roles(user=self.user, item=self.item, time=self.time, order=self.order, actions=self.actions)

    def parts(self) -> list[tuple[str, str]]:
        """(option, column) of every column that the options name."""
        single = [("--user", self.user), ("--item", self.item), ("--time", self.time)]
        if self.order is not None:
            single.append(("--order", self.order))
        repeated = {"--action": self.actions, "--column": self.columns, "--user-column": self.user_columns}
        return single + [(option, name) for option, names in repeated.items() for name in names]

    def _check_columns(self) -> None:
        taken: dict[str, str] = {}
        for option, name in self.parts():
            if not name:
                raise UserError(f"{option} is empty; name a column of the log")
            if name in taken:
                raise UserError(
                    f"column {name!r} is given as {taken[name]} and as {option}; "
                    "a column plays one part, so drop one of the two"
                )
            taken[name] = option
        for name in self.columns + self.user_columns:
            if name in BUILT_IN_COLUMNS:
                raise UserError(
                    f"{taken[name]} {name!r}: the histories have a column of that name already; "
                    "rename the column in the log"
                )
        if len(self.actions) > MAX_ACTIONS:
            raise UserError(
                f"{len(self.actions)} actions; one 64-bit mask holds at most {MAX_ACTIONS}: "
                "declare fewer --action, or keep the others with --column"
            )

    def _check_split(self) -> None:
        if self.leave_last is not None and self.split_time is not None:
            raise UserError(
                f"--leave-last {self.leave_last} and --split-time {self.split_time} exclude each other; give one"
            )
        if self.leave_last is not None and self.leave_last < 1:
            raise UserError(f"--leave-last {self.leave_last}: at least 1 event; leave the option out for no split")
        if self.validation_time is None:
            return
        if self.split_time is None:
            raise UserError(f"--validation-time {self.validation_time} needs --split-time, the end of the validation")
        if self.validation_time >= self.split_time:
            raise UserError(
                f"--validation-time {self.validation_time} is not before --split-time {self.split_time}; "
                "validation comes first"
            )

    def _check_limits(self) -> None:
        if not self.logs:
            raise UserError("no log given; name Parquet or CSV files, a folder, a glob, or sample:kuairand")
        remote = next((log for log in self.logs if is_uri(log)), None)
        if remote and self.engine == "spark":
            raise UserError(
                f"{shown(remote)}: --engine spark reads logs from file systems that are mounted where its executors "
                "run; mount the store there, or let DuckDB read it: --engine duckdb"
            )
        for option, value in (
            ("--min-user-events", self.min_user_events),
            ("--min-item-events", self.min_item_events),
        ):
            if value < 0:
                raise UserError(f"{option} {value} is negative; give 0 to keep all, or a count")
        if self.spark_master is not None and self.engine != "spark":
            raise UserError(f"--spark-master {self.spark_master} needs --engine spark; give both, or neither")
        if not MEMORY_LIMIT.fullmatch(self.memory_limit.strip()):
            raise UserError(f"--memory-limit {self.memory_limit!r} is not a size; write it like 512MB or 4GB")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise UserError(
                f"--threads {self.threads}: at least 1, at most {MOST_THREADS}; leave the option out for all cores"
            )
        if self.csv_delimiter is not None and not 1 <= len(self.csv_delimiter.encode()) <= LONGEST_DELIMITER:
            raise UserError(
                f"--csv-delimiter {self.csv_delimiter!r}: 1 to {LONGEST_DELIMITER} bytes, "
                "for example ',' or '::' or a tab"
            )
