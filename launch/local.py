"""A launch on this machine: start it, show what its first rank says, hand on Ctrl-C, and explain how it ended."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from ..data.errors import UserError
from . import application, processes

if TYPE_CHECKING:
    from torchx.runner import Runner
    from torchx.specs import AppDef

POLL_SECONDS = 0.1
EXTRA_GRACE_SECONDS = 15.0
"""For an orderly end after a signal, beyond what torchrun gives its processes before it kills them."""
STRAGGLER_SECONDS = 60.0
"""How long the other nodes may run on after one has ended."""
LAST_LINES = 30
USER_ERROR = 2


def free_port() -> int:
    """A port of this machine that nobody listens on now; a fixed one would keep two launches from running at once."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def prepare(app: AppDef, size: application.Size) -> None:
    """Fit the node to this machine, whatever one of the recipe has: cores by process, no GPUs for TorchX to hand out.

    The user's own OMP_NUM_THREADS wins. GPUs are handed out by `divide_gpus`: TorchX would number them from 0, whatever
    CUDA_VISIBLE_DEVICES says, and let the nodes share all of them when the recipe asks for more than there are.
    """
    cores = len(os.sched_getaffinity(0))
    threads = str(max(1, cores // (size.nodes * size.procs)))
    app.roles[0].env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", threads)
    app.roles[0].resource.gpu = 0


def options(out: Path) -> dict[str, Any]:
    """Options for TorchX's local scheduler: logs in the run folder."""
    return {"log_dir": str(out / "logs")}


def gpus_for(device: str) -> list[str]:
    """This machine's GPUs for a run with that `trainer.device`, as CUDA_VISIBLE_DEVICES names them; its value wins."""
    if device == "cpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(index) for index in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]


def gpu_shares(gpus: Sequence[str], size: application.Size) -> list[Sequence[str]]:
    """The GPUs of each node: one per process, none twice; no shares at all on a machine without GPUs.

    Raises:
        UserError: there are GPUs, but fewer than processes.
    """
    if not gpus:
        return []
    if len(gpus) < size.nodes * size.procs:
        raise UserError(
            f"-j {size.nodes}x{size.procs}, but {len(gpus)} GPU(s) on this machine: each process owns one GPU; "
            f"use -j 1x{len(gpus)}, or --set trainer.device=cpu to train without"
        )
    return [gpus[node * size.procs : (node + 1) * size.procs] for node in range(size.nodes)]


def divide_gpus(request: Any, gpus: Sequence[str], size: application.Size) -> None:
    """Let each node of a dry-run request see its own share of the GPUs only, as if it were a machine of its own."""
    nodes = request.request.role_params[application.ROLE]
    for node, share in zip(nodes, gpu_shares(gpus, size), strict=False):  # no shares: nothing to set
        node.env["CUDA_VISIBLE_DEVICES"] = ",".join(share)


def run(runner: Runner, request: Any, *, out: Path, size: application.Size, grace_seconds: int) -> int:
    """Run a dry-run request to its end.

    Args:
        grace_seconds: what torchrun gives its processes to end after a signal.

    Returns:
        0 when the job succeeded; else the exit code of the process that failed first, 128 + N for signal N.
    """
    app_id = request.request.app_id
    agents = [Path(folder) for folder in request.request.role_log_dirs[application.ROLE]]
    followed: list[_Shown] = [_FirstRank(application.rank_logs(out, app_id, node)) for node in range(size.nodes)]
    followed += [_Killed(folder / "stderr.log", node) for node, folder in enumerate(agents)]
    print(f"{app_id}: {size.nodes} x {size.procs} processes on this machine, run folder {out}", flush=True)
    processes.adopt_orphans()
    with _caught_signals() as caught:
        try:
            handle = runner.schedule(request)
        except OSError as error:
            raise UserError(f"cannot write the logs below {out}: {error.strerror}; choose another --out") from None
        try:
            succeeded = _wait(runner, handle, followed, caught, at_least=size.min_nodes or size.nodes)
            ends = _ends(runner, app_id)  # before those that are left are stopped
            succeeded = succeeded or (not caught and _outlived_losses(ends, size))
        finally:
            processes.stop_all(
                caught[0] if caught else signal.SIGTERM,
                grace_seconds=grace_seconds + EXTRA_GRACE_SECONDS,
                meanwhile=lambda: _show(followed),
                is_urgent=lambda: len(caught) > 1,
            )
            _show(followed)
    if caught:
        print(f"stopped by {signal.Signals(caught[0]).name}; the same command continues the run", file=sys.stderr)
        return 128 + caught[0]
    return 0 if succeeded else _explain(agents, ends, out=out, app_id=app_id)


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end up in a list instead of ending this process, which still has children to stop."""
    caught: list[int] = []

    def remember(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)

    previous = {signum: signal.signal(signum, remember) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _wait(runner: Runner, handle: str, followed: list[_Shown], caught: list[int], *, at_least: int) -> bool:
    """Show the job until it ends or a signal arrives; True when it succeeded."""
    from torchx.specs import AppState, is_terminal

    nodes = processes.children()
    whole_until = time.monotonic()
    while not caught:
        status = runner.status(handle)
        _show(followed)
        if status is None or is_terminal(status.state):
            return status is not None and status.state == AppState.SUCCEEDED
        now = time.monotonic()
        if sum(node.is_alive() for node in nodes) >= at_least:
            whole_until = now
        elif now - whole_until > STRAGGLER_SECONDS:
            return False
        time.sleep(POLL_SECONDS)
    return False


def _ends(runner: Runner, app_id: str) -> list[int | None]:
    """How the launcher of each node ended: exit code, minus the signal that killed it, None while it runs."""
    replicas = runner._scheduler("local_cwd")._apps[app_id].role_replicas[application.ROLE]
    return [replica.proc.poll() for replica in replicas]


def _outlived_losses(ends: list[int | None], size: application.Size) -> bool:
    """Whether enough nodes of an elastic job came to its end; TorchX calls it failed if any node was lost."""
    ended_well = ends.count(0)
    if size.min_nodes is None or ended_well < size.min_nodes:
        return False
    print(f"note: the job came to its end on {ended_well} of {size.nodes} nodes; the others were lost", file=sys.stderr)
    return True


def _show(followed: list[_Shown]) -> None:
    for each in followed:
        each.show()


class _Shown(Protocol):
    def show(self) -> None:
        """Tell what is new."""


class _Killed:
    """Tells which rank a signal has ended: it had no time to say so, and torchrun says it to its own log only."""

    PATTERN = re.compile(r"failed \(exitcode: -(?P<signal>\d+)\) local_rank: (?P<rank>\d+) \(pid: (?P<pid>\d+)\)")

    def __init__(self, log: Path, node: int) -> None:
        self._log, self._node, self._read = log, node, 0

    def show(self) -> None:
        with suppress(FileNotFoundError), self._log.open("rb") as file:
            file.seek(self._read)
            whole_lines = file.read().rpartition(b"\n")[0]
            self._read += len(whole_lines)
            for match in self.PATTERN.finditer(whole_lines.decode(errors="replace")):
                how = _how(-int(match["signal"]))
                what = f"local rank {match['rank']} of node {self._node} (pid {match['pid']}) {how}"
                print(what, file=sys.stderr, flush=True)


class _FirstRank:
    """Copies what the first process of a node writes to this process's own stdout and stderr, as it comes."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        # Stdout last: what ends a run, such as its table of metrics, stays the last thing on the screen.
        self._sinks = {"stderr.log": sys.stderr, "stdout.log": sys.stdout}
        self._files: dict[Path, BinaryIO] = {}

    def show(self) -> None:
        for name, sink in self._sinks.items():
            for path in sorted(self._logs.glob(f"*/attempt_*/0/{name}"), key=_attempt):
                if new := self._news(path):
                    sink.write(new.decode("utf-8", errors="replace"))
                    sink.flush()

    def _news(self, path: Path) -> bytes:
        """What has been written since the last look.

        Ranks that start again since a node has come count as the same attempt: torchrun puts new files in the place of
        theirs.
        """
        file = self._files.pop(path, None)
        news = b"" if file is None else file.read()
        if file is None or os.fstat(file.fileno()).st_nlink == 0:
            try:
                file = path.open("rb")
            except FileNotFoundError:
                return news
            news += file.read()
        self._files[path] = file
        return news


@dataclass(frozen=True)
class _Failure:
    """The process that torchrun names as the first to fail."""

    time: str
    node: int
    rank: int
    local_rank: int
    exit_code: int

    PATTERN = re.compile(
        r"Root Cause.*?time\s*:\s*(?P<time>\S+).*?rank\s*:\s*(?P<rank>\d+) \(local_rank: (?P<local>\d+)\)"
        r".*?exitcode\s*:\s*(?P<code>-?\d+)",
        re.DOTALL,
    )

    @classmethod
    def first(cls, agents: list[Path]) -> _Failure | None:
        """The earliest failure in the logs of the nodes' launchers, or None when none of them names one."""
        found = []
        for node, folder in enumerate(agents):
            match = cls.PATTERN.search(_read(folder / "stderr.log"))
            if match:
                numbers = {
                    "rank": int(match["rank"]),
                    "local_rank": int(match["local"]),
                    "exit_code": int(match["code"]),
                }
                found.append(cls(time=match["time"], node=node, **numbers))
        return min(found, key=lambda failure: failure.time, default=None)


def _how(exit_code: int) -> str:
    if exit_code < 0:
        known = -exit_code in list(signal.Signals)  # real-time signals have no name
        return f"was killed by {signal.Signals(-exit_code).name if known else f'signal {-exit_code}'}"
    return f"ended with exit code {exit_code}"


def _explain(agents: list[Path], ends: list[int | None], *, out: Path, app_id: str) -> int:
    """Say which process failed first, its last words and where all logs are; returns the exit code for this launch."""
    logs = out / "logs" / app_id
    failure = _Failure.first(agents)
    if failure is None:
        return _explain_launcher(agents, ends)
    if failure.local_rank > 0:  # what the first rank of a node said is on the screen already
        logs_of_rank = application.rank_logs(out, app_id, failure.node).glob(f"*/attempt_*/{failure.local_rank}/*")
        folders = sorted((path.parent for path in logs_of_rank if path.name == "stderr.log"), key=_attempt)
        # An attempt that only repeats the verdict of an earlier one says nothing.
        last = [folder for folder in folders if _read(folder / "stderr.log")][-1:]
        print(f"last lines of rank {failure.rank}:\n{_last_lines(last)}", file=sys.stderr)
    if failure.exit_code != USER_ERROR:  # that one has explained itself
        print(f"error: rank {failure.rank} on node {failure.node} {_how(failure.exit_code)}", file=sys.stderr)
    print(f"logs of all ranks: {logs}", file=sys.stderr)
    return failure.exit_code if failure.exit_code > 0 else 128 - failure.exit_code


def _explain_launcher(agents: list[Path], ends: list[int | None]) -> int:
    """Say how torchrun itself ended, last: what its ranks say when they have lost it is not the cause."""
    print(f"last lines of the launchers:\n{_last_lines(agents)}\nlogs: {agents[0].parent}", file=sys.stderr)
    failed = [(node, code) for node, code in enumerate(ends) if code]
    # One that was killed first: those that miss it fail too.
    node, code = min(failed, key=lambda each: each[1], default=(0, 1))
    print(f"error: torchrun on node {node} {_how(code)}; the same command continues the run", file=sys.stderr)
    return code if code > 0 else 128 - code


def _attempt(path: Path) -> int:
    """The number in `.../attempt_N/...`, which torchrun raises with every restart."""
    return next(int(part[8:]) for part in reversed(path.parts) if re.fullmatch(r"attempt_\d+", part))


def _last_lines(folders: list[Path]) -> str:
    lines = [line for folder in folders for line in _read(folder / "stderr.log").splitlines()]
    return "\n".join(f"  {line}" for line in lines[-LAST_LINES:]) or "  (none)"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
