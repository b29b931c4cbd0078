"""Times of a training step and of scoring a user, of two variants side by side on random histories of one length."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...trainer.config import Config
from ..bench_attention import cpu_name
from .config import ComputeStudy

if TYPE_CHECKING:
    from ...data.batch import Batch
    from ...trainer.optimizer import Optimizer

NUM_ITEMS = 10_000
MILLISECONDS_BETWEEN_EVENTS = 30_000


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one variant at one length; per user, and by the formulas in `*_gflop`."""

    train_seconds: float
    """Forward, backward and update."""
    inference_seconds: float
    train_gflop: float
    inference_gflop: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Both variants at one length, measured in turns."""

    length: int
    targets: int
    users: int
    repeats: int
    machine: str
    settings: dict[str, list[str]]
    """Recipe and settings of each variant."""
    costs: dict[str, Cost]

    @classmethod
    def of(cls, tree: dict[str, Any]) -> Comparison:
        """As `asdict` took it apart."""
        return cls(**{**tree, "costs": {name: Cost(**cost) for name, cost in tree["costs"].items()}})

    def ratio(self, quantity: str) -> float:
        """How many times as much of a field of `Cost` the first variant takes as the second."""
        first, second = (getattr(cost, quantity) for cost in self.costs.values())
        return first / second


def path_of(out: Path, length: int) -> Path:
    """Where the comparison at a length is kept."""
    return out / f"length-{length}.json"


def read(path: Path) -> Comparison:
    """A comparison as `compare` wrote it."""
    return Comparison.of(json.loads(path.read_text(encoding="utf-8")))


def write(comparison: Comparison, path: Path) -> None:
    """Keep a comparison, whole or not at all."""
    from ...trainer.storage import put

    path.parent.mkdir(parents=True, exist_ok=True)
    put(path, (json.dumps(asdict(comparison), indent=2) + "\n").encode())


def settings_of(study: ComputeStudy) -> dict[str, list[str]]:
    """By variant, what makes its configuration."""
    return {name: [variant.recipe, *variant.set] for name, variant in study.variants.items()}


def compare(study: ComputeStudy, length: int, say: Callable[[str], None]) -> Comparison:
    """Measure every variant at one length: in turns, so that what slows the machine meets both."""
    from ...trainer.parallel import join

    configs = {name: _config(study, name, length) for name in study.variants}
    train: dict[str, list[float]] = {name: [] for name in configs}
    inference: dict[str, list[float]] = {name: [] for name in configs}
    with join(next(iter(configs.values())).trainer) as world:
        batch = _batch(study, length).to(world.device)
        subjects = {name: _Subject(config, world) for name, config in configs.items()}
        for turn in range(1 + study.repeats):
            for name, subject in subjects.items():
                seconds = subject.train(batch), subject.infer(batch)
                say(f"length {length:,}, {name}: {seconds[0]:.3g} s a step, {seconds[1]:.3g} s to score")
                if turn:  # the first one warms up
                    train[name].append(seconds[0])
                    inference[name].append(seconds[1])
        machine = _machine(world.device.type)
    costs = {
        name: Cost(
            train_seconds=statistics.median(train[name]) / study.users,
            inference_seconds=statistics.median(inference[name]) / study.users,
            **_gflop(config, length, study.targets),
        )
        for name, config in configs.items()
    }
    return Comparison(
        length=length,
        targets=study.targets,
        users=study.users,
        repeats=study.repeats,
        machine=machine,
        settings=settings_of(study),
        costs=costs,
    )


def _config(study: ComputeStudy, name: str, length: int) -> Config:
    """The variant without columns, which a random log lacks, and with room for such histories."""
    config = study.variants[name].config(data="none", seed=0)
    own = {"features": {}, "max_history": length, "targets_per_sample": study.targets}
    return config.model_copy(update={"data": config.data.model_copy(update=own)})


class _Subject:
    """A variant, ready to be timed."""

    def __init__(self, config: Config, world: Any) -> None:
        from ...trainer.build import recommender_of, shard

        recommender = recommender_of(config, num_items=NUM_ITEMS, actions=config.objective.tasks, popularity=None)
        self._parallel = shard(recommender, config, world).parallel
        self._optimizer = _optimizer(config, self._parallel)
        self._bf16 = config.trainer.precision == "bf16"
        self._device = world.device.type

    def train(self, batch: Batch) -> float:
        """Seconds of a step."""
        self._parallel.train()
        self._optimizer.begin(0)
        return self._timed(lambda: self._step(batch))

    def infer(self, batch: Batch) -> float:
        """Seconds of scoring the targets of all users of the batch."""
        import torch

        self._parallel.eval()
        with torch.no_grad():
            return self._timed(lambda: self._forward(batch))

    def _step(self, batch: Batch) -> None:
        (self._forward(batch) / batch.num_labels).backward()
        self._optimizer.update()

    def _forward(self, batch: Batch) -> Any:
        import torch

        with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._bf16):
            return self._parallel(batch)[0]

    def _timed(self, work: Callable[[], object]) -> float:
        self._wait()
        begin = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        import torch

        if self._device == "cuda":
            torch.cuda.synchronize()


def _optimizer(config: Config, parallel: Any) -> Optimizer:
    from ...trainer.checkpoint import TABLES
    from ...trainer.optimizer import Optimizer

    dense = {name: p for name, p in parallel.named_parameters() if not name.startswith(TABLES)}
    replicated = parallel.module.lookup.replicated
    return Optimizer(
        config.optimizer, dense=dense, sparse=parallel.fused_optimizer, replicated=replicated, total_steps=1
    )


def _batch(study: ComputeStudy, length: int) -> Batch:
    """Random events: the same for every variant."""
    import torch
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from ...data.batch import Batch
    from ...data.order import LoaderState

    generator = torch.Generator().manual_seed(0)
    per_user = length + study.targets
    lengths = torch.full((study.users,), per_user)
    items = torch.randint(1, NUM_ITEMS + 1, (study.users * per_user,), generator=generator)
    times = torch.arange(per_user).repeat(study.users) * MILLISECONDS_BETWEEN_EVENTS
    is_history = torch.arange(per_user).repeat(study.users) < length
    return Batch(
        ids=KeyedJaggedTensor(keys=["item"], values=items, lengths=lengths),
        offsets=torch.arange(study.users + 1) * per_user,
        num_targets=torch.full((study.users,), study.targets),
        timestamps=times,
        query_timestamps=times,
        actions=torch.randint(0, 4, items.shape, generator=generator) * is_history,
        features={},
        labels=torch.randint(0, 4, (study.users * study.targets,), generator=generator),
        users=torch.arange(study.users).repeat_interleave(study.targets),
        num_labels=study.users * study.targets,
        epoch=0,
        samples=torch.zeros(study.users, 3, dtype=torch.int64),
        state=LoaderState(),
    )


def _gflop(config: Config, length: int, targets: int) -> dict[str, float]:
    import numpy as np

    from ...trainer.costs import samples_flops

    flops = samples_flops(
        config,
        history=np.array([length]),
        targets=np.array([targets]),
        num_items=NUM_ITEMS,
        num_actions=len(config.objective.tasks),
    )
    return {"train_gflop": float(np.sum(flops.train)) / 1e9, "inference_gflop": float(np.sum(flops.forward)) / 1e9}


def _machine(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {torch.get_num_threads()} thread(s)"
