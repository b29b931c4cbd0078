"""The `ultrarec` command. Each subcommand imports what it needs only when it is the one called."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

Run = Callable[[argparse.Namespace], int]


def prepare(parser: argparse.ArgumentParser) -> Run:
    """Interaction log -> prepared dataset."""
    from ..data import prepare

    prepare.add_arguments(parser)
    return prepare.run


def synth(parser: argparse.ArgumentParser) -> Run:
    """A seed -> synthetic interaction log."""
    from ..data import synth

    synth.add_arguments(parser)
    return synth.run


def data(parser: argparse.ArgumentParser) -> Run:
    """Look at prepared datasets."""
    from ..data import data_command

    data_command.add_arguments(parser)
    return data_command.run


def train(parser: argparse.ArgumentParser) -> Run:
    """Train a recipe in the process group that is there, or in this one process."""
    from ..trainer import __main__

    __main__.add_arguments(parser)
    return __main__.run


def evaluate(parser: argparse.ArgumentParser) -> Run:
    """Held-out metrics of a checkpoint."""
    from ..trainer import evaluate_command

    evaluate_command.add_arguments(parser)
    return evaluate_command.run


def replay(parser: argparse.ArgumentParser) -> Run:
    """Train one step of a run again."""
    from ..trainer import replay_command

    replay_command.add_arguments(parser)
    return replay_command.run


def launch(parser: argparse.ArgumentParser) -> Run:
    """Hand a recipe to a scheduler."""
    from . import launcher

    launcher.add_arguments(parser)
    return launcher.run


def plan(parser: argparse.ArgumentParser) -> Run:
    """What a recipe would need of GPUs."""
    from . import plan_command

    plan_command.add_arguments(parser)
    return plan_command.run


def checkpoint(parser: argparse.ArgumentParser) -> Run:
    """Look at checkpoints."""
    from ..trainer import checkpoint_command

    checkpoint_command.add_arguments(parser)
    return checkpoint_command.run


def bench(parser: argparse.ArgumentParser) -> Run:
    """Measure this machine."""
    from . import bench

    bench.add_arguments(parser)
    return bench.run


def study(parser: argparse.ArgumentParser) -> Run:
    """Compare models."""
    from .study import command

    command.add_arguments(parser)
    return command.run


def doctor(parser: argparse.ArgumentParser) -> Run:
    """Check the installation."""
    from . import doctor

    doctor.add_arguments(parser)
    return doctor.run


@dataclass(frozen=True)
class Command:
    """One subcommand: how it is mounted, and what `--help` says about it."""

    mount: Callable[[argparse.ArgumentParser], Run]
    summary: str
    examples: str


COMMANDS = {
    "prepare": Command(
        prepare,
        "turn an interaction log (Parquet or CSV) into a prepared dataset",
        """\
  ultrarec prepare log/*.parquet --out datasets/shop --user user_id --item item_id --time ts --leave-last 1
  ultrarec prepare log.csv --out datasets/feed --user uid --item vid --time time_ms \\
      --split-time 1651330969569 --action is_click --action is_like --column play_time_ms""",
    ),
    "synth": Command(
        synth,
        "make a synthetic interaction log of any size",
        """\
  ultrarec synth --out logs/synthetic --users 100000 --items 50000 --events-per-user 100 --seed 1
  ultrarec prepare logs/synthetic --out datasets/synthetic --user user_id --item item_id --time timestamp \\
      --action click --action like --action share --split-time 1702332800000""",
    ),
    "data": Command(
        data,
        "describe a prepared dataset",
        """\
  ultrarec data describe datasets/shop
  ultrarec data describe datasets/shop --picture lengths.png""",
    ),
    "train": Command(
        train,
        "train a recipe here: joins the process group it finds, else one process",
        """\
  ultrarec train hstu_kuairand_sample
  ultrarec train my_run.toml --out runs/my_run --set trainer.max_steps=100 --set optimizer.lr=0.003
  torchrun --nproc-per-node 2 -m ultrarec.trainer hstu_kuairand_sample --out runs/two
The same command again continues the run from its newest complete checkpoint.""",
    ),
    "evaluate": Command(
        evaluate,
        "held-out metrics of a checkpoint of a run",
        """\
  ultrarec evaluate runs/hstu_kuairand_sample
  ultrarec evaluate runs/hstu_kuairand_sample --checkpoint best""",
    ),
    "replay": Command(
        replay,
        "train one step of a run again, beside it, and show its rows, losses and gradients",
        """\
  ultrarec replay runs/hstu_kuairand_sample 1234
  torchrun --nproc-per-node 2 -m ultrarec.launch.cli replay runs/two 1234
The same number of processes as the run had gives the same numbers, bit for bit.""",
    ),
    "launch": Command(
        launch,
        "run a recipe through TorchX: on this machine or on a cluster",
        """\
  ultrarec launch hstu_kuairand_sample --scheduler local_cwd -j 1x2
  ultrarec launch my_run.toml --scheduler slurm -j 4x8 --scheduler-arg partition=gpu --out /shared/runs/my_run
  ultrarec launch hstu_kuairand_1k --scheduler kubernetes -j 2x8 --dryrun""",
    ),
    "plan": Command(
        plan,
        "say whether a recipe fits GPUs that are not there, and what would limit its steps",
        """\
  ultrarec plan hstu_kuairand_1k -j 2x8 --gpu h100
  ultrarec plan hstu_dlrmv3 -j 8x8 --gpu h200 --items 1000000000 --mean-length 8000
Exit code 1: it does not fit.""",
    ),
    "checkpoint": Command(
        checkpoint,
        "list, verify, inspect, compare or export the checkpoints of a run",
        """\
  ultrarec checkpoint list runs/hstu_kuairand_sample
  ultrarec checkpoint verify runs/hstu_kuairand_sample
  ultrarec checkpoint diff runs/mine/checkpoints/step-00000100 runs/mine
  ultrarec checkpoint export runs/hstu_kuairand_sample --out serving""",
    ),
    "bench": Command(
        bench,
        "measure how fast this machine computes, against what one would use instead",
        """\
  ultrarec bench attention
  ultrarec bench attention --dtype bf16 --threads 2 --lengths 1024,4096 --out bench
  ultrarec bench attention --static --arch sm_90
  ultrarec bench checkpoint --gib 1 --where /data""",
    ),
    "study": Command(
        study,
        "train, test and time what a study compares; tables and pictures of what came of it",
        """\
  ultrarec study kuairand --data datasets/kuairand-sample
  ultrarec study kuairand --data datasets/kuairand-sample --only ultra_hstu --seeds 1
  ultrarec study compute --only 16384 --page docs/results.md
The same command again trains what is missing; finished runs are kept.""",
    ),
    "doctor": Command(
        doctor,
        "check this installation; name each fault and its remedy",
        "  ultrarec doctor",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ultrarec`.

    Returns:
        The exit code: 0 done, 1 the command's own negative answer, 2 the user can mend it, 75 storage did not answer,
        130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser, runs = _parser(argv)
    args = parser.parse_args(argv)
    try:
        code = runs[args.command](args)
        sys.stdout.flush()
        return code
    except ValueError as error:
        if not _is_for_the_user(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `ultrarec … | head` has seen enough; the interpreter's last flush must not complain about it either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, dict[str, Run]]:
    """The parser, with the arguments of the one subcommand that `argv` names, and how to run that one."""
    parser = argparse.ArgumentParser(
        prog="ultrarec",
        description="Train large sequential recommenders on sharded embeddings, and lose nothing.",
        epilog="`ultrarec COMMAND --help` shows the arguments of a command, and examples.",
    )
    parser.add_argument("--version", action="version", version=f"ultrarec {version('ultrarec')}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    named = next((word for word in argv if not word.startswith("-")), None)
    runs: dict[str, Run] = {}
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog=f"examples:\n{command.examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == named:
            runs[name] = command.mount(subparser)
    return parser, runs


def _is_for_the_user(error: ValueError) -> bool:
    from pydantic import ValidationError

    from ..data.errors import UserError

    return isinstance(error, (UserError, ValidationError))


if __name__ == "__main__":
    sys.exit(main())
