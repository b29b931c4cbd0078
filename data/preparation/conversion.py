"""Which types each part of a log may have, and how its values become those of the histories, as SQL expressions."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .options import PrepareOptions

INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")
FLOATS = ("FLOAT", "DOUBLE")
NANOSECONDS = ("TIMESTAMP_NS", "TIMESTAMPTZ_NS")
TIMESTAMPS = ("DATE", "TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP WITH TIME ZONE", *NANOSECONDS)
LARGEST_TIME = 2**62  # a float time beyond it would overflow 64 bits on rounding


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """SQL for one part; each expression is over one row of the staged log."""

    value: str
    is_bad: str | None = None
    """True for values that `value` cannot convert; None where there can be none."""
    moment: str | None = None
    """For times finer than `value`: the integer that orders them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One way to read the text of a CSV field; `{x}` stands for the field."""

    fits: str
    value: str
    type: str


# TRY_CAST alone would round "12.5" to 13, and turn the distinct ids "07" and "7" into one.
INTEGER_ID = Reading(
    fits="coalesce(trim({x}) = CAST(TRY_CAST({x} AS BIGINT) AS VARCHAR), false)",
    value="TRY_CAST({x} AS BIGINT)",
    type="BIGINT",
)
INTEGER = Reading(
    fits="(regexp_full_match(trim({x}), '[+-]?[0-9]+') AND TRY_CAST({x} AS BIGINT) IS NOT NULL)",
    value="TRY_CAST({x} AS BIGINT)",
    type="BIGINT",
)
NUMBER = Reading(fits="(TRY_CAST({x} AS DOUBLE) IS NOT NULL)", value="TRY_CAST({x} AS DOUBLE)", type="DOUBLE")
CLOCK = Reading(fits="(TRY_CAST({x} AS TIMESTAMP) IS NOT NULL)", value="TRY_CAST({x} AS TIMESTAMP)", type="TIMESTAMP")
FLAG = Reading(
    fits="(lower(trim({x})) IN ('0', '1', 'true', 'false'))", value="lower(trim({x})) IN ('1', 'true')", type="BOOLEAN"
)
TEXT = Reading(fits="({x} IS NOT NULL)", value="{x}", type="VARCHAR")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What one option of the command line expects of its column."""

    prefix: str
    """Name of the column in the `log` view, numbered where the option can be repeated."""
    rule: str
    convert: Callable[[str, str], Conversion | None]
    """(SQL expression, DuckDB type) -> conversion, or None for a type that breaks the rule."""
    readings: tuple[Reading, ...]
    """For CSV; the first of those that fit the most fields is taken."""
    repeated: bool = False
    may_be_null: bool = False


def _convert_id(x: str, type_name: str) -> Conversion | None:
    if type_name == "VARCHAR":
        return Conversion(value=x)
    if type_name in INTEGERS:
        return Conversion(value=f"CAST({x} AS BIGINT)", is_bad=f"{x} > {2**63 - 1}" if type_name == "UBIGINT" else None)
    return None


def _convert_time(x: str, type_name: str) -> Conversion | None:
    if type_name in INTEGERS:
        return _convert_id(x, type_name)
    if type_name in FLOATS:
        is_bad = f"(isnan({x}) OR {x} <> floor({x}) OR abs({x}) > {LARGEST_TIME})"
        return Conversion(value=f"CAST({x} AS BIGINT)", is_bad=is_bad)
    if type_name in TIMESTAMPS:
        ticks, per_ms = (f"epoch_ns({x})", 1_000_000) if type_name in NANOSECONDS else (f"epoch_us({x})", 1_000)
        # Division rounds towards zero, which would put the milliseconds around 1970 together.
        milliseconds = f"(divide({ticks}, {per_ms}) - CAST({ticks} % {per_ms} < 0 AS BIGINT))"
        return Conversion(value=milliseconds, moment=ticks, is_bad=f"{ticks} IS NULL")  # infinite
    return None


def _convert_order(x: str, type_name: str) -> Conversion | None:
    return Conversion(value=x) if type_name in INTEGERS + FLOATS + TIMESTAMPS + ("VARCHAR",) else None


def _convert_action(x: str, type_name: str) -> Conversion | None:
    if type_name == "BOOLEAN":
        return Conversion(value=x)
    if type_name in INTEGERS:
        return Conversion(value=f"({x} = 1)", is_bad=f"({x} NOT IN (0, 1))")
    return None


def _convert_column(x: str, type_name: str) -> Conversion | None:
    return Conversion(value=x) if type_name in INTEGERS + FLOATS + ("BOOLEAN", "VARCHAR") else None


_USER = Kind(
    prefix="user_id",
    rule="ids are integers of 64 bits or strings",
    convert=_convert_id,
    readings=(INTEGER_ID, TEXT),
)
_COLUMN = Kind(
    prefix="column",
    rule="further columns are numbers, booleans or strings",
    convert=_convert_column,
    readings=(INTEGER, NUMBER, TEXT),
    repeated=True,
    may_be_null=True,
)
ARROW_TYPES = {
    "TINYINT": "int8",
    "SMALLINT": "int16",
    "INTEGER": "int32",
    "BIGINT": "int64",
    "UTINYINT": "uint8",
    "USMALLINT": "uint16",
    "UINTEGER": "uint32",
    "UBIGINT": "uint64",
    "FLOAT": "float",
    "DOUBLE": "double",
    "BOOLEAN": "bool",
    "VARCHAR": "string",
}
"""What a further column is in the histories."""

KINDS = {
    "--user": _USER,
    "--item": replace(_USER, prefix="item_id"),
    "--time": Kind(
        prefix="time",
        rule="times are whole numbers of 64 bits, or timestamps",
        convert=_convert_time,
        readings=(INTEGER, NUMBER, CLOCK),
    ),
    "--order": Kind(
        prefix="tie",
        rule="the order is a number, a string or a timestamp",
        convert=_convert_order,
        readings=(INTEGER, NUMBER, TEXT),
    ),
    "--action": Kind(
        prefix="action",
        rule="actions are booleans, or the integers 0 and 1",
        convert=_convert_action,
        readings=(FLAG,),
        repeated=True,
    ),
    "--column": _COLUMN,
    "--user-column": _COLUMN,
}
"""By the option of the command line that names the column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One column of the log and the part it plays."""

    option: str
    name: str
    """As the log calls it."""
    staged: str
    """As the table `staged` and the view `log` call it; names of our own cannot collide."""

    @property
    def kind(self) -> Kind:
        """What the option expects."""
        return KINDS[self.option]


def parts_of(options: PrepareOptions) -> list[Part]:
    """Every column that the options name; the further columns last, those of events before those of users."""
    parts = []
    for position, (option, name) in enumerate(options.parts()):
        kind = KINDS[option]
        staged = f"{kind.prefix}_{position}" if kind.repeated else kind.prefix
        parts.append(Part(option=option, name=name, staged=staged))
    return parts


def declared_parts(options: PrepareOptions) -> list[Part]:
    """The further columns."""
    return [part for part in parts_of(options) if part.option in ("--column", "--user-column")]
