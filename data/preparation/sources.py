"""The files of an interaction log: which they are, in which order, and how DuckDB reads them."""

import csv
import glob
import gzip
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO, Literal

import pyarrow
import pyarrow.parquet

from ..errors import UserError, counted, first_line
from ..locations import is_uri
from ..schema import SourceFile, file_sha256
from .options import PrepareOptions
from .remote import RemoteFile, remote_files

SAMPLES = {"kuairand": Path(__file__).parent.parent / "sample" / "kuairand_pure.parquet"}
"""Logs that come with ultrarec, as "sample:NAME"."""

PARQUET_SUFFIXES = (".parquet", ".pq")
CSV_SUFFIXES = (".csv", ".tsv", ".dat", ".csv.gz", ".tsv.gz", ".dat.gz")
DELIMITERS = ("::", "\t", ",", ";", "|")
"""Detected in this order of preference; "::" first, because a lone ":" occurs in clock times."""

PROTOCOL = "ultrarec"
"""Before the address of a remote file, where DuckDB shall ask us for it and nobody else."""

LogPath = Path | RemoteFile


@dataclass(frozen=True, kw_only=True, slots=True)
class Log:
    """The files of a log, all of one format, in reading order."""

    names: tuple[str, ...]
    """As recorded in the dataset: the path, the address without keys, or "sample:NAME"."""
    paths: tuple[LogPath, ...]
    format: Literal["parquet", "csv"]
    delimiter: str = ","
    header: bool = True
    csv_columns: tuple[str, ...] = ()
    """Every column of the CSV files, in their order; empty for Parquet."""

    @property
    def num_bytes(self) -> int:
        """Size of all files, as stored."""
        return sum(map(_size, self.paths))

    def describe(self) -> tuple[SourceFile, ...]:
        """The files as `dataset.json` lists them; reads all that are not in a store."""
        files = zip(self.names, self.paths, strict=True)
        return tuple(SourceFile(path=name, bytes=_size(path), sha256=_sha256(path)) for name, path in files)

    def local_paths(self) -> list[Path]:
        """The files, none of which is in a store."""
        return [path for path in self.paths if isinstance(path, Path)]

    def relation(self, paths: Sequence[LogPath] | None = None) -> str:
        """SQL table function over `paths` (all files by default); CSV columns are all VARCHAR."""
        files = ", ".join(map(_quote_path, paths or self.paths))
        if self.format == "parquet":
            return f"read_parquet([{files}], union_by_name=true, hive_partitioning=false)"
        columns = ", ".join(f"{quote_text(name)}: 'VARCHAR'" for name in self.csv_columns)
        return (
            f"read_csv([{files}], auto_detect=false, delim={quote_text(self.delimiter)}, header={self.header}, "
            f"quote='\"', escape='\"', columns={{{columns}}}, hive_partitioning=false)"
        )


def quote_text(text: str) -> str:
    """A SQL string."""
    return "'" + text.replace("'", "''") + "'"


def quote_name(name: str) -> str:
    """A SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def find_log(options: PrepareOptions) -> Log:
    """Resolve the LOG arguments and make sure that every file has the columns that the options name."""
    found = [file for log in options.logs for file in _files_of(log)]
    places = Counter(path.resolve() if isinstance(path, Path) else path for _, path in found)
    repeated = [str(path) for path, count in places.items() if count > 1]
    if repeated:
        raise UserError(f"{repeated[0]} is given more than once; each file of a log is read once")
    names, paths = zip(*found, strict=True)
    for path in paths:
        if _size(path) == 0:
            raise UserError(f"{path} is empty (0 bytes); remove it from the log")
    formats = [_format_of(path) for path in paths]
    if len(set(formats)) > 1:
        other = paths[formats.index("csv" if formats[0] == "parquet" else "parquet")]
        raise UserError(f"{paths[0]} and {other} are of two formats; a log is all Parquet or all CSV: convert one")
    if formats[0] == "parquet":
        return _parquet_log(names, paths, options)
    return _csv_log(names, paths, options)


def _parquet_log(names: tuple[str, ...], paths: tuple[LogPath, ...], options: PrepareOptions) -> Log:
    for path in paths:
        _check_columns(path, _parquet_columns(path), options)
    return Log(names=names, paths=paths, format="parquet")


def _csv_log(names: tuple[str, ...], paths: tuple[LogPath, ...], options: PrepareOptions) -> Log:
    delimiter = options.csv_delimiter or _detect_delimiter(_first_line(paths[0]))
    columns = options.csv_columns or tuple(_split_line(_first_line(paths[0]), delimiter))
    if len(set(columns)) < len(columns):
        twice = next(name for name, count in Counter(columns).items() if count > 1)
        raise UserError(f"{paths[0]}: two columns are called {twice!r}; rename one, or name them with --csv-columns")
    for path in paths:
        header = _split_line(_first_line(path), delimiter)
        if options.csv_columns and len(header) != len(columns):
            raise UserError(
                f"{path}: its first line has {counted(len(header), 'field')} (delimiter {delimiter!r}), "
                f"--csv-columns names {len(columns)}; name every column, or correct --csv-delimiter"
            )
        if not options.csv_columns and tuple(header) != columns:
            raise UserError(
                f"{path} has the columns {', '.join(header)}, but {paths[0]} has {', '.join(columns)}; "
                "the CSV files of a log have the same columns in the same order"
            )
        _check_columns(path, columns, options)
    header_line = not options.csv_columns
    return Log(names=names, paths=paths, format="csv", delimiter=delimiter, header=header_line, csv_columns=columns)


def _files_of(log: str) -> Sequence[tuple[str, LogPath]]:
    """(recorded name, path) of the files that one LOG argument stands for; globs and folders sorted by name."""
    if log.startswith("sample:"):
        return [(log, _sample(log.removeprefix("sample:")))]
    if is_uri(log):
        return [(str(file), file) for file in remote_files(log, PARQUET_SUFFIXES + CSV_SUFFIXES)]
    path = Path(log)
    if path.is_dir():
        suffixes = PARQUET_SUFFIXES + CSV_SUFFIXES
        files = sorted(file for file in _visible(path) if file.name.lower().endswith(suffixes) and file.is_file())
        if not files:
            raise UserError(f"{log}: no file in the folder ends in {', '.join(suffixes)}; name the files themselves")
    elif path.exists():
        files = [path]
    else:
        files = sorted(file for file in map(Path, glob.glob(log, recursive=True)) if file.is_file())  # noqa: PTH207 (absolute patterns)
        if not files:
            raise UserError(f"{log}: no such file, and no file matches; check the path (now in {Path.cwd()})")
    return [(str(file), file) for file in files]


def _visible(folder: Path) -> Iterator[Path]:
    """What is below a folder, without what Spark and Hive take for no data either: such as the `_temporary` of an
    export that has not ended, whose rows come again when it has.
    """
    for path in folder.rglob("*"):
        if not any(part.startswith(("_", ".")) for part in path.relative_to(folder).parts):
            yield path


def _sample(name: str) -> Path:
    if name not in SAMPLES:
        raise UserError(f"sample:{name} does not exist; there is {', '.join(f'sample:{name}' for name in SAMPLES)}")
    return SAMPLES[name]


def _format_of(path: LogPath) -> Literal["parquet", "csv"]:
    if path.name.lower().endswith(PARQUET_SUFFIXES):
        return "parquet"
    try:
        with _open(path) as file:
            return "parquet" if file.read(4) == b"PAR1" else "csv"
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def _parquet_columns(path: LogPath) -> list[str]:
    try:
        with _open(path) as file:
            return pyarrow.parquet.read_schema(file).names
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); check its permissions") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}); "
            "the file is damaged or of another format: write it again"
        ) from error


def _size(path: LogPath) -> int:
    return path.size if isinstance(path, RemoteFile) else path.stat().st_size


def _sha256(path: LogPath) -> str:
    """Empty for a file in a store: it would have to be fetched once more for it."""
    return "" if isinstance(path, RemoteFile) else file_sha256(path)


def _open(path: LogPath) -> BinaryIO:
    return io.BufferedReader(path.open()) if isinstance(path, RemoteFile) else path.open("rb")


def _quote_path(path: LogPath) -> str:
    return quote_text(f"{PROTOCOL}://{path}" if isinstance(path, RemoteFile) else glob.escape(str(path)))


def _first_line(path: LogPath) -> str:
    compressed = path.name.lower().endswith(".gz")
    try:
        with _open(path) as file, gzip.GzipFile(fileobj=file) if compressed else file as lines:
            return lines.readline().decode("utf-8-sig").rstrip("\r\n")
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as CSV ({error}); it must be UTF-8 text, plain or .gz") from error


def _detect_delimiter(line: str) -> str:
    counts = {delimiter: line.count(delimiter) for delimiter in DELIMITERS}
    best = "::" if counts["::"] else max(counts, key=lambda delimiter: counts[delimiter])
    if not counts[best]:
        raise UserError(f"no delimiter found in the first line {line[:80]!r}; give --csv-delimiter")
    return best


def _split_line(line: str, delimiter: str) -> list[str]:
    if len(delimiter) > 1:
        return line.split(delimiter)
    return next(csv.reader([line], delimiter=delimiter), [])


def _check_columns(path: LogPath, present: Iterable[str], options: PrepareOptions) -> None:
    names = list(present)
    for option, wanted in options.parts():
        if wanted not in names:
            raise UserError(f"{option} {wanted!r} is not a column of {path}; {_suggest(wanted, names)}")
        # DuckDB's column names ignore case: of two such columns it would silently read the first.
        twins = [name for name in names if name.casefold() == wanted.casefold()]
        if len(twins) > 1:
            raise UserError(f"{path}: the columns {', '.join(twins)} differ in case only; rename all but one")


def _suggest(wanted: str, names: list[str]) -> str:
    folded = {name.casefold(): name for name in names}
    close = [folded[name] for name in get_close_matches(wanted.casefold(), folded, n=3, cutoff=0.6)]
    if close:
        return f"did you mean {' or '.join(repr(name) for name in close)}?"
    if any(name.replace(".", "", 1).isdigit() for name in names):
        return f"its first line is {', '.join(names)}: name the columns of a file without a header with --csv-columns"
    return f"it has {', '.join(names)}"
