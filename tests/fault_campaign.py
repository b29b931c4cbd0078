"""Runs that are killed, stopped and starved at random moments from a seed, and must end as if nothing had happened.

    python tests/fault_campaign.py --runs 100 --seed 0

Ranks are real processes, forked from a server that has imported everything. A fault strikes from inside, at the n-th
time that its rank enters a phase of the step plus a delay, so that a seed names the moment; what dies, dies of a real
signal. This file stands in for torchrun between attempts: it waits for the ranks that are left to end by themselves,
within a bound, and gives the same command again.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from process_group import CONTEXT, limit_files, writer_processes
from small_runs import audit, audited_steps, config_of, differing, final_tensors, lines, losses, make_dataset

from ultrarec.trainer.manifest import MANIFEST, all_checkpoints, complete_checkpoints, step_of

EVERY = 3
SETTINGS = (
    "model.dropout=0.3",
    f"checkpoint.every={EVERY}",
    "checkpoint.keep_last=3",
    "trainer.evaluate_every=10",
    "trainer.timeout_seconds=8",
    "trainer.watchdog_seconds=4",
)
STEPS = 24
END_SECONDS = 30.0
"""Within which the ranks that are left end by themselves: the time limit of collectives, the watchdog, and starting."""
STUCK_SECONDS = 120.0
DISK_BYTES = 2**16
"""Largest file that a rank may write while its disk is nearly full: metrics and audit stay below, its shards do not."""
FULL_STEPS = 3
"""For how many steps a rank can write nothing at all."""
PHASES = ("data", "exchange", "forward", "backward", "agreement", "tables", "optimizer", "checkpoint", "manifest")
KINDS = ("kill one", "kill all", "terminate", "stop", "kill writer", "stop writer", "disk full", "all full", "corrupt")
WRITER = {"kill writer": signal.SIGKILL, "stop writer": signal.SIGSTOP}
"""What becomes of the process that writes a rank's checkpoints; stopped, it is storage that hangs for ever."""
ENDURED = ("disk full", "all full", *WRITER)
"""Faults that end no run: a save finds no room, or nothing at all does, not even a line of metrics, audit or log; or a
save has nobody to write it.
"""
TARGETS = {"shard": "rank-*.safetensors", "index": "index.json", "manifest": MANIFEST}
"""What is damaged of the newest checkpoint, once all ranks have been killed."""


@dataclass(frozen=True)
class Fault:
    """What happens to which rank, and when."""

    kind: str
    rank: int
    phase: str
    count: int
    """Strikes when the rank enters the phase for the count-th time."""
    delay: float
    """Seconds later."""
    target: str = "shard"
    is_cut: bool = False
    """Whether damage cuts the file off, or flips a bit."""
    place: float = 0.5
    """Where in the file, from 0 to 1."""

    @staticmethod
    def draw(dice: random.Random, kinds: tuple[str, ...], world_size: int) -> Fault:
        kind = dice.choice(kinds)
        phase = {"disk full": "checkpoint", "all full": "agreement"}.get(kind) or dice.choice(PHASES)
        rare = phase in ("checkpoint", "manifest")
        last = STEPS - 3 - FULL_STEPS if kind == "all full" else STEPS - 4
        return Fault(
            kind,
            rank=0 if phase == "manifest" else dice.randrange(world_size),
            phase=phase,
            count=dice.randint(1, 5 if rare else last),
            delay=0.0 if phase == "manifest" or kind in ENDURED else dice.choice([0.0, dice.uniform(0.0, 0.02)]),
            target=dice.choice(list(TARGETS)),
            is_cut=dice.random() < 0.5,
            place=dice.random(),
        )


def rank_main(argv: list[str], environment: dict[str, str], log: str, fault: Fault | None, strikes: Any) -> None:
    """One rank, from birth to death."""
    import torch

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    os.environ |= environment
    if fault is not None:
        arm(fault, strikes)
    from ultrarec.trainer.__main__ import main

    sys.exit(main(argv))


def arm(fault: Fault, strikes: Any) -> None:
    """Let the fault strike this process at its moment."""
    from ultrarec.trainer.manifest import Manifest
    from ultrarec.trainer.timing import Timer

    entered = 0

    def enter(name: str) -> None:
        nonlocal entered
        entered += name == fault.phase
        if name == fault.phase and entered == fault.count:
            if fault.delay:
                threading.Timer(fault.delay, strike, (fault, strikes)).start()
            else:
                strike(fault, strikes)
        if fault.kind == "all full" and name == fault.phase and entered == fault.count + FULL_STEPS:
            limit_files(resource.RLIM_INFINITY)

    phase, write = Timer.phase, Manifest.write

    def watched_phase(self: Timer, name: str) -> Any:
        enter(name)
        return phase(self, name)

    def watched_write(self: Manifest, folder: Any) -> None:
        enter("manifest")
        write(self, folder)

    Timer.phase = watched_phase  # type: ignore[method-assign, assignment]
    Manifest.write = watched_write  # type: ignore[method-assign]


def strike(fault: Fault, strikes: Any) -> None:
    strikes.put(fault.kind)
    if fault.kind == "disk full":
        limit_files(DISK_BYTES)
        threading.Timer(0.5, limit_files, (resource.RLIM_INFINITY,)).start()
        return
    if fault.kind == "all full":
        limit_files(0)
        return
    if fault.kind in WRITER:
        for pid in writer_processes():
            os.kill(pid, WRITER[fault.kind])
        return
    signals = {"terminate": signal.SIGTERM, "stop": signal.SIGSTOP}
    os.kill(os.getpid(), signals.get(fault.kind, signal.SIGKILL))


@dataclass(frozen=True)
class Attempt:
    """How one start of all ranks ended."""

    codes: list[int]
    struck: str | None


def attempt(argv: list[str], log: Path, *, world_size: int, fault: Fault | None) -> Attempt:
    """Start all ranks, and wait until none is left."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    strikes = CONTEXT.SimpleQueue()
    processes = []
    for rank in range(world_size):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        environment |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        own = fault if fault is not None and fault.rank == rank else None
        processes.append(CONTEXT.Process(target=rank_main, args=(argv, environment, str(log), own, strikes)))
    for process in processes:
        process.start()
    try:
        struck = _outlast(processes, strikes, fault)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return Attempt([process.exitcode or 0 for process in processes], struck)


def _outlast(processes: list[Any], strikes: Any, fault: Fault | None) -> str | None:
    """Wait for the end of all ranks but a stopped one; those that a fault leaves over must end by themselves."""
    struck: str | None = None
    deadline, first_death = time.monotonic() + STUCK_SECONDS, None
    while True:
        if struck is None and not strikes.empty():
            struck = strikes.get()
            if struck in ("kill all", "corrupt"):
                for process in processes:
                    process.kill()
        alive = [
            rank
            for rank, process in enumerate(processes)
            if process.is_alive() and not (struck == "stop" and fault is not None and rank == fault.rank)
        ]
        if not alive:
            return struck
        if first_death is None and (len(alive) < len(processes)):
            first_death = time.monotonic()
        assert first_death is None or time.monotonic() < first_death + END_SECONDS, f"ranks {alive} did not end"
        assert time.monotonic() < deadline, f"ranks {alive} are stuck"
        time.sleep(0.02)


def last_step(out: Path) -> int:
    """Of the last line about training; a line cut off by a kill does not count."""
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    path.write_text(text[: text.rfind("\n") + 1])
    return max((line["step"] for line in lines(out)), default=0) if path.exists() else 0


def newest(out: Path) -> int:
    return max((step_of(folder) or 0 for folder in complete_checkpoints(out)), default=0)


def survive(recipe: Path, out: Path, faults: list[Fault], *, world_sizes: list[int]) -> list[str]:
    """A run from beginning to end through all faults, one per attempt; what struck, in order."""
    argv, log, struck = [str(recipe), "--out", str(out)], out.with_suffix(".log"), []
    for number, fault in enumerate([*faults, None]):
        world_size = world_sizes[min(number, len(world_sizes) - 1)]
        ended = attempt(argv, log, world_size=world_size, fault=fault)
        if ended.struck is None or ended.struck in ENDURED:
            # Only a run that cannot save its last step may end otherwise, and must be continued.
            last = ended.struck is not None and "the last step's checkpoint could not be written" in log.read_text()
            allowed = {0, 2, 75} if last else {0}
            assert set(ended.codes) <= allowed, f"{fault}: {ended.codes}\n{log.read_text()[-3000:]}"
        if ended.struck == "disk full":
            assert "NOT WRITTEN" in log.read_text(), f"{fault}: the failed save was not told of"
        if ended.struck == "all full":
            assert "can be written again" in log.read_text(), f"{fault}: that lines had to wait was not told of"
        struck += [ended.struck] if ended.struck else []
        if set(ended.codes) == {0}:
            break
        check_what_stands(out, log, fault, ended)
    return struck


def check_what_stands(out: Path, log: Path, fault: Fault | None, ended: Attempt) -> None:
    """After a fault: no step behind the newest complete checkpoint but those that its successor was to hold."""
    reached, saved = last_step(out), newest(out)
    if ended.struck == "terminate":
        assert set(ended.codes) == {128 + signal.SIGTERM}, ended.codes
        assert saved == reached, f"{fault}: stopped after step {reached}, saved was {saved}"
    # A save in flight, and the steps since it began; saves that a full disk refused were told of.
    refused = log.read_text().count("NOT WRITTEN")
    assert reached - saved <= (2 + refused) * EVERY, f"{fault}: trained {reached} steps, saved were {saved}"
    if ended.struck == "stop" and len(ended.codes) > 1:
        stacks = "".join(path.read_text() for path in (out / "stacks").glob("rank-*.txt"))
        # Ranks that wait in a save or an evaluation, which the watchdog leaves alone, end by the limit of collectives.
        assert "loop.py" in stacks or "Timed out" in log.read_text(), f"{fault}: nobody said why the ranks ended"
    if ended.struck == "corrupt" and len(complete_checkpoints(out)) > 1:
        assert fault is not None
        damage(fault, Path(str(complete_checkpoints(out)[-1])))


def damage(fault: Fault, folder: Path) -> None:
    """Cut off one of a checkpoint's files, or flip a bit in it."""
    path = max(folder.glob(TARGETS[fault.target]))
    content = bytearray(path.read_bytes())
    place = int(fault.place * len(content))
    if fault.is_cut:
        content = content[:place]
    else:
        content[place] ^= 1 << place % 8
    path.write_bytes(content)


def check_equal(out: Path, whole: Path, *, world_size: int) -> None:
    """Weights, optimizer state, metrics and audit are those of the uninterrupted run, bit for bit."""
    for split in ("train", "validation", "test"):
        left, right = comparable(out, split), comparable(whole, split)
        assert left == right, f"{split} metrics differ"
    for rank in range(world_size):
        assert audited_steps(out, rank) == audited_steps(whole, rank), f"audit of rank {rank} differs"
    names = differing(final_tensors(out), final_tensors(whole))
    assert not names, f"{len(names)} tensors differ: {names[:5]}"
    for folder in all_checkpoints(out):
        assert (folder / MANIFEST).exists() or (step_of(folder) or 0) > newest(out)


def comparable(out: Path, split: str) -> list[dict[str, Any]]:
    """Metrics lines without what they count of faults."""
    counts = ("failed_saves", "unwritten_lines")
    return [{k: v for k, v in line.items() if k not in counts} for line in lines(out, split)]


def check_complete(out: Path, whole: Path) -> None:
    """On other numbers of ranks: every row once, and the losses up to rounding."""
    left, right = ({epoch: sorted(rows) for epoch, rows in audit(each).items()} for each in (out, whole))
    assert left == right, "rows were lost or repeated"
    for ours, theirs in zip(losses(out), losses(whole), strict=True):
        assert abs(ours - theirs) <= 1e-4 * abs(theirs)


class Campaign:
    """Faults against one small recipe on two ranks."""

    def __init__(self, root: Path, *, kinds: tuple[str, ...] = KINDS) -> None:
        self.root, self.kinds = root, kinds
        dataset = make_dataset(root / "dataset")
        self.recipes = {}
        for name, settings in {"fixed": SETTINGS, "elastic": (*SETTINGS, "model.dropout=0.0")}.items():
            self.recipes[name] = root / f"{name}.toml"
            self.recipes[name].write_text(config_of(dataset, "ranking", *settings).to_toml())
        self.whole = {name: self._reference(name) for name in self.recipes}

    def _reference(self, name: str) -> Path:
        out = self.root / f"whole-{name}"
        survive(self.recipes[name], out, [], world_sizes=[2])
        return out

    def run(self, seed: int) -> list[str]:
        """One run through one or two faults; every fourth changes its number of ranks."""
        dice = random.Random(seed)
        elastic = seed % 4 == 3
        name = "elastic" if elastic else "fixed"
        sizes = [2, dice.choice([1, 3]), 2] if elastic else [2]
        faults = [Fault.draw(dice, self.kinds, 2 if n == 0 else min(sizes)) for n in range(dice.randint(1, 2))]
        out = self.root / f"run-{seed}"
        try:
            struck = survive(self.recipes[name], out, faults, world_sizes=sizes)
            if elastic:
                check_complete(out, self.whole[name])
            else:
                check_equal(out, self.whole[name], world_size=2)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {faults}: {error}; its folder is {out}") from None
        shutil.rmtree(out)
        out.with_suffix(".log").unlink()
        return struck


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the others count on from it")
    parser.add_argument("--root", type=Path, help="where runs lie (default: a temporary folder; failed ones stay)")
    args = parser.parse_args()
    root = args.root or Path(tempfile.mkdtemp(prefix="faults-"))
    start, struck, failures = time.monotonic(), Counter[str](), []
    campaign = Campaign(root)
    for seed in range(args.seed, args.seed + args.runs):
        try:
            struck.update(campaign.run(seed))
        except AssertionError as error:
            failures.append(str(error))
            print(f"FAILED {error}", flush=True)
        if (seed - args.seed + 1) % 10 == 0:
            minutes = (time.monotonic() - start) / 60
            print(f"{seed - args.seed + 1} runs, {minutes:.1f} min, {len(failures)} failed: {dict(struck)}", flush=True)
    print(f"{args.runs} runs, {sum(struck.values())} faults struck, {len(failures)} runs failed")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
