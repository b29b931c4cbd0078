"""What a restart needs beside the weights: how far the run is, and each rank's random numbers and open metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.deal import NO_LOADS, Loads
from ..data.loader import LoaderState
from .config import TrainerConfig
from .health import Health
from .parallel import seed_rank


@dataclass
class Window:
    """What this rank has trained since the last line of metrics; sums stay on the device until the line is written."""

    loss_sum: Tensor | None = None
    labels: int = 0
    skipped: int = 0
    """Samples left out as damaged."""
    loads: Loads = NO_LOADS
    """Of all ranks: every one plans whole steps, and need not ask the others."""

    def add(self, batch: Batch, *, loss_sum: Tensor) -> None:
        """Take in one trained batch."""
        # Read only when a line is written: .item() here would stop the host in every step.
        loss = loss_sum.detach().double()
        self.loss_sum = loss if self.loss_sum is None else self.loss_sum + loss
        self.labels += batch.labels.numel()
        self.loads += batch.loads

    def sums(self) -> Tensor:
        """[loss sum, labels, skipped samples], float64, on the CPU: what is to be added up over ranks."""
        loss = 0.0 if self.loss_sum is None else float(self.loss_sum)
        return torch.tensor([loss, self.labels, self.skipped], dtype=torch.float64)

    def to_tensor(self) -> Tensor:
        """[6] float64 for a checkpoint: the sums, then the loads' mean, largest and least."""
        loads = torch.tensor([self.loads.mean, self.loads.largest, self.loads.least], dtype=torch.float64)
        return torch.cat([self.sums(), loads])

    @staticmethod
    def of(values: Tensor) -> Window:
        """What `to_tensor` wrote."""
        loss, labels, skipped, mean, largest, least = values.tolist()
        loads = Loads(mean, int(largest), least)
        return Window(torch.tensor(loss, dtype=torch.float64), int(labels), int(skipped), loads)

    @staticmethod
    def of_other_ranks(windows: list[Window], *, rank: int) -> Window:
        """A rank's part of what ranks of another number left: rank 0 takes all sums; the loads are everybody's."""
        loads = windows[0].loads
        if rank > 0:
            return Window(loads=loads)
        loss, labels, skipped = torch.stack([window.sums() for window in windows]).sum(0).tolist()
        return Window(torch.tensor(loss, dtype=torch.float64), int(labels), int(skipped), loads)


@dataclass
class TrainState:
    """Progress of a run. `step` counts finished updates; `loader` is the position behind the last trained batch."""

    step: int = 0
    batches: int = 0
    """Loader batches trained, `trainer.accumulate` per step but for skipped ones: how often tables were updated."""
    loader: LoaderState = field(default_factory=LoaderState)
    window: Window = field(default_factory=Window)
    health: Health = field(default_factory=Health)
    seed: int = 0
    """The run's."""
    validations: dict[int, dict[str, float | None]] = field(default_factory=dict)
    """By step, metrics of the validation split; None for those without a value. They tell which checkpoint is best."""

    def validated(self, metrics: Mapping[str, float | None]) -> None:
        """Take in what the validation split gave at this step."""
        self.validations[self.step] = {
            key: None if value is None or not math.isfinite(value) else value for key, value in metrics.items()
        }

    @property
    def epoch(self) -> int:
        """Epoch of the last trained batch, from 0."""
        at_start = self.loader.consumed == 0
        return max(self.loader.epoch - 1, 0) if at_start else self.loader.epoch

    def is_over(self, trainer: TrainerConfig) -> bool:
        """Whether nothing is left to train: `trainer.max_steps` is reached, or the last epoch has been read."""
        at_most, epochs = trainer.max_steps, trainer.epochs
        return (at_most is not None and self.step >= at_most) or (epochs is not None and self.loader.epoch >= epochs)

    def rank_state(self) -> dict[str, Any]:
        """This rank's own part: random numbers and open metrics."""
        state: dict[str, Any] = {
            "cpu_rng": torch.get_rng_state(),
            "window": self.window.to_tensor(),
            "health": self.health.to_tensor(),
        }
        if torch.cuda.is_available():
            state["cuda_rng"] = torch.cuda.get_rng_state()
        return state

    def load_rank_states(self, states: list[dict[str, Any]], *, rank: int, world_size: int, step: int) -> None:
        """Take up what the saving ranks left at a step: each its own, or, on another world size, rank 0 all windows."""
        self.health = Health.of(states[0]["health"])  # equal on all of them
        if len(states) != world_size:
            # Other ranks draw other dropout masks anyway: fresh streams are as good as the old ones, but must not be
            # those of the start, or a job whose number of ranks goes to and fro repeats its masks.
            seed_rank(self.seed, rank=rank, step=step)
            self.window = Window.of_other_ranks([Window.of(state["window"]) for state in states], rank=rank)
            return
        own = states[rank]
        self.window = Window.of(own["window"])
        torch.set_rng_state(own["cpu_rng"])
        if "cuda_rng" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda_rng"])
