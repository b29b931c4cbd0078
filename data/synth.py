"""`ultrarec synth`: a synthetic interaction log of any size; the rule it follows is in `synthetic_log`."""

import argparse
import sys

from .atomic import give_name, run_until_signalled, temporary_beside, what_is_left
from .errors import UserError
from .locations import local_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ultrarec synth` on `parser`."""
    add = parser.add_argument
    add("--out", required=True, type=local_path, metavar="DIR", help="folder for the Parquet files; must not exist")
    add("--users", required=True, type=int, metavar="N")
    add("--items", required=True, type=int, metavar="N", help="in the catalogue; popularity decides how many occur")
    add("--events-per-user", required=True, type=float, metavar="N", help="mean; lengths are log-normal")
    add("--seed", type=int, default=0, metavar="N", help="equal arguments give equal files (default: 0)")


def run(args: argparse.Namespace) -> int:
    """The `synth` subcommand; returns the exit status."""
    for option, value in (
        ("--users", args.users),
        ("--items", args.items),
        ("--events-per-user", args.events_per_user),
    ):
        if not 1 <= value <= 2**40:
            raise UserError(f"{option} {value}: from 1 to {2**40}")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} is negative; give 0 or more")
    from .synthetic_log import LogSpec, write_log

    spec = LogSpec(users=args.users, items=args.items, events_per_user=args.events_per_user, seed=args.seed)

    def make() -> None:
        with temporary_beside(args.out) as folder:
            root = folder / "log"
            write_log(spec, root, report=lambda line: print(line, file=sys.stderr, flush=True))
            give_name(root, args.out)
        print(f"{args.out}: made; {args.out}/_synth.json has what the best model can reach", file=sys.stderr)

    return run_until_signalled(make, left=lambda: what_is_left(args.out))
