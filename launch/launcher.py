"""`ultrarec launch`: hand a recipe to a scheduler, or print what would be handed over."""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.errors import UserError
from ..trainer.config import load_config

if TYPE_CHECKING:
    from torchx.runner import Runner

SCHEDULERS = {
    "local_cwd": "this machine, from the current folder; several nodes are so many launchers side by side",
    "slurm": "sbatch, on nodes that share this environment and the file system",
    "kubernetes": "a Volcano job of pods that run launch.image",
    "aws_batch": "a multi-node AWS Batch job that runs launch.image",
}
HAS_IMAGE = ("kubernetes", "aws_batch")
CLIENTS = {"kubernetes": "kubernetes", "aws_batch": "boto3"}
"""Module that a scheduler needs here; the extra of the same name as the scheduler installs it."""
DEFAULT_ARGS: dict[str, dict[str, str]] = {"kubernetes": {"queue": "default"}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ultrarec launch`."""
    parser.add_argument("recipe", metavar="RECIPE|FILE.toml", help="name of a recipe, or path of a TOML file")
    parser.add_argument(
        "--scheduler",
        required=True,
        choices=SCHEDULERS,
        help="; ".join(f"{name}: {text}" for name, text in SCHEDULERS.items()),
    )
    parser.add_argument(
        "-j",
        metavar="[MIN:]NODESxPROCS",
        dest="size",
        help="default: the recipe's launch section; with MIN, the job goes on when it loses nodes down to that number",
    )
    from ..data.locations import local_path

    parser.add_argument(
        "--out",
        type=lambda text: str(local_path(text)),
        metavar="DIR",
        help="run folder (default: runs/ and the recipe's name)",
    )
    parser.add_argument("--dryrun", action="store_true", help="print the request and submit nothing")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="override one setting; may be repeated; nothing after the = takes it out of the recipe",
    )
    parser.add_argument(
        "--scheduler-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of the scheduler, e.g. partition=gpu (slurm), queue=train (the others); may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Launch; returns the job's exit code on this machine, and 0 once a cluster has accepted the job."""
    config = load_config(args.recipe, args.set)
    _require_client(args.scheduler, dryrun=args.dryrun)
    if args.scheduler in HAS_IMAGE and args.recipe.endswith(".toml"):
        print(f"note: {args.recipe} is read inside the image {config.launch.image}; it must be there", file=sys.stderr)

    from torchx.runner import get_runner

    from ..data.locations import is_uri, redacted
    from . import application, local

    if args.scheduler == "local_cwd" and not args.dryrun and not is_uri(config.data.path):
        from ..data.storage import load_dataset

        load_dataset(config.data.path)  # what is missing is said before processes start
    out = args.out or application.default_out(args.recipe)
    size = application.Size.of(config, args.size)
    if args.scheduler != "local_cwd":
        application.require_enough(config, size, args.scheduler)
    app = application.build(
        config,
        recipe=args.recipe,
        overrides=args.set,
        out=out,
        size=size,
        torchrun="torchrun" if args.scheduler in HAS_IMAGE else _torchrun_here(),
        port=local.free_port() if args.scheduler == "local_cwd" else application.RENDEZVOUS_PORT,
    )
    with get_runner() as runner:
        options = _scheduler_options(runner, args.scheduler, args.scheduler_arg)
        if args.scheduler == "local_cwd":
            local.prepare(app, size)
            options = {**local.options(Path(out)), **options}
        with _warnings_as_notes():
            request = runner.dryrun(app, args.scheduler, options)
        if args.scheduler == "local_cwd":
            local.divide_gpus(request, local.gpus_for(config.trainer.device), size)
        if args.dryrun:
            print(redacted(str(request)))
            return 0
        if args.scheduler == "local_cwd":
            return local.run(runner, request, out=Path(out), size=size, grace_seconds=config.launch.grace_seconds)
        return _submit(runner, request, args.scheduler)


def _torchrun_here() -> str:
    """The torchrun of this environment, which need not be activated."""
    beside = Path(sys.executable).parent / "torchrun"
    return str(beside) if beside.exists() else "torchrun"


def _require_client(scheduler: str, *, dryrun: bool) -> None:
    module = CLIENTS.get(scheduler)
    if scheduler == "aws_batch" and dryrun:  # TorchX writes this request without the client
        return
    if module and find_spec(module) is None:
        raise UserError(
            f"scheduler {scheduler} needs the Python package {module}: pip install '.[{scheduler}]' in the checkout"
        )


def _scheduler_options(runner: Runner, scheduler: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The `--scheduler-arg`s with the types TorchX wants, checked against the names it knows."""
    known = runner.scheduler_run_opts(scheduler)
    values: dict[str, Any] = dict(DEFAULT_ARGS.get(scheduler, {}))
    for argument in arguments:
        name, separator, _ = argument.partition("=")
        if not separator or known.get(name) is None:
            names = ", ".join(sorted(option for option, _ in known))
            raise UserError(f"--scheduler-arg {argument}: expected KEY=VALUE; {scheduler} knows {names}")
        try:
            values.update(known.cfg_from_str(argument))
        except ValueError as error:
            raise UserError(f"--scheduler-arg {argument}: {error}") from None
    missing = [name for name, option in known if option.is_required and values.get(name) is None]
    if missing:
        raise UserError(f"{scheduler} needs {', '.join(f'--scheduler-arg {name}=VALUE' for name in missing)}")
    return values


def _submit(runner: Runner, request: Any, scheduler: str) -> int:
    if scheduler == "slurm" and shutil.which("sbatch") is None:
        raise UserError("sbatch is not on PATH: launch from a machine of the Slurm cluster, or add --dryrun")
    try:
        with _warnings_as_notes():
            handle = runner.schedule(request)
    except Exception as error:
        # Each client has its own errors for no network, no rights and a full quota; all of them are the user's to mend.
        raise UserError(f"{scheduler} did not accept the job ({type(error).__name__}): {error}") from error
    print(f"submitted: {handle}\nfollow it:  torchx log {handle}\nits state:  torchx status {handle}")
    return 0


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """TorchX warns of what a scheduler cannot do; one line each says so."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for text in dict.fromkeys(" ".join(str(warning.message).split()) for warning in caught):
                print(f"note: {text}", file=sys.stderr)
