"""What a restart needs beside the weights: how far the run is, and each rank's random numbers and open metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.loader import LoaderState
from .config import TrainerConfig
from .health import Health
from .parallel import seed_rank


@dataclass
class Window:
    """What this rank has seen since the last line of metrics; sums stay on the device until the line is written."""

    loss_sum: Tensor | None = None
    labels: int = 0

    def add(self, *, loss_sum: Tensor, labels: int) -> None:
        """Take in one batch."""
        # Read only when a line is written: .item() here would stop the host in every step.
        loss = loss_sum.detach().double()
        self.loss_sum = loss if self.loss_sum is None else self.loss_sum + loss
        self.labels += labels

    def totals(self) -> Tensor:
        """[loss sum, labels], float64, on the CPU."""
        loss = 0.0 if self.loss_sum is None else float(self.loss_sum)
        return torch.tensor([loss, self.labels], dtype=torch.float64)

    @staticmethod
    def of(totals: Tensor) -> Window:
        """The window with these totals."""
        loss, labels = totals.tolist()
        return Window(torch.tensor(loss, dtype=torch.float64), int(labels))


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
            "window": self.window.totals(),
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
            totals = torch.stack([state["window"] for state in states]).sum(0)
            self.window = Window.of(totals) if rank == 0 else Window()
            return
        own = states[rank]
        self.window = Window.of(own["window"])
        torch.set_rng_state(own["cpu_rng"])
        if "cuda_rng" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda_rng"])
