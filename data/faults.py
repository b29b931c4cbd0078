"""What is wrong with stored data, and where: the error that names it, or the record of what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import UserError, counted


@dataclass(frozen=True)
class Fault:
    """A file, a row group or a row that cannot be trained on."""

    file: str
    problem: str
    row_group: int | None = None
    """None for all of the file's."""
    row: int | None = None
    """Its number in the file; None for all of the row group's."""
    column: str | None = None
    num_rows: int = 1
    """Rows that it makes unusable."""

    def __str__(self) -> str:
        places = [("row group", self.row_group), ("row", self.row), ("column", self.column)]
        named = [f"{name} {place}" for name, place in places if place is not None]
        return ", ".join([self.file, *(["all row groups"] if self.row_group is None else []), *named])

    def error(self) -> UserError:
        """What the policy "error" ends the run with."""
        return UserError(
            f"{self}: {self.problem}; restore the file or prepare the dataset again, "
            "or leave such data out with data.bad_data='skip'"
        )


class NothingLeftError(UserError):
    """All that could be trained on is damaged, and the policy "skip" leaves it out."""

    def __init__(self, text: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(text)
        self.faults = faults

    @classmethod
    def of(cls, path: str, faults: Sequence[Fault], *, num_rows: int) -> NothingLeftError:
        """The error for a dataset of so many rows."""
        left_out = sum(fault.num_rows for fault in faults)
        return cls(
            f"data.path={path}: nothing is left to train on: data.bad_data='skip' leaves out {left_out:,} of "
            f"{counted(num_rows, 'row')}, first {faults[0]}: {faults[0].problem}; restore the files or prepare the "
            "dataset again",
            faults,
        )


@dataclass(frozen=True)
class SkippedSample:
    """A sample that its rank left out of a batch."""

    file: int
    row: int
    """In the file."""
    sample: int
    fault: Fault
