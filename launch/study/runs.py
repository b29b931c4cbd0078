"""One run of a study: trained in its own folder as `ultrarec train` does it, tested, and summed up in a file."""

from __future__ import annotations

import json
import math
import os
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import UserError
from ...trainer.config import Config, load_config
from .config import QualityStudy, Variant

if TYPE_CHECKING:
    from ...data.samples import Split

RESULT_FILE = "result.json"
ATTEMPTS_FILE = "attempts.jsonl"
CONFIG_FILE = "config.toml"
_NOT_COMPARED: dict[str, bool | set[str]] = {
    "launch": True,
    "data": {"path", "threads", "prefetch", "audit"},
    "checkpoint": {"path", "asynchronous", "keep_last", "keep_every"},
    "trainer": {"timeout_seconds", "watchdog_seconds"},
}
"""Settings by which results do not differ."""


@dataclass(frozen=True)
class Run:
    """A variant with a seed, and its run folder."""

    name: str
    variant: Variant
    seed: int
    data: str
    folder: Path

    @property
    def config(self) -> Config:
        """What it trains with."""
        return self.variant.config(data=self.data, seed=self.seed)

    @property
    def title(self) -> str:
        """How progress calls it."""
        return f"{self.variant.label}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run came to."""

    name: str
    seed: int
    step: int
    """Of the checkpoint that was tested."""
    last_step: int
    validation: dict[str, float | None]
    test: dict[str, float | None]
    dense_parameters: int
    table_parameters: int
    train_mflop: float
    """Of a sample, forward and backward, by the formulas; the mean over the training split."""
    inference_mflop: float
    """Of a sample of the test split, forward."""
    max_history: int
    cpu_minutes: float | None
    """Of all processes, for training and the last evaluation; None if the run was not trained by the study alone."""
    peak_mib: float | None
    """Resident memory of the largest process, likewise."""
    dataset: str
    """Fingerprint."""


def runs_of(study: QualityStudy, names: Sequence[str], *, seeds: int, data: str, out: Path) -> list[Run]:
    """The runs of these variants, all first seeds before the second ones: a study cut short has some of everything."""
    return [
        Run(name, study.variants[name], seed, data, out / name / f"seed-{seed}")
        for seed in range(seeds)
        for name in names
    ]


def finished(run: Run) -> Result | None:
    """The result of a run that is complete, None of one that is not.

    Raises:
        UserError: the folder holds a run of another configuration or dataset.
    """
    _require_same(run)
    path = run.folder / RESULT_FILE
    if not path.exists():
        return None
    result = Result(**json.loads(path.read_text(encoding="utf-8")))
    from ...data.storage import load_dataset

    fingerprint = load_dataset(run.data).fingerprint
    if result.dataset != fingerprint:
        raise UserError(
            f"{run.folder} holds a run on another dataset than {run.data} (fingerprints {result.dataset} and "
            f"{fingerprint}); give that dataset with --data, or another --out"
        )
    return result


def complete(run: Run, study: QualityStudy, *, procs: int) -> Result:
    """Train a run from where it is, test it, and write its result.

    Raises:
        UserError: a process failed.
    """
    from ...trainer.storage import put

    run.folder.mkdir(parents=True, exist_ok=True)
    _train(run, procs)
    result = _result(run, study)
    put(run.folder / RESULT_FILE, (json.dumps(asdict(result), indent=2) + "\n").encode())
    return result


def _require_same(run: Run) -> None:
    path = run.folder / CONFIG_FILE
    if not path.exists():
        return
    there, asked = (_compared(config) for config in (load_config(str(path)), run.config))
    differing = [name for name in asked if there[name] != asked[name]]
    if differing:
        name = differing[0]
        raise UserError(
            f"{run.folder} holds a run with {name}={there[name]!r}, and this study asks for {asked[name]!r} "
            f"({len(differing)} setting(s) differ); remove that folder to train it anew, or give another --out"
        )


def _compared(config: Config) -> dict[str, Any]:
    """The settings that results depend on, by name; where data and checkpoints lie does not matter."""
    from ...data.locations import without_keys

    flat: dict[str, Any] = {}
    for section, values in config.model_dump(mode="json", exclude=_NOT_COMPARED).items():
        flat |= {f"{section}.{name}": value for name, value in values.items()}
    if start := config.checkpoint.start_from:
        flat["checkpoint.start_from"] = without_keys(start)  # as the run's own file says it
    return flat


def _train(run: Run, procs: int) -> None:
    """One attempt, which continues what is there; what it cost goes to a file, a line at its start and its end."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(procs)] if procs > 1 else []
    overrides = [word for text in run.variant.overrides(data=run.data, seed=run.seed) for word in ("--set", text)]
    module = ["-m", "ultrarec.trainer", run.variant.recipe, "--out", str(run.folder), *overrides]
    is_new = not (run.folder / CONFIG_FILE).exists()
    with (run.folder / ATTEMPTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "start", "new": is_new}) + "\n")
        file.flush()
        ended = _run([sys.executable, *torchrun, *module])
        cost = {"cpu_seconds": ended.usage.ru_utime + ended.usage.ru_stime, "peak_mib": ended.usage.ru_maxrss / 1024}
        file.write(json.dumps({"event": "end", **cost}) + "\n")
    ended.require_success()


@dataclass(frozen=True)
class _Ended:
    """A process that has come to its end."""

    command: list[str]
    code: int
    usage: resource.struct_rusage
    """Of itself and the processes that it waited for."""
    is_interrupted: bool

    def require_success(self) -> None:
        """Raise UserError if it failed, which it has explained, and KeyboardInterrupt if it was made to stop."""
        if self.is_interrupted:
            raise KeyboardInterrupt
        if self.code:
            raise UserError(
                f"{shlex.join(self.command[1:])} ended with code {self.code}, and has said why above; "
                "mend that and give the same command again: finished runs stay, and this one continues"
            )


def _run(command: list[str]) -> _Ended:
    """Run a process to its end; Ctrl-C and SIGTERM reach it, and it is waited for while it saves."""
    from ...data.atomic import undisturbed

    process = subprocess.Popen(command)
    is_interrupted = False
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        is_interrupted = True
        # The terminal has sent it Ctrl-C too, but SIGTERM came to us alone; signals close together count as one.
        # A second signal ends the wait no sooner: a process that is left behind would go on writing to the run folder.
        with suppress(KeyboardInterrupt), undisturbed():
            process.send_signal(signal.SIGTERM)
            _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return _Ended(command, process.returncode, usage, is_interrupted)


def _result(run: Run, study: QualityStudy) -> Result:
    from ...data.storage import load_dataset
    from ...trainer.journal import METRICS_FILE, read_lines

    lines = read_lines(run.folder / METRICS_FILE)
    last_step = max(line["step"] for line in lines)
    step = last_step if study.checkpoint == "latest" else _best_step(run)
    by_split = {line["split"]: line for line in lines if line["step"] == step}
    if "test" not in by_split:
        by_split |= _evaluated(run, step)
    test, validation = (_metrics(by_split.get(split, {})) for split in ("test", "validation"))
    if missing := [name for name in study.metrics if name not in test]:
        raise UserError(f"{run.folder} has no test {missing[0]}; it has {', '.join(sorted(test))}: name one of these")
    dense, tables = _parameters(run.config)
    cpu_minutes, peak_mib = _cost(run.folder)
    return Result(
        name=run.name,
        seed=run.seed,
        step=step,
        last_step=last_step,
        validation=validation,
        test=test,
        dense_parameters=dense,
        table_parameters=tables,
        train_mflop=_mean_flops(run.config, "train") / 1e6,
        inference_mflop=_mean_flops(run.config, "test") / 1e6,
        max_history=run.config.data.max_history,
        cpu_minutes=cpu_minutes,
        peak_mib=peak_mib,
        dataset=load_dataset(run.data).fingerprint,
    )


def _metrics(line: Mapping[str, Any]) -> dict[str, float | None]:
    """What a line says of its split; a metric without a value is None."""
    from ...trainer.report import metrics_in

    return {
        name: None if value is None or not math.isfinite(value) else value for name, value in metrics_in(line).items()
    }


def _best_step(run: Run) -> int:
    from ...trainer.evaluate_command import find_checkpoints
    from ...trainer.manifest import step_of

    step = step_of(find_checkpoints(run.folder, "best", run.config.checkpoint)[-1])
    assert step is not None
    return step


def _evaluated(run: Run, step: int) -> dict[str, dict[str, float]]:
    """The metrics of a checkpoint by held-out split, as `ultrarec evaluate` computes them, in this process."""
    from ...trainer.evaluate_command import find_checkpoints, held_out_metrics

    folders = find_checkpoints(run.folder, str(step), run.config.checkpoint)
    return held_out_metrics(run.config, folders, show=lambda split, _: None)


def _parameters(config: Config) -> tuple[int, int]:
    """Values of the dense weights, and of the tables."""
    import torch

    from ...trainer.build import build_recommender, load_dataset

    with torch.device("meta"):
        recommender = build_recommender(config, load_dataset(config))
    dense, tables = (sum(p.numel() for p in part.parameters()) for part in (recommender.model, recommender.lookup))
    return dense, tables


def _mean_flops(config: Config, split: Split) -> float:
    """Of a sample, by the formulas, over all samples of the split; of `train` with the backward pass."""
    import numpy as np
    import torch

    from ...trainer.build import build_loader, load_dataset
    from ...trainer.costs import event_counts, samples_flops
    from ...trainer.parallel import World

    info = load_dataset(config)
    one_epoch = config.model_copy(update={"trainer": config.trainer.model_copy(update={"epochs": 1})})
    loader = build_loader(one_epoch, info, World(rank=0, size=1, device=torch.device("cpu")), split=split)
    total = samples = 0.0
    for batch in loader:
        history, targets, *chosen = event_counts(config, batch, info.roles.actions).numpy()
        flops = samples_flops(
            config,
            history=history,
            targets=targets,
            num_items=info.num_items,
            num_actions=len(info.roles.actions),
            chosen=tuple(chosen),
        )
        total += float(np.sum(flops.train if split == "train" else flops.forward))
        samples += len(targets)
    return total / samples


def _cost(folder: Path) -> tuple[float | None, float | None]:
    """CPU minutes and peak memory over all attempts; None each if an attempt is not known to its end."""
    path = folder / ATTEMPTS_FILE
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    starts, ends = ([line for line in lines if line["event"] == event] for event in ("start", "end"))
    if not starts or not starts[0]["new"] or len(ends) < len(starts):
        return None, None
    return sum(line["cpu_seconds"] for line in ends) / 60, max(line["peak_mib"] for line in ends)
