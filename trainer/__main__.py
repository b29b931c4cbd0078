"""What every launched process runs: `torchrun --nproc-per-node P -m ultrarec.trainer RECIPE|FILE.toml --out DIR`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..data.errors import StorageError, UserError
from ..data.locations import local_path
from .attempts import final_exit_code, remember_final
from .config import load_config
from .noise import silence

SECONDS_FOR_RANK_0 = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ultrarec train`."""
    parser.add_argument("recipe", metavar="RECIPE|FILE.toml", help="name of a recipe, or path of a TOML file")
    parser.add_argument(
        "--out", type=local_path, metavar="DIR", help="run folder (default: runs/ and the recipe's name)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="override one setting; may be repeated; nothing after the = takes it out of the recipe",
    )
    parser.add_argument("--fresh", action="store_true", help="refuse to continue a run that the folder already holds")


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    config = load_config(args.recipe, args.set)
    out = args.out or Path("runs") / Path(args.recipe).stem
    silence()
    # Heavy imports wait until the configuration is known to be good.
    from .health import NotFiniteError
    from .journal import tell
    from .loop import train
    from .lost import lost_connection, report
    from .parallel import join
    from .run import open_run
    from .signals import StopRequested, requests_to_stop
    from .storage import checkpoint_home
    from .summary import summary
    from .watchdog import EXIT_CODE

    with join(config.trainer) as world, requests_to_stop() as request:
        try:
            with open_run(config, out, world, fresh=args.fresh, request=request) as opened:
                train(opened)
        except NotFiniteError as error:
            remember_final(1)
            if world.is_main:
                print(f"error: {error}", file=sys.stderr)
            return 1
        except StopRequested as stop:
            if world.is_main:
                tell(f"{stop}; the same command continues the run")
            return stop.exit_code
        except RuntimeError as error:
            if (reason := lost_connection(error)) is None:
                raise
            print(f"error: {report(reason, out, world.rank)}", file=sys.stderr)
            return EXIT_CODE
        with suppress(OSError):  # stdout may be a file on a full disk; the run is complete all the same
            if world.is_main:
                print(summary(out, checkpoint_home(config.checkpoint, out)), flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, and turn a user's error into one message and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m ultrarec.trainer", description=__doc__)
    add_arguments(parser)
    if (code := final_exit_code()) is not None:
        return code
    try:
        return run(parser.parse_args(argv))
    except UserError as error:
        if not isinstance(error, StorageError):  # which may answer again by the next attempt
            remember_final(error.exit_code)
        if os.environ.get("RANK", "0") != "0":
            # Mostly every rank finds the same fault; torchrun ends them all once rank 0 has said it and ended.
            time.sleep(SECONDS_FOR_RANK_0)
        with suppress(OSError):
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before signals are requests: while the heavy imports run
        return 130


if __name__ == "__main__":
    sys.exit(main())
