"""The error that is the user's to mend; everything else is ours and keeps its traceback."""


class UserError(ValueError):
    """Something the user can correct: the message states the value, the rule it breaks and the remedy.

    The command line prints the text alone and exits with status 2.
    """


def counted(number: int, noun: str) -> str:
    """A number and what it counts, for messages: "1 row", "2,000 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
