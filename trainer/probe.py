"""Looks into one training step: losses sample by sample, gradient norms, and the first tensors that are not finite."""

# M = labelled predictions, K = tasks, D = embedding width

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..model.losses import task_losses
from ..model.recommender import NextItemModel, RankingModel, RankingOutput
from .build import Recommender
from .parallel import gather_objects
from .report import table
from .step import Step

ROWS_SHOWN = 20
NAMES_SHOWN = 20


class Probe:
    """Attach before a step, read after it; every rank has one, and all read together."""

    def __init__(self, recommender: Recommender, dense: Mapping[str, nn.Parameter]) -> None:
        self._norms: dict[str, float] = {}
        self._not_finite: dict[str, None] = {}
        self._samples: list[dict[str, Any]] = []
        for name, module in recommender.model.named_modules():
            shown = f"output of model.{name}" if name else "the loss"
            module.register_forward_hook(lambda _, args, output, shown=shown: self._look(shown, output))
        recommender.cut.register_forward_hook(self._look_at_embeddings)
        recommender.model.register_forward_hook(self._look_at_losses)
        for name, parameter in dense.items():
            if not bool(torch.isfinite(parameter).all()):
                self._not_finite[f"weight {name}"] = None
            _watch(parameter, name, self._note_gradient)

    def report(self, step: Step, number: int) -> str:
        """Everything as text; the rows of all ranks, worst first."""
        found = gather_objects((self._samples, list(self._not_finite), self._norms))
        samples = sorted((row for part, _, _ in found for row in part), key=lambda row: -_or_worst(row["loss"]))
        names = [f"rank {rank}: {name}" for rank, (_, own, _) in enumerate(found) for name in own]
        norms = sorted(found[0][2].items(), key=lambda item: -_or_worst(item[1]))
        verdicts = [each.verdict for each in step.consumed]
        lines = [
            f"step {number}: loss {', '.join(f'{verdict.loss:.6g}' for verdict in verdicts)}, "
            f"dense gradient norm {float(step.gradient_norm):.6g}, lr {step.lr:.6g}",
            f"faults: {'; '.join(fault for verdict in verdicts for fault in verdict.faults) or 'none'}",
            f"\nnot finite, in the order of computing: {len(names)}",
            *(f"  {name}" for name in names[:NAMES_SHOWN]),
            f"\nsamples by loss per label ({min(len(samples), ROWS_SHOWN)} of {len(samples)})",
            table(samples[:ROWS_SHOWN], columns=["loss", "labels", "events", "file", "row", "sample"]),
            f"\ngradients by norm ({min(len(norms), ROWS_SHOWN)} of {len(norms)}), of this rank before averaging",
            *(f"  {norm:12.4g}  {name}" for name, norm in norms[:ROWS_SHOWN]),
        ]
        return "\n".join(lines)

    def _note_gradient(self, name: str, gradient: Tensor) -> None:
        self._norms[name] = float(gradient.norm())
        self._look(f"gradient of {name}", gradient)

    def _look(self, name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            self._not_finite[name] = None

    def _look_at_embeddings(self, _: Any, args: Any, output: dict[str, Tensor]) -> None:
        for key, vectors in output.items():
            self._look(f"embeddings of {key!r}", vectors)
            if vectors.requires_grad:
                _watch(vectors, f"embeddings of {key!r}", self._note_gradient)

    @torch.no_grad()
    def _look_at_losses(self, model: nn.Module, args: Any, output: Any) -> None:
        batch, embeddings = args
        losses_M = _losses(model, batch, embeddings, output[1])
        samples = _sample_of_label(batch)
        events = batch.offsets.diff().tolist()
        for place, (file, row, number) in enumerate(batch.samples.tolist()):
            own = losses_M[samples == place]
            mean = float(own.mean()) if len(own) else 0.0
            self._samples.append(
                {"loss": mean, "labels": len(own), "events": events[place], "file": file, "row": row, "sample": number}
            )


def _watch(tensor: Tensor, name: str, note: Callable[[str, Tensor], None]) -> None:
    """Call `note` with the tensor's gradient as soon as there is one."""
    tensor.register_hook(lambda gradient: note(name, gradient))  # type: ignore[no-untyped-call]


def _losses(model: nn.Module, batch: Batch, embeddings: dict[str, Tensor], output: Any) -> Tensor:
    """[M] the loss of each label, whose sum is the model's loss."""
    if isinstance(model, RankingModel):
        assert isinstance(output, RankingOutput)
        losses_MK = task_losses(output.logits, output.labels, num_binary=len(model.task_bits))
        return (losses_MK * model.task_weights).mean(1).cpu()
    assert isinstance(model, NextItemModel)
    losses = []
    samples = torch.arange(len(batch.offsets), device=batch.offsets.device)
    # The loss is a sum: of one label, it is that label's.
    for place, sample in enumerate(_sample_of_label(batch).tolist()):
        row = slice(place, place + 1)
        one = dataclasses.replace(batch, labels=batch.labels[row], offsets=(samples > sample).long())
        own = {key: vectors[row] if key == "positive" else vectors for key, vectors in embeddings.items()}
        losses.append(model.loss(output.user_vectors[row], one, own))
    return torch.stack(losses).cpu() if losses else torch.zeros(0)


def _sample_of_label(batch: Batch) -> Tensor:
    """[M] the sample of each label: targets of a sample, or, of next_item, all of its events."""
    lengths = batch.num_targets if bool(batch.num_targets.any()) else batch.offsets.diff()
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths.cpu())


def _or_worst(value: float) -> float:
    return value if value == value else float("inf")
