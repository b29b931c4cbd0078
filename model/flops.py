"""What a sample costs: floating point operations of every backbone.

Formulas, not measurements: matrix products, and attention over the pairs that the mask lets through; sums, norms and
activations are left out. A multiplication and an addition are two operations. Backward passes of the attention
multiply q and k again (arXiv 2205.14135, section 3.1), as fused implementations do.
"""

# T = tokens of a sample, P = pairs of a query and a key that it sees, E = model width, V = H * D columns of all heads

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels import AttentionMask
from .config import ModelConfig, ObjectiveConfig
from .inputs import ACTION_DIM
from .sequences import Limits

Count = int | npt.NDArray[np.integer[Any]]
"""A number of tokens, or those of many samples at once, [S]; what is computed from it has the same shape."""
Amount = float | npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating point operations of a forward pass, and of the backward pass after it."""

    forward: Amount = 0.0
    backward: Amount = 0.0

    @property
    def train(self) -> Amount:
        """Both passes."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, count: float) -> Flops:
        return Flops(self.forward * count, self.backward * count)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """How many tokens of each kind a sample has; or many samples, [S] of each count that differs between them."""

    contextual: int = 0
    history: Count
    targets: Count = 0
    tokens_per_event: int = 1
    """How many tokens of the history an event is."""
    chosen: tuple[Count, ...] = ()
    """Events of the history that each of `model.channels` selects, however many of them it then reads; without them
    every channel selects all, which is the most that they can cost."""

    @property
    def tokens(self) -> Count:
        """T."""
        return self.contextual + self.history + self.targets

    def newest(self, num_events: int) -> Sample:
        """This sample cut to the newest `num_events` events of its history."""
        return dataclasses.replace(self, history=np.minimum(self.history, num_events * self.tokens_per_event))

    def of_channel(self, number: int) -> Sample:
        """This sample with the events that a channel selects only."""
        if not self.chosen:
            return self
        return dataclasses.replace(self, history=self.chosen[number] * self.tokens_per_event, chosen=())


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What the dataset and the rest of the recipe say about the model's ends."""

    embedding_dim: int
    num_actions: int = 0
    num_event_features: int = 0
    num_outcomes: int = 0
    num_candidates: int = 0
    """Items that each prediction of the next item is compared with."""


def matmul(rows: Amount | Count, num_inputs: float, num_outputs: float) -> Flops:
    """A product of [rows, inputs] with [inputs, outputs]; backward, one such product for each of the two."""
    product = 2.0 * rows * num_inputs * num_outputs
    return Flops(product, 2 * product)


def attention(pairs: Amount | Count, config: ModelConfig) -> Flops:
    """Scores and weighted values of all heads; backward, the scores again and the gradients of q, k, v and weights."""
    forward = 2.0 * pairs * config.num_heads * (config.qk_dim + config.value_dim)
    return Flops(forward, 2.0 * pairs * config.num_heads * (3 * config.qk_dim + 2 * config.value_dim))


def visible_pairs(mask: AttentionMask, sample: Sample) -> Count:
    """How many (query, key) pairs of a sample the mask lets through, in closed form.

    Before the targets stand L tokens: F of id 0, which see all L (F = 0: the first has id 0, and sees itself), then
    those of ids 1, 2, …. Each sees all before it and itself, which is what the triangles count; with a window, all but
    the newest `full_tail` lose what lies further back, except for the oldest that `prefix` keeps.
    """
    before, front = sample.contextual + sample.history, mask.num_contextual
    pairs = front * before + _triangle(before) - _triangle(front)
    seen_by_target = before
    if mask.window:
        last_id = before - max(front, 1)
        losing = np.maximum(last_id - mask.full_tail - mask.window, 0)
        kept = max(mask.prefix, front) if mask.prefix else 0
        spared = max(front, 1) - 1 - kept
        pairs = pairs - (_triangle(losing + spared) - _triangle(spared))
        if not (mask.full_tail or mask.prefix):
            seen_by_target = np.where(last_id + 1 > mask.window, mask.window, before)
    return pairs + sample.targets * (seen_by_target + 1)


def _triangle(number: Count) -> Count:
    """1 + 2 + … + number; 0 for negative numbers."""
    positive = np.maximum(number, 0)
    return positive * (positive + 1) // 2


def in_tokens(config: ModelConfig, sample: Sample) -> Sample:
    """A sample counted in events as the tokens that the backbone gets for it."""
    if config.tokens == "merged":
        return sample
    return dataclasses.replace(sample, history=2 * sample.history, tokens_per_event=2)


def backbone_flops(config: ModelConfig, sample: Sample, *, context_sees_history: bool = True) -> Flops:
    """The backbone's operations on one sample; tokens in to tokens out."""
    sample = in_tokens(config, sample)
    # Only asked for masks, in which no length stands.
    limits = Limits(
        num_contextual=sample.contextual,
        max_history=0,
        max_targets=0,
        context_sees_history=context_sees_history,
    )
    return BACKBONE_FLOPS[config.backbone](config, sample, limits)


def _hstu(config: ModelConfig, sample: Sample, limits: Limits) -> Flops:
    if config.channels:
        return _mixture(config, sample, limits)
    mask = limits.mask(window=config.window, full_tail=config.full_tail, prefix=config.prefix)
    total = _hstu_layer(config, sample, mask) * config.num_layers
    if config.tail is not None:
        tail, newest = config.tail, sample.newest(config.tail.num_events)
        mask = limits.mask(window=tail.window, full_tail=tail.full_tail, prefix=tail.prefix)
        total += _hstu_layer(config, newest, mask) * tail.num_layers
    return total


def _mixture(config: ModelConfig, sample: Sample, limits: Limits) -> Flops:
    total = matmul(sample.targets, len(config.channels) * config.width, config.width)
    for stack, of_channel in stacks(config, sample):
        total += _hstu(stack, of_channel, limits)
    return total


def stacks(config: ModelConfig, sample: Sample) -> Iterator[tuple[ModelConfig, Sample]]:
    """Of every channel, its stack and what it reads of a sample."""
    for number, channel in enumerate(config.channels.values()):
        layers = config.num_layers if channel.num_layers is None else channel.num_layers
        stack = config.model_copy(update={"channels": {}, "num_layers": layers})
        yield stack, sample.of_channel(number).newest(channel.num_events)


def _hstu_layer(config: ModelConfig, sample: Sample, mask: AttentionMask) -> Flops:
    values = config.num_heads * config.value_dim
    project = matmul(sample.tokens, config.width, uvqk_width(config))
    output = matmul(sample.tokens, (3 if config.gating == "concat" else 1) * values, config.width)
    again = Flops(backward=project.forward) if config.rematerialize else Flops()
    return project + again + attention(visible_pairs(mask, sample), config) + output


def uvqk_width(config: ModelConfig) -> int:
    """Columns of u, v, q and k of all heads."""
    num_values = 1 if config.gating == "none" else 2
    return config.num_heads * (num_values * config.value_dim + 2 * config.qk_dim)


def _transformer(config: ModelConfig, sample: Sample, limits: Limits, *, num_ffn: int) -> Flops:
    values, keys = config.num_heads * config.value_dim, config.num_heads * config.qk_dim
    projections = matmul(sample.tokens, config.width, 2 * keys + values) + matmul(sample.tokens, values, config.width)
    ffn = matmul(sample.tokens, config.width, config.ffn_width) * num_ffn
    return (projections + attention(visible_pairs(limits.mask(), sample), config) + ffn) * config.num_layers


def _sasrec(config: ModelConfig, sample: Sample, limits: Limits) -> Flops:
    return _transformer(config, sample, limits, num_ffn=2)


def _llama(config: ModelConfig, sample: Sample, limits: Limits) -> Flops:
    return _transformer(config, sample, limits, num_ffn=3)


def _fuxi_alpha(config: ModelConfig, sample: Sample, limits: Limits) -> Flops:
    values, keys = config.num_heads * config.value_dim, config.num_heads * config.qk_dim
    pairs = visible_pairs(limits.mask(), sample)
    layer = (
        matmul(sample.tokens, config.width, 4 * values + 2 * keys)
        + attention(pairs, config)
        + matmul(pairs, 1, values) * 2  # the positional and the temporal channel weigh all heads alike
        + matmul(sample.tokens, 3 * values, config.width)
        + matmul(sample.tokens, config.width, config.ffn_width) * 3
    )
    return layer * config.num_layers


def _din(config: ModelConfig, sample: Sample, limits: Limits) -> Flops:
    del limits
    pairs = sample.targets * (sample.contextual + sample.history)
    unit = matmul(pairs, 4 * config.width, config.ffn_width) + matmul(pairs, config.ffn_width, 1)
    output = matmul(sample.targets, 3 * config.width, config.ffn_width)
    return unit + matmul(pairs, 1, config.width) + output


def _stca(config: ModelConfig, sample: Sample, limits: Limits) -> Flops:
    del limits
    values, keys = config.num_heads * config.value_dim, config.num_heads * config.qk_dim
    pairs = sample.targets * (sample.contextual + sample.history)
    layer = (
        matmul(sample.tokens, config.width, config.ffn_width) * 3
        + matmul(sample.tokens, config.width, keys + values)
        + matmul(sample.targets, config.width, keys + values)
        + attention(pairs, config)
    )
    fuse = sum(i + 2 for i in range(config.num_layers))
    target = matmul(sample.targets, config.width, 3 * config.ffn_width + fuse * config.width)
    return layer * config.num_layers + target


BACKBONE_FLOPS: dict[str, Callable[[ModelConfig, Sample, Limits], Flops]] = {
    "din": _din,
    "fuxi_alpha": _fuxi_alpha,
    "hstu": _hstu,
    "llama": _llama,
    "sasrec": _sasrec,
    "stca": _stca,
}


def sample_flops(model: ModelConfig, objective: ObjectiveConfig, sample: Sample, inputs: Inputs) -> Flops:
    """All operations of a model on one sample: token encoders, backbone, head and, for the next item, its loss."""
    is_ranking = objective.kind == "ranking"
    backbone = backbone_flops(model, sample, context_sees_history=is_ranking)
    ends = _ranking_head(model, objective, sample) if is_ranking else _next_item(model, objective, sample, inputs)
    return _encoders(model, sample, inputs) + backbone + ends


def _encoders(model: ModelConfig, sample: Sample, inputs: Inputs) -> Flops:
    if model.token_hidden is None:
        return Flops()
    events, hidden = sample.history + sample.targets, model.token_hidden
    total = matmul(sample.contextual, inputs.embedding_dim, model.width)
    total += matmul(events, inputs.embedding_dim * (1 + inputs.num_event_features) + model.width, hidden)
    num_action_inputs = ACTION_DIM * inputs.num_actions + inputs.embedding_dim * inputs.num_outcomes
    if num_action_inputs:
        total += matmul(events, num_action_inputs + model.width, hidden)
    return total


def _ranking_head(model: ModelConfig, objective: ObjectiveConfig, sample: Sample) -> Flops:
    item = matmul(sample.targets, objective.head_hidden, 2 * model.width)
    num_tasks, num_experts = len(objective.tasks) + len(objective.regressions), objective.num_experts
    if not num_experts:
        return item + matmul(sample.targets, objective.head_hidden, model.width + num_tasks)
    experts = matmul(sample.targets, model.width, num_experts * (objective.head_hidden + num_tasks))
    return item + experts + matmul(sample.targets, objective.head_hidden, num_tasks)


def _next_item(model: ModelConfig, objective: ObjectiveConfig, sample: Sample, inputs: Inputs) -> Flops:
    width = inputs.embedding_dim
    project = matmul(sample.history, model.width, width) if width != model.width else Flops()
    scores = matmul(sample.history, width, inputs.num_candidates)
    if objective.similarity == "mlp":
        scores += _similarity_by_mlp(objective, sample, inputs)
    return project + scores


def _similarity_by_mlp(objective: ObjectiveConfig, sample: Sample, inputs: Inputs) -> Flops:
    """Beyond the dot product: hidden vectors of users and of a sample's own items, not of those that a step shares.

    A pair multiplies its hidden layer by the output's weights. The backward pass makes the scores again.
    """
    width, hidden = inputs.embedding_dim, objective.head_hidden
    vectors = sample.history * (1 if objective.loss == "full_softmax" else 2)  # sampled: each has its positive
    if objective.negatives_shared_by == "sample":
        vectors = vectors + inputs.num_candidates
    pairs = matmul(sample.history, hidden, inputs.num_candidates)
    again = Flops(backward=matmul(sample.history, width + hidden, inputs.num_candidates).forward)
    return matmul(vectors, width, hidden) + pairs + again
