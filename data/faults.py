"""What is wrong with stored data, and where: the error that names it, or the record of what was left out."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UserError


@dataclass(frozen=True)
class Fault:
    """A file, a row group or a row that cannot be trained on."""

    file: str
    problem: str
    row_group: int | None = None
    row: int | None = None
    """Its number in the file."""
    column: str | None = None

    def __str__(self) -> str:
        places = [("row group", self.row_group), ("row", self.row), ("column", self.column)]
        return ", ".join([self.file, *(f"{name} {place}" for name, place in places if place is not None)])

    def error(self) -> UserError:
        """What the policy "error" ends the run with."""
        return UserError(
            f"{self}: {self.problem}; restore the file or prepare the dataset again, "
            "or leave such data out with data.bad_data='skip'"
        )


@dataclass(frozen=True)
class SkippedSample:
    """A sample that its rank left out of a batch."""

    file: int
    row: int
    """In the file."""
    sample: int
    fault: Fault
