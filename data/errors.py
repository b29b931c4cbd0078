"""The error that is the user's to mend; everything else is ours and keeps its traceback."""


class UserError(ValueError):
    """Something the user can correct: the message states the value, the rule it breaks and the remedy.

    The command line prints the text alone and exits with this status.
    """

    exit_code = 2


class StorageError(UserError):
    """Storage did not answer for as long as the user wants to wait; the same command may succeed later."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: launchers start again."""


def first_line(error: BaseException) -> str:
    """What an error says, for messages of one line; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def counted(number: int, noun: str) -> str:
    """A number and what it counts, for messages: "1 row", "2,000 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
