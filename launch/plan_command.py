"""`ultrarec plan`: whether a recipe fits GPUs that are not there, and what would limit its steps."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..data.errors import UserError
from ..trainer.config import Config, load_config
from . import workload

if TYPE_CHECKING:
    from .capacity import Estimate, Table
    from .workload import Catalogue


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ultrarec plan`."""
    from ..trainer.devices import DEVICES

    parser.add_argument("recipe", metavar="RECIPE|FILE.toml", help="name of a recipe, or path of a TOML file")
    parser.add_argument(
        "-j", metavar="NODESxPROCS", dest="size", help="one GPU per process; default: the recipe's launch section"
    )
    parser.add_argument("--gpu", required=True, choices=sorted(DEVICES), help="whose data sheet to plan with")
    parser.add_argument(
        "--items", type=int, metavar="N", help="size of the vocabulary, where data.path has no prepared dataset"
    )
    parser.add_argument("--mean-length", type=int, metavar="L", help="training events of every user, likewise")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="override one setting; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Plan; returns 1 if the run does not fit."""
    config = load_config(args.recipe, args.set)
    size = _size(config, args.size)
    catalogue = _catalogue(config, args)

    from ..embeddings.plan import DoesNotFit
    from ..trainer.devices import DEVICES
    from .capacity import estimate

    nodes, procs = size
    try:
        planned = estimate(config, catalogue, nodes=nodes, procs=procs, device=DEVICES[args.gpu])
    except DoesNotFit as error:
        print(json.dumps({"fits": False, "problems": [str(error)]}) if args.json else f"does not fit: {error}")
        return 1
    if args.json:
        print(json.dumps(_as_json(planned)))
    else:
        print(f"{args.recipe} on {nodes} x {procs} {args.gpu}: formulas and data sheets, nothing measured\n")
        print("\n".join(_lines(planned)))
    return 1 if planned.problems else 0


def _size(config: Config, text: str | None) -> tuple[int, int]:
    from .application import Size

    if text is None:
        return config.launch.nodes, config.launch.procs_per_node
    size = Size.parse(text)
    return size.nodes, size.procs


def _catalogue(config: Config, args: argparse.Namespace) -> Catalogue:
    """The prepared dataset's numbers, or those on the command line."""
    from ..data.storage import load_dataset

    items, length = args.items, args.mean_length
    if items is not None and length is not None:
        if min(items, length) < 1:
            raise UserError(f"--items {items} --mean-length {length}: both count from 1; give larger numbers")
        return workload.catalogue_like(config, num_items=items, mean_length=length)
    if items is not None or length is not None:
        raise UserError(
            f"--items {items}, --mean-length {length}: only together do they stand for a dataset; give both, or neither"
        )
    try:
        info = load_dataset(config.data.path)
    except UserError as error:
        raise UserError(
            f"{error}; or plan without a dataset: give --items N and --mean-length L (training events of a user)"
        ) from error
    return workload.catalogue_of(info)


def _as_json(planned: Estimate) -> dict[str, object]:
    return {
        "fits": not planned.problems,
        "problems": planned.problems,
        "limit": planned.limit,
        "memory_total": sum(planned.memory.values()),
        **asdict(planned),
    }


def _lines(planned: Estimate) -> list[str]:
    """The plan for a terminal."""
    lines = [
        f"step            {planned.samples:,.0f} samples of {planned.tokens / planned.samples:,.1f} events on average, "
        f"over {planned.ranks} rank(s)",
        f"dense weights   {planned.dense_parameters:,}",
        "",
        f"{'table':<16} {'rows':>15} {'columns':>8}  {'sharding':<14} {'kernel':<18} {'ranks':>5} {'largest GiB':>12}",
        *(_table_line(table, planned.ranks) for table in planned.tables),
        "",
        "memory of the fullest rank, GiB",
        *(f"  {name:<22}{num_bytes / 2**30:>12.3f}" for name, num_bytes in planned.memory.items()),
        f"  {'in all':<22}{sum(planned.memory.values()) / 2**30:>12.3f}  of {planned.memory_limit / 2**30:.1f} usable",
    ]
    if planned.longest > planned.memory_limit:
        lines.append(f"  {'longest samples only':<22}{planned.longest / 2**30:>12.3f}  would not fit")
    lines += [
        "",
        "sent by the busiest rank in a step, MB",
        *(f"  {name:<22}{num_bytes / 1e6:>12.3f}" for name, num_bytes in planned.communication.items()),
        "",
        f"operations per rank and step: {'at most ' if planned.is_at_most else ''}{planned.flops / 1e12:,.4g} TFLOP",
        "a step takes at least, ms",
        *(f"  {name:<22}{1e3 * seconds:>12.3f}" for name, seconds in planned.seconds.items()),
        f"limit: {planned.limit}",
        *(f"does not fit: {problem}" for problem in planned.problems),
    ]
    return lines


def _table_line(table: Table, ranks: int) -> str:
    sizes = [4 * shard.rows * shard.columns for shard in table.shards] or [4 * table.rows * table.columns]
    holders = len({shard.rank for shard in table.shards}) or ranks
    return (
        f"{table.name:<16} {table.rows:>15,} {table.columns:>8}  {table.sharding:<14} {table.kernel:<18} "
        f"{holders:>5} {max(sizes) / 2**30:>12.3f}"
    )
