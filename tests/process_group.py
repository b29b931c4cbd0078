"""Runs a test's function on several real ranks over gloo.

Ranks are forked from a server that has imported torch and TorchRec once: a group of four starts in well under a second.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
"""A process has one server, which imports what was asked for last before it starts: it is asked for here alone, and
tests of code that asks for something else start it first. Ranks that must import it all take four times as long.
"""
CONTEXT.set_forkserver_preload([f"ultrarec.trainer.{name}" for name in ("run", "signals", "summary")] + ["pytest"])
TIMEOUT_SECONDS = 90


def start_server() -> None:
    """Start the process that ranks are forked from, unless it runs; the first rank does so too."""
    forkserver.ensure_running()


def run_ranks(function: Callable[..., Any], *args: Any, world_size: int) -> list[Any]:
    """`function(*args)` on every rank of a new group; the results in rank order.

    `function` is a module-level function of a test file. The tracebacks of all ranks that fail are raised together.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
        where = (function.__code__.co_filename, function.__name__)
        processes = [
            CONTEXT.Process(target=_rank, args=(where, args, rank, world_size, f"{folder}/store", sender))
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            results = [_result(receiver) for receiver, _ in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()
    failures = [value for ok, value in results if not ok]
    if failures:
        raise RuntimeError("\n".join(failures))
    return [value for _, value in results]


def writer_processes() -> list[int]:
    """Ids of the processes that write this process's checkpoints."""
    children = [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    return [pid for pid in children if b"ultrarec.trainer.writer" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def limit_files(size: int) -> None:
    """Let this process, and those that write its checkpoints, write no file larger than this: a disk that is full."""
    for pid in (os.getpid(), *writer_processes()):
        hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


def _result(receiver: Connection) -> tuple[bool, Any]:
    """Whether a rank succeeded, and its result or traceback."""
    if not receiver.poll(TIMEOUT_SECONDS):
        return False, f"a rank gave no result within {TIMEOUT_SECONDS} s"
    try:
        return receiver.recv()
    except EOFError:
        return False, "a rank died without a result"


def _rank(where: tuple[str, str], args: Any, rank: int, world_size: int, store: str, sender: Connection) -> None:
    assert "ultrarec.trainer.run" in sys.modules, "somebody else asked the server for other imports; see CONTEXT"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    try:
        sender.send((True, _load(*where)(*args)))
    except BaseException:
        sender.send((False, f"rank {rank}:\n{traceback.format_exc()}"))


def _load(path: str, name: str) -> Callable[..., Any]:
    """The function of a test file, which has no importable name of its own."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[Path(path).stem] = module
    spec.loader.exec_module(module)
    return getattr(module, name)
