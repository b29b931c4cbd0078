"""What a rank sees of another one's end: an error of the next collective, told in a line instead of a traceback."""

from __future__ import annotations

import os
import re
import traceback
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from torch.distributed import DistError

from .watchdog import stacks_file


def lost_connection(error: RuntimeError) -> str | None:
    """Why a collective failed, in a line; None if the error is none of a collective.

    NCCL's and the store's errors have types of their own; gloo (torch 2.13) raises bare RuntimeErrors that begin with
    the place in its sources: "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer".
    """
    first = str(error).partition("\n")[0]
    gloo = re.match(r"\[\S*gloo/(?:transport|rendezvous)\S*\] ", first)
    if gloo is None and not isinstance(error, DistError):
        return None
    # What gloo adds to it is advice for those who debug gloo.
    return (first[gloo.end() :] if gloo else first).partition(". ")[0]


def report(reason: str, out: Path, rank: int) -> str:
    """The line to show; the traceback of the error now handled goes where stacks of steps that hang go."""
    path = stacks_file(out, rank)
    where = ""
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {traceback.format_exc()}")
        where = f" (traceback in {path})"
    launcher = "torchrun starts all ranks again from the newest complete checkpoint while --max-restarts allows"
    alone = "the same command continues from the newest complete checkpoint"
    what_next = launcher if "TORCHELASTIC_RUN_ID" in os.environ else alone
    why = "what ended the other one stands in its own lines, or, where a signal killed it, in torchrun's"
    return f"rank {rank} lost its connection to another rank: {reason}{where}; {what_next}; {why}"
