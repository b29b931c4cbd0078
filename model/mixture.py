"""Mixture of transducers (ULTRA-HSTU, arXiv 2602.16986): a stack per family of behaviour, fused for the head.

    y_c = stack_c([contextual | newest events of the history with an action of channel c | targets])
    out = W [y_1 ... y_C] + b                                              for each target

Embedding tables and token encoders are shared. A channel that costs attention over few events can afford a longer
reach: its budget counts its own events. The paper gives no equation of the fusion; this is the concatenation that the
public implementations use.
"""

# S = tokens of all sequences, M = targets of all, E = model width

from dataclasses import replace

import torch
from torch import Tensor, nn

from .config import ChannelConfig, ModelConfig
from .hstu import HSTUStack
from .layers import full_precision, linear
from .sequences import Limits, Sequences


class Channel(nn.Module):
    """One stack and the events that it reads."""

    def __init__(self, channel: ChannelConfig, config: ModelConfig, limits: Limits) -> None:
        super().__init__()
        unknown = sorted(set(channel.actions) - set(limits.actions))
        if unknown:
            raise ValueError(
                f"model.channels names {unknown}, which are no actions of the dataset; choose from "
                f"{list(limits.actions)}"
            )
        self.num_events = channel.num_events
        self.limits = limits
        self.action_mask = channel.action_mask(limits.actions)
        layers = config.num_layers if channel.num_layers is None else channel.num_layers
        of_channel = replace(limits.newest(channel.num_events), only_targets=True)
        self.stack = HSTUStack(config.model_copy(update={"num_layers": layers}), of_channel)

    def forward(self, x_SE: Tensor, sequences: Sequences) -> Tensor:
        """Tokens [S, E] to targets [M, E]."""
        assert sequences.actions is not None
        is_chosen = (sequences.actions & self.action_mask) != 0
        is_chosen = is_chosen | (sequences.indices < self.limits.num_contextual) | sequences.is_target
        chosen, of_channel = sequences.keep(is_chosen)
        truncation = of_channel.truncate(self.num_events, self.limits)
        newest = truncation.kept
        _, rows = truncation.split(chosen)
        out_ME: Tensor = self.stack(x_SE.index_select(0, rows), newest)
        return out_ME


class Mixture(nn.Module):
    """The channels of `model.channels`, and the matrix that makes one token of what they say of a target."""

    def __init__(self, config: ModelConfig, limits: Limits) -> None:
        super().__init__()
        self.channels = nn.ModuleList(Channel(channel, config, limits) for channel in config.channels.values())
        self.fuse = linear(len(self.channels) * config.width, config.width)

    def forward(self, x_SE: Tensor, sequences: Sequences) -> Tensor:
        """Tokens [S, E] to targets [M, E]; the residual streams stay float32 under autocast."""
        said = [channel(x_SE, sequences) for channel in self.channels]
        return full_precision(self.fuse(torch.cat(said, dim=1)))
