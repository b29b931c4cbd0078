"""What a sample's forward pass keeps for its backward pass, in bytes: formulas of every backbone.

Counted is what autograd saves of tokens and pairs, layer by layer. Left out are dropout's masks and copies, rounded
copies of weights, whatever a batch has once (such as the numbers of position biases), and what the backward pass itself
needs. Residual streams, norms and their inputs are float32; what autocast lets a matrix product read is of
`bytes_per_value`, and a copy where float32 is kept as well.

Padded softmax attention is counted as fused kernels do it: q, k, v, output and mask. With a learned bias torch composes
it on the CPU, and the weights of all heads count, which is the most that a GPU keeps.
"""

# T = tokens of a sample, M = its targets, n and m = tokens and targets of the batch's longest, E = model width,
# K and V = columns of q (or k) and of v over all heads, F = feed-forward width

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .config import ModelConfig
from .flops import Amount, Count, Sample, in_tokens, stacks, uvqk_width

FLOAT = 4
"""Bytes of float32: residual streams, norms, and each mean or deviation."""
INTEGER = 8


@dataclass(frozen=True, slots=True)
class _Sizes:
    """A sample in its batch, and how wide what is kept of it is."""

    config: ModelConfig
    sample: Sample
    longest: Sample
    value: int
    """Bytes of what matrix products read."""

    @property
    def tokens(self) -> Count:
        return self.sample.tokens

    @property
    def targets(self) -> Count:
        return self.sample.targets

    @property
    def padded(self) -> Count:
        """n: tokens of the longest."""
        return self.longest.tokens

    @property
    def padded_targets(self) -> Count:
        """m: targets of the longest."""
        return self.longest.targets

    @property
    def keys(self) -> int:
        """K: columns of q, and of k."""
        return self.config.num_heads * self.config.qk_dim

    @property
    def values(self) -> int:
        """V: columns of v."""
        return self.config.num_heads * self.config.value_dim

    def copies(self, count: int) -> int:
        """Bytes of a float32 value that is kept already, and that `count` matrix products read: a copy for each."""
        return 0 if self.value == FLOAT else count * self.value

    def read_by(self, count: int) -> int:
        """Bytes of a float32 value that is kept for so many matrix products alone."""
        return FLOAT if self.value == FLOAT else count * self.value


def activation_bytes(
    config: ModelConfig, sample: Sample, *, longest: Sample | None = None, bytes_per_value: int = FLOAT
) -> Amount | Count:
    """What a backbone keeps of a sample, or of each of many, in bytes; its input counts, its output does not.

    Args:
        sample: events of each kind.
        longest: the longest sample of the batch, to which some backbones pad all; without it, `sample` itself.
        bytes_per_value: 2 under bfloat16.
    """
    longest = sample if longest is None else longest
    if config.channels:
        each = zip(stacks(config, sample), stacks(config, longest), strict=True)
        kept = [
            activation_bytes(stack, of_channel, longest=longest_of_channel, bytes_per_value=bytes_per_value)
            + in_tokens(config, of_channel).tokens * INTEGER
            for (stack, of_channel), (_, longest_of_channel) in each
        ]
        fused = config.width * bytes_per_value * len(config.channels)
        return sum(kept[1:], kept[0]) + sample.targets * fused
    sizes = _Sizes(config, in_tokens(config, sample), in_tokens(config, longest), bytes_per_value)
    return BACKBONE_BYTES[config.backbone](sizes)


def _hstu(sizes: _Sizes) -> Amount | Count:
    config = sizes.config
    # The temporal bias of all layers reads both times of a token.
    times = 2 * INTEGER if (config.attention, config.relative_bias) == ("silu", "position_time") else 0
    total = _hstu_layer(sizes) * config.num_layers + sizes.tokens * times
    if config.tail is not None:
        events = config.tail.num_events
        newest = _Sizes(config, sizes.sample.newest(events), sizes.longest.newest(events), sizes.value)
        total = total + _hstu_layer(newest) * config.tail.num_layers + newest.tokens * times
    return total


def _hstu_layer(sizes: _Sizes) -> Amount | Count:
    """The stream, the projection before and after its activation, the attention's output, means and deviations."""
    config, value = sizes.config, sizes.value
    is_softmax, projected = config.attention == "softmax", uvqk_width(config)
    num_norms = config.num_heads if config.norm == "group_norm" else 1
    if config.rematerialize:
        # Only the jagged attention's output outlives the forward pass.
        kept = 0 if is_softmax else value * sizes.values
        return sizes.tokens * (FLOAT * config.width + kept + 2 * num_norms * FLOAT)
    activated = projected if config.activation == "uvqk" else sizes.values
    columns = projected + activated + sizes.values
    if config.gating == "none":
        columns += sizes.values  # a gate of ones
    if config.rope:
        columns += _rotated(sizes)
    per_token = FLOAT * config.width + value * columns + 2 * (1 + num_norms) * FLOAT
    if not is_softmax:
        return sizes.tokens * per_token
    return sizes.tokens * (per_token + INTEGER) + _softmax(sizes)


def _rotated(sizes: _Sizes) -> int:
    """Columns of q and k once rotated, and of the sines and cosines of each."""
    return 2 * sizes.keys + 2 * sizes.config.qk_dim


def _softmax(sizes: _Sizes) -> Amount | Count:
    """Padded q, k, v, output, statistics and mask; with a learned bias, its buckets and the weights of all heads."""
    config, padded = sizes.config, sizes.padded
    columns = 2 * sizes.keys + sizes.values
    if config.relative_bias == "none":
        per_token = sizes.value * (columns + sizes.values) + FLOAT * config.num_heads
        return padded * per_token + padded**2 * sizes.value
    # Composed, it computes in float32, and masks what it has rounded.
    buckets = INTEGER if config.relative_bias == "position_time" else 0
    return padded * FLOAT * columns + padded**2 * (FLOAT * config.num_heads + buckets + 1)


def _swiglu(sizes: _Sizes) -> int:
    """Both hidden layers, the gate's activation and the product."""
    return 4 * sizes.value * sizes.config.ffn_width


def _sasrec(sizes: _Sizes) -> Amount | Count:
    config, width = sizes.config, sizes.config.width
    query = FLOAT * (width + 2) + sizes.copies(2) * width + sizes.read_by(1) * width
    attended = sizes.value * (2 * sizes.keys + 2 * sizes.values)
    ffn = FLOAT * (width + 2) + sizes.read_by(1) * width + sizes.value * config.ffn_width
    layer = sizes.tokens * (query + attended + ffn) + _softmax(sizes)
    return layer * config.num_layers + sizes.tokens * INTEGER


def _llama(sizes: _Sizes) -> Amount | Count:
    """A norm with a scale keeps its input, what it normalised, and a root."""
    config, width = sizes.config, sizes.config.width
    norm = FLOAT * (2 * width + 1)
    qkv = sizes.read_by(1) * width + sizes.value * (2 * sizes.keys + 2 * sizes.values + _rotated(sizes))
    ffn = sizes.read_by(2) * width + _swiglu(sizes)
    layer = sizes.tokens * (2 * norm + qkv + ffn) + _softmax(sizes)
    return layer * config.num_layers + sizes.tokens * (norm + INTEGER)


def _fuxi_alpha(sizes: _Sizes) -> Amount | Count:
    """Both channels of learned weights keep these, the temporal one its buckets too, and both the padded values."""
    config, width, values = sizes.config, sizes.config.width, sizes.values
    projected = sizes.read_by(1) * width + 2 * sizes.value * (4 * values + 2 * sizes.keys)
    channels = FLOAT * (2 * 3 * values + 1) + sizes.value * 3 * values
    ffn = sizes.read_by(2) * width + _swiglu(sizes)
    stream = 2 * FLOAT * (width + 1)
    learned = sizes.padded * sizes.value * values + sizes.padded**2 * (INTEGER + 2 * sizes.value)
    layer = sizes.tokens * (stream + projected + channels + ffn) + learned
    return layer * config.num_layers + sizes.tokens * INTEGER + sizes.padded**2


def _din(sizes: _Sizes) -> Amount | Count:
    """Of each target and place of the padded history: its vector, what the unit reads, its hidden layer, the weight."""
    width, hidden, value = sizes.config.width, sizes.config.ffn_width, sizes.value
    pair = (FLOAT + sizes.copies(1)) * width + value * (4 * width + 2 * hidden + 1) + 1
    output = 2 * value * (width + hidden) + FLOAT * width
    return sizes.targets * (sizes.padded * pair + output) + sizes.tokens * (FLOAT * width + INTEGER)


def _stca(sizes: _Sizes) -> Amount | Count:
    config, width, value = sizes.config, sizes.config.width, sizes.value
    columns = sizes.keys + sizes.values
    transformed = _swiglu(sizes) + FLOAT * (width + 2) + sizes.read_by(2) * width
    history = sizes.tokens * (sizes.copies(2) * width + transformed + value * columns)
    queries = sizes.targets * value * (width + columns)
    padded = sizes.padded * value * (columns + 1) + sizes.padded_targets * (value * columns + FLOAT * config.num_heads)
    fused = sizes.targets * value * width * sum(number + 2 for number in range(config.num_layers))
    target = sizes.targets * (_swiglu(sizes) + FLOAT * (2 * width + 2))
    stream = sizes.tokens * ((FLOAT if value == FLOAT else 0) * width + INTEGER)
    return (history + queries + padded) * config.num_layers + fused + target + stream


BACKBONE_BYTES: dict[str, Callable[[_Sizes], Amount | Count]] = {
    "din": _din,
    "fuxi_alpha": _fuxi_alpha,
    "hstu": _hstu,
    "llama": _llama,
    "sasrec": _sasrec,
    "stca": _stca,
}
