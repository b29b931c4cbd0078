"""A recipe and a size become a TorchX application: what runs on every node, and what each node must offer."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchx import specs
from torchx.specs import macros

from ..data.errors import UserError
from ..trainer.config import Config, LaunchConfig

ROLE = "trainer"
RENDEZVOUS_PORT = 29500


@dataclass(frozen=True)
class Size:
    """How many processes, and where: `NODESxPROCS`, or `MIN:MAXxPROCS` for a job that goes on when it loses nodes."""

    nodes: int
    """At most."""
    procs: int
    """On each node."""
    min_nodes: int | None = None
    """Fewest nodes to go on with; None: all of them."""

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read `2x8` or `1:2x8`.

        Raises:
            UserError: the text is not positive numbers with an x between, or the fewest nodes are the most.
        """
        match = re.fullmatch(r"(?:([1-9]\d*):)?([1-9]\d*)x([1-9]\d*)", text)
        if match is None or (match[1] and int(match[1]) > int(match[2])):
            raise UserError(
                f"-j {text}: expected NODESxPROCS, both at least 1, e.g. -j 2x8 for two nodes of 8 processes, or "
                "MIN:MAXxPROCS, e.g. -j 1:2x8 for a job that goes on with one of them"
            )
        return cls(nodes=int(match[2]), procs=int(match[3]), min_nodes=int(match[1]) if match[1] else None)

    @property
    def nnodes(self) -> str:
        """As torchrun wants it."""
        return str(self.nodes) if self.min_nodes is None else f"{self.min_nodes}:{self.nodes}"

    @classmethod
    def of(cls, config: Config, override: str | None) -> Size:
        """The size given on the command line, else that of the recipe's `launch` section.

        Raises:
            UserError: the override does not parse, or a node would hold more processes than GPUs.
        """
        launch = config.launch
        size = cls.parse(override) if override else cls(launch.nodes, launch.procs_per_node)
        if 0 < launch.gpus_per_node < size.procs and config.trainer.device != "cpu":
            raise UserError(
                f"{size.procs} processes on a node with launch.gpus_per_node={launch.gpus_per_node}: each process owns "
                f"one GPU; use -j {size.nodes}x{launch.gpus_per_node}, or set launch.gpus_per_node"
            )
        return size


def require_enough(config: Config, size: Size, scheduler: str) -> None:
    """Refuse a `launch` section that starves its processes: a cluster gives a node just what the section asks for.

    Raises:
        UserError: no GPUs although the run may use them, or fewer CPUs than processes.
    """
    launch = config.launch
    faults = []
    if launch.gpus_per_node == 0 and config.trainer.device != "cpu":
        faults.append(
            f"launch.gpus_per_node=0, but trainer.device={config.trainer.device} wants one GPU per process: "
            f"--set launch.gpus_per_node={size.procs}, or --set trainer.device=cpu to train without"
        )
    if launch.cpus_per_node < size.procs:
        faults.append(
            f"launch.cpus_per_node={launch.cpus_per_node}, but each process wants at least one CPU: "
            f"--set launch.cpus_per_node={size.procs}, or more"
        )
    if faults:
        raise UserError(f"{size.procs} process(es) on a node of {scheduler}: {'; '.join(faults)}")


def default_out(recipe: str) -> str:
    """The run folder of a recipe when none is given."""
    return f"runs/{Path(recipe).stem}"


def build(
    config: Config,
    *,
    recipe: str,
    overrides: Sequence[str],
    out: str,
    size: Size,
    torchrun: str = "torchrun",
    port: int = RENDEZVOUS_PORT,
) -> specs.AppDef:
    """The application that trains a recipe: one role, one replica per node, torchrun in each.

    Args:
        config: the validated configuration of `recipe` with `overrides`; its `launch` section says what a node offers.
        recipe: what the trainer is given: a recipe name, or the path of a TOML file that every node can read.
        overrides: `section.field=value` strings, passed on to the trainer.
        out: run folder; the logs of all ranks go to its `logs/`.
        size: nodes, and processes on each.
        torchrun: the launcher on the nodes; a path where none is on PATH.
        port: where the first node listens for the others.
    """
    launch = config.launch
    command = _command(
        recipe=recipe, overrides=overrides, out=out, size=size, torchrun=torchrun, port=port, launch=launch
    )
    role = specs.Role(
        name=ROLE,
        image=launch.image,
        # The shell fills in what only the node knows, such as the address of the first one; `exec` hands signals on.
        entrypoint="bash",
        args=["-c", f"exec {command}"],
        env={
            "OMP_NUM_THREADS": str(max(1, launch.cpus_per_node // size.procs)),
            "PYTHONUNBUFFERED": "1",
            # Else agents of torch 2.13 remember where the ranks met first, and when the loss of a node has made another
            # one the first, ranks of the rest look for its store in the old place.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1" if size.nodes > 1 else "0",
        },
        num_replicas=size.nodes,
        min_replicas=size.min_nodes,
        max_retries=launch.max_retries,
        resource=specs.Resource(
            cpu=launch.cpus_per_node, gpu=launch.gpus_per_node, memMB=launch.memory_gib_per_node * 1024
        ),
        port_map={"c10d": port},
    )
    return specs.AppDef(name=Path(recipe).stem.replace("_", "-").lower(), roles=[role])


def rank_logs(out: Path, app_id: str, node: int) -> Path:
    """Where a node's torchrun puts the output of its processes: `*/attempt_N/LOCAL_RANK/{stdout,stderr}.log`."""
    return out / "logs" / app_id / f"node-{node}"


def _command(
    *, recipe: str, overrides: Sequence[str], out: str, size: Size, torchrun: str, port: int, launch: LaunchConfig
) -> str:
    """The shell command of a node, with TorchX's macros in it; `$$` is TorchX's escape for the shell's own `$`."""
    rendezvous = "localhost:0"
    if size.nodes > 1:
        # Some schedulers leave the address of the first node unset on that node itself.
        rendezvous = f'"$${{{macros.rank0_env}:=localhost}}:{port}"'
    return " ".join(
        [
            f"{_quote(torchrun)} --nnodes {size.nnodes} --nproc-per-node {size.procs}",
            f"--max-restarts {launch.max_restarts} --shutdown-timeout {launch.grace_seconds}",
            f"--rdzv-backend c10d --rdzv-endpoint {rendezvous} --rdzv-id {macros.app_id}",
            # Every rank writes its own files; the node's own log repeats those of its first rank.
            f"--role {ROLE} --tee 3 --local-ranks-filter 0",
            f"--log-dir {_quote(out)}/logs/{macros.app_id}/node-{macros.replica_id}",
            f"-m ultrarec.trainer {_quote(recipe)} --out {_quote(out)}",
            *(f"--set {_quote(override)}" for override in overrides),
        ]
    )


def _quote(text: str) -> str:
    return shlex.quote(text).replace("$", "$$")
