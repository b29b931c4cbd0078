"""From ids and embeddings to tokens: content + action for every event, and a token per user feature.

A token says what was shown (content: the item, and features known when it is shown) and what came of it (action: the
declared actions, and outcomes). Targets have content only; their action part is zero, or one learned vector for all,
so no label can leak.
With `token_hidden` each part is an MLP over its concatenated embeddings, as in the authors' DLRM-v3 modules; without
it each part is a plain sum.
"""

# T = events of all samples, B = samples, C = contextual tokens per sample, A = declared actions, E = model width,
# D = embedding width

from typing import Literal

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.config import FeatureConfig
from .config import ModelConfig
from .layers import linear, mlp, table

Features = dict[str, FeatureConfig]
Role = Literal["event", "outcome", "user"]

ACTION_DIM = 8
"""Columns per action where an MLP reads them side by side."""
ACTION_STD = 0.1


def features_of(features: Features, role: Role) -> Features:
    """The features of one role, in declared order."""
    return {name: feature for name, feature in features.items() if feature.role == role}


class FeatureTables(nn.Module):
    """A dense table per feature, for vocabularies that fit on every rank; `hash` features come looked up."""

    def __init__(self, features: Features, width: int) -> None:
        super().__init__()
        self.names = tuple(features)
        self.dense_names = tuple(name for name, feature in features.items() if feature.kind != "hash")
        # A list, because a column's name may be one that an nn.ModuleDict cannot hold ("type", or one with a dot).
        self.tables = nn.ModuleList(table(features[name].num_values + 1, width) for name in self.dense_names)

    def forward(self, ids: dict[str, Tensor], embeddings: dict[str, Tensor]) -> list[Tensor]:
        """Rows [..., width] of each feature, in declared order, for ids [...] int64."""
        rows = {name: weights(ids[name]) for name, weights in zip(self.dense_names, self.tables, strict=True)}
        return [rows[name] if name in rows else embeddings[name] for name in self.names]


class ContentEncoder(nn.Module):
    """What an event shows: its item and its `event` features."""

    def __init__(self, config: ModelConfig, *, features: Features, embedding_dim: int) -> None:
        super().__init__()
        self.tables = FeatureTables(features_of(features, "event"), embedding_dim)
        self.mlp = None
        if config.token_hidden is not None:
            num_inputs = embedding_dim * (1 + len(self.tables.names))
            self.mlp = mlp(num_inputs, config.token_hidden, config.width)

    def forward(self, batch: Batch, embeddings: dict[str, Tensor]) -> Tensor:
        """Vectors [T, E]."""
        parts = [embeddings["item"], *self.tables(batch.features, embeddings)]
        return sum(parts[1:], parts[0]) if self.mlp is None else self.mlp(torch.cat(parts, dim=-1))


class ActionEncoder(nn.Module):
    """What came of an event: its action bits and its `outcome` features."""

    def __init__(self, config: ModelConfig, *, features: Features, num_actions: int, embedding_dim: int) -> None:
        super().__init__()
        outcomes = features_of(features, "outcome")
        self.num_actions = num_actions
        self.tables = FeatureTables(outcomes, embedding_dim)
        self.mlp = None
        action_dim = config.width
        if config.token_hidden is not None:
            action_dim = ACTION_DIM
            num_inputs = ACTION_DIM * num_actions + embedding_dim * len(outcomes)
            self.mlp = mlp(num_inputs, config.token_hidden, config.width)
        self.action_weight = None
        if num_actions:
            self.action_weight = nn.Parameter(torch.empty(num_actions, action_dim).normal_(std=ACTION_STD))
        self.target_action = None
        if config.target_action == "learned":
            self.target_action = nn.Parameter(torch.empty(config.width).normal_(std=ACTION_STD))

    def forward(self, batch: Batch, embeddings: dict[str, Tensor], is_target: Tensor) -> Tensor:
        """Vectors [T, E]; where `is_target` [T] the same for all, zero or learned."""
        parts = self.tables(batch.features, embeddings)
        if self.action_weight is not None:
            parts.insert(0, self.embed_actions(batch.actions, self.action_weight))
        action_TE = sum(parts[1:], parts[0]) if self.mlp is None else self.mlp(torch.cat(parts, dim=-1))
        if self.target_action is None:
            return action_TE.masked_fill(is_target[:, None], 0)
        return torch.where(is_target[:, None], self.target_action, action_TE)

    def embed_actions(self, actions: Tensor, weight: Tensor) -> Tensor:
        """Bitmasks [T] to the weights of their bits: side by side for the MLP, else their sum."""
        bits = actions[:, None] >> torch.arange(self.num_actions, device=actions.device) & 1
        rows = bits.to(weight.dtype)[:, :, None] * weight
        return rows.sum(1) if self.mlp is None else rows.flatten(1)


class ContextEncoder(nn.Module):
    """A token per `user` feature."""

    def __init__(self, config: ModelConfig, *, features: Features, embedding_dim: int) -> None:
        super().__init__()
        users = features_of(features, "user")
        self.tables = FeatureTables(users, embedding_dim)
        self.projections = nn.ModuleList()
        if config.token_hidden is not None:
            self.projections.extend(linear(embedding_dim, config.width) for _ in users)

    def forward(self, batch: Batch, embeddings: dict[str, Tensor]) -> Tensor:
        """Tokens [B, C, E], in the order of the features."""
        rows = self.tables(batch.features, embeddings)
        if self.projections:
            rows = [project(row) for project, row in zip(self.projections, rows, strict=True)]
        return torch.stack(rows, dim=1)
