"""Which embedding tables a run needs, as TorchRec configurations, and the first values of their rows."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingConfig

from ..data.config import FeatureConfig
from .config import EmbeddingsConfig

ITEM_TABLE = "item"
VECTOR_WIDTH = 4
"""fbgemm loads rows in vectors of four; stored rows are padded to a multiple of it."""
INIT_BLOCK_ROWS = 65_536
"""Rows drawn from one random stream. A shard draws only the blocks it holds, and every plan holds the same values."""


def padded_dim(dim: int) -> int:
    """Columns stored for a table of `dim` columns."""
    return -(-dim // VECTOR_WIDTH) * VECTOR_WIDTH


def build_tables(
    config: EmbeddingsConfig, *, num_items: int, features: Mapping[str, FeatureConfig], item_keys: tuple[str, ...]
) -> list[EmbeddingConfig]:
    """One table for items, and one for every hashed feature; row 0 of each stands for unknown.

    Args:
        num_items: items of the vocabulary, with ids 1..num_items.
        features: the recipe's features by name; all others have tables in the model instead.
        item_keys: keys of a batch's ids that are looked up in the item table.
    """
    rows = {ITEM_TABLE: num_items + 1}
    rows |= {name: feature.num_values + 1 for name, feature in features.items() if feature.kind == "hash"}
    return [
        EmbeddingConfig(
            name=name,
            embedding_dim=padded_dim(config.dim),
            num_embeddings=num_rows,
            feature_names=list(item_keys) if name == ITEM_TABLE else [name],
        )
        for name, num_rows in rows.items()
    ]


def init_rows(out: Tensor, *, table: str, first_row: int, first_column: int, dim: int, std: float, seed: int) -> None:
    """Fill a shard of a table with its part of the table's N(0, std) values, in place.

    The values are a function of (seed, table, row, column): runs on any world size and plan start from equal tables.

    Args:
        out: [rows, columns] of the shard.
        first_row, first_column: where the shard begins in the table.
        dim: columns of the whole stored row.
    """
    num_rows, num_columns = out.shape
    for block in range(first_row // INIT_BLOCK_ROWS, -(-(first_row + num_rows) // INIT_BLOCK_ROWS)):
        start = block * INIT_BLOCK_ROWS
        low, high = max(start, first_row), min(start + INIT_BLOCK_ROWS, first_row + num_rows)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{table}/{block}".encode()))
        # The whole block, since torch draws the last values of a tensor otherwise than those before: what a shard
        # holds of a block must not depend on where the shard ends.
        values = torch.randn(INIT_BLOCK_ROWS, dim, generator=generator)[low - start : high - start] * std
        out[low - first_row : high - first_row] = values[:, first_column : first_column + num_columns].to(out)
