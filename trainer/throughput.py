"""Operations of the model on the samples of a run: how many per second, and which share of the device's peak."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..data.batch import Batch
from .config import Config
from .costs import event_counts, samples_flops
from .devices import device_called


class Throughput:
    """Counts what this rank has trained since the last reading, sample by sample.

    A batch's counts stay on the device until then: reading them would stop the host in every step. What is computed
    twice to save memory (`model.rematerialize`) counts once: it is no progress.
    """

    def __init__(self, config: Config, *, num_items: int, actions: tuple[str, ...], device: torch.device) -> None:
        once = config.model.model_copy(update={"rematerialize": False})
        self._config = config.model_copy(update={"model": once})
        self._num_items, self._actions = num_items, actions
        known = device_called(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._peak = known.flops(config.trainer.precision) if known is not None else None
        self._counts: list[Tensor] = []

    def add(self, batch: Batch) -> None:
        """Take in a trained batch; a rank's share without samples costs nothing."""
        if len(batch.samples):
            self._counts.append(event_counts(self._config, batch, self._actions))

    def read(self) -> float:
        """Operations of the forward and backward passes since the last reading."""
        counts, self._counts = self._counts, []
        if not counts:
            return 0.0
        history, targets, *chosen = torch.cat(counts, dim=1).cpu().numpy()
        flops = samples_flops(
            self._config,
            history=history,
            targets=targets,
            num_items=self._num_items,
            num_actions=len(self._actions),
            chosen=tuple(chosen),
        )
        return float(np.sum(flops.train))

    def metrics(self, flops: float, seconds: float, *, num_ranks: int) -> dict[str, float]:
        """`model_tflops` of all ranks together, and `mfu` where the device's peak is known."""
        rate = flops / seconds
        metrics = {"model_tflops": rate / 1e12}
        return metrics if self._peak is None else metrics | {"mfu": rate / (num_ranks * self._peak)}
