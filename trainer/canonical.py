"""The form of a run's tensors in a checkpoint, which depends on no sharding plan and no number of ranks.

    weights/NAME                      a dense weight
    dense/NAME/KEY                    AdamW's state of it
    tables/TABLE/weight               [rows, columns] without the padding of stored rows
    tables/TABLE/KEY                  optimizer state of a table with one value per weight
    tables/TABLE/KEY/columns-A-B      [rows], optimizer state with one value per row of the stored columns A to B
    rank/R/KEY                        what belongs to one rank of the saving run

Row-wise Adagrad divides by the root of m, the sum over updates of the mean of a row's squared gradient over columns. A
table that is cut into columns has one m per piece, over the columns of that piece. So the m of wider columns is exactly
the mean of the pieces', weighted by their widths, and that is what a plan with wider columns loads; one with narrower
columns loads the m of the columns around them, the best that is known of them; the same columns load their very bits.
"""

# R = rows of a shard, D = its stored columns

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..data.errors import UserError
from ..embeddings.shards import TableShard
from ..embeddings.tables import ITEM_TABLE
from .pieces import Piece, Source


def table_pieces(shard: TableShard, *, dim: int) -> Iterator[Piece]:
    """What a checkpoint holds of a shard of a table of `dim` columns, padding not counted."""
    if not shard.weight_RD.size(0):
        return  # more ranks than rows
    rows = (shard.first_row,)
    for key, tensor in _elementwise(shard, dim=dim):
        yield Piece(key, tensor, (shard.num_rows, dim), (shard.first_row, shard.first_column))
    for key, tensor_R in _rowwise(shard):
        first = shard.first_column
        yield Piece(f"{key}/columns-{first}-{first + shard.weight_RD.size(1)}", tensor_R, (shard.num_rows,), rows)


def load_table(source: Source, shard: TableShard, *, dim: int, may_grow: bool) -> None:
    """Fill a shard in place.

    Args:
        may_grow: take up a table with fewer rows, whose new rows stay as they are, or none, which stays as it is. One
            of hashed ids keeps its number of rows, which their remainders are by: old rows would serve other ids.

    Raises:
        UserError: the checkpoint's table is not this one.
    """
    stored = source.entries.get(f"tables/{shard.table}/weight")
    if stored is None and may_grow:
        return
    if stored is None:
        raise UserError(f"it has no table {shard.table!r}")
    num_rows, columns = stored.shape
    if columns != dim:
        raise UserError(f"its table {shard.table!r} has {columns} columns, this run's has {dim}")
    if num_rows != shard.num_rows and may_grow and shard.table != ITEM_TABLE:
        raise UserError(
            f"its table {shard.table!r} of hashed ids has {num_rows} rows, this run's has {shard.num_rows}, and old "
            f"rows would serve other ids; set data.features.{shard.table}.num_values={num_rows - 1}, or begin without "
            "checkpoint.start_from"
        )
    if num_rows > shard.num_rows or (num_rows < shard.num_rows and not may_grow):
        raise UserError(f"its table {shard.table!r} has {num_rows} rows, this run's has {shard.num_rows}")
    known = max(min(num_rows - shard.first_row, shard.weight_RD.size(0)), 0)
    for key, tensor in _elementwise(shard, dim=dim):
        _require(source, key)
        source.read(key, tensor[:known], origin=(shard.first_row, shard.first_column))
    for key, tensor_R in _rowwise(shard):
        width = shard.weight_RD.size(1)
        _load_rowwise(source, key, tensor_R[:known], shard.first_row, shard.first_column, shard.first_column + width)


def load_whole(source: Source, name: str, tensor: Tensor, *, may_grow: bool = False) -> None:
    """Fill a tensor that is not cut.

    Args:
        may_grow: take up one with fewer rows, whose new rows stay as they are, or none, which stays as it is.
    """
    if name not in source.entries and may_grow:
        return
    _require(source, name)
    stored, shape = source.entries[name].shape, tuple(tensor.shape)
    has_grown = len(stored) == len(shape) > 0 and stored[0] < shape[0] and stored[1:] == shape[1:]
    if stored != shape and not (may_grow and has_grown):
        raise UserError(f"its {name} has shape {list(stored)}, this run's {list(shape)}")
    source.read(name, tensor[: stored[0]] if has_grown else tensor, origin=(0,) * tensor.dim())


def growth(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Of tensors by name, those that a checkpoint has not, or with fewer rows: what of them begins anew."""
    told = []
    for name, shape in sorted(shapes.items()):
        stored = source.entries.get(name)
        if stored is None:
            told.append(f"{name} (new)")
        elif shape and stored.shape[0] < shape[0]:
            told.append(f"{name} (rows {stored.shape[0]} to {shape[0] - 1})")
    return told


def _elementwise(shard: TableShard, *, dim: int) -> Iterator[tuple[str, Tensor]]:
    """Names and live values of what has one value per weight, without padding."""
    real = dim - shard.first_column
    yield f"tables/{shard.table}/weight", shard.weight_RD[:, :real]
    for key, tensor in shard.state.items():
        if tensor.dim() == 2:
            yield f"tables/{shard.table}/{key}", tensor[:, :real]


def _rowwise(shard: TableShard) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in shard.state.items():
        if tensor.dim() == 1:
            yield f"tables/{shard.table}/{key}", tensor


def _load_rowwise(source: Source, key: str, out_R: Tensor, row: int, first: int, last: int) -> None:
    """The mean over the columns from `first` to `last` of what is stored per piece of columns."""
    stored = _columns_by_prefix(list(source.entries), key)
    if (first, last) in stored:
        source.read(stored[first, last], out_R, origin=(row,))
        return
    total, weight = torch.zeros(out_R.shape, dtype=torch.float64), 0
    for (low, high), name in stored.items():
        shared = min(high, last) - max(low, first)
        if shared > 0:
            part = torch.empty(out_R.shape, dtype=out_R.dtype)
            source.read(name, part, origin=(row,))
            total += shared * part.double()
            weight += shared
    if weight != last - first:
        raise UserError(f"it has {key} for {weight} of the columns {first} to {last}")
    out_R.copy_(total / weight)


def _require(source: Source, name: str) -> None:
    if name not in source.entries:
        raise UserError(f"it has no {name}")


def _columns_by_prefix(names: Sequence[str], prefix: str) -> dict[tuple[int, int], str]:
    """Of names such as `PREFIX/columns-0-128`, each with its columns."""
    found: dict[tuple[int, int], str] = defaultdict(str)
    for name in names:
        head, separator, tail = name.partition("/columns-")
        if separator and head == prefix:
            first, last = tail.split("-")
            found[int(first), int(last)] = name
    return dict(found)
