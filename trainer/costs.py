"""What the model of a recipe spends on samples: operations, and from them the costs by which samples are dealt."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.cost import CostModel
from ..data.samples import Candidates, Integers
from ..model.config import ObjectiveConfig
from ..model.flops import Flops, Inputs, Sample, sample_flops
from .config import Config

_KINDS: dict[str, Literal["sampled", "per_sample", "per_position"]] = {
    "step": "sampled",
    "sample": "per_sample",
    "position": "per_position",
}
"""Of candidates, by `objective.negatives_shared_by`."""


def candidates_of(objective: ObjectiveConfig, num_items: int) -> Candidates | None:
    """What the next-item loss compares the next item with; None for ranking."""
    if objective.kind == "ranking":
        return None
    if objective.loss == "full_softmax":
        return Candidates(kind="catalogue", num_items=num_items)
    kind = _KINDS[objective.negatives_shared_by]
    return Candidates(kind=kind, num_items=num_items, num_negatives=objective.num_negatives)


def event_counts(config: Config, batch: Batch, actions: tuple[str, ...]) -> Tensor:
    """What the operations on a batch's samples follow from, [2 + channels, S], without making the host wait.

    Events of each sample's history, its targets, and the events of the history that each of `model.channels` selects;
    `actions` are the dataset's. A target's action is its label, and the batch has it as none.
    """
    counts = [batch.offsets.diff() - batch.num_targets, batch.num_targets]
    for channel in config.model.channels.values():
        is_chosen = (batch.actions & channel.action_mask(actions)) != 0
        chosen_before = torch.cat([batch.offsets.new_zeros(1), is_chosen.cumsum(0)])
        counts.append(chosen_before[batch.offsets].diff())
    return torch.stack(counts)


def samples_flops(
    config: Config,
    *,
    history: Integers,
    targets: Integers,
    num_items: int,
    num_actions: int,
    chosen: tuple[Integers, ...] = (),
) -> Flops:
    """Operations of a recipe's model on each of S samples.

    `history` and `targets` are [S] numbers of events; so are those of `chosen`, which each of `model.channels` selects
    of the history. Without them each selects all.
    """
    roles = [feature.role for feature in config.data.features.values()]
    candidates = candidates_of(config.objective, num_items)
    num_candidates = 0
    if candidates is not None:
        sampled = config.objective.num_negatives + config.objective.num_in_batch
        num_candidates = num_items if candidates.kind == "catalogue" else sampled
    inputs = Inputs(
        embedding_dim=config.embeddings.dim,
        num_actions=num_actions,
        num_event_features=roles.count("event"),
        num_outcomes=roles.count("outcome"),
        num_candidates=num_candidates,
    )
    sample = Sample(contextual=roles.count("user"), history=history, targets=targets, chosen=chosen)
    return sample_flops(config.model, config.objective, sample, inputs)


def cost_model_of(config: Config, *, num_items: int, num_actions: int) -> CostModel:
    """Training operations of a sample, by the length of its history, over those of an event in the shortest sample.

    All that `samples_flops` counts: the mask as it is, every layer of a tail, encoders, head and loss. Samples are
    dealt before their events are read, so that each channel counts as if it selected all of them. Targets do not see
    each other, so that each adds the same.
    """
    history = np.arange(config.data.max_history + 1)

    def operations(num_targets: int) -> Integers:
        targets = np.full_like(history, num_targets)
        flops = samples_flops(
            config, history=history, targets=targets, num_items=num_items, num_actions=num_actions
        ).train
        return np.broadcast_to(np.asarray(flops, np.float64), history.shape)

    none, one = operations(0), operations(1)
    is_ranking = config.objective.kind == "ranking"
    event = (one[1] - none[0]) / 2 if is_ranking else none[1] - none[0]
    return CostModel.in_tokens(none / event, (one - none) / event)
