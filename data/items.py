"""The vocabulary of items as a prepared dataset stores it, wherever that lies."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from .errors import UserError
from .parquet import Damaged, ParquetFile
from .schema import DatasetInfo
from .storage import Storage


def read_items(storage: Storage, info: DatasetInfo, columns: Sequence[str]) -> pa.Table:
    """These of the columns id, item_id and count, one row per item.

    Raises UserError if the file is missing or damaged, StorageError if the store does not answer.
    """
    path = info.vocabularies["items"].path
    try:
        file = ParquetFile(storage, path)
        groups = [file.read(group, columns) for group in range(file.metadata.num_row_groups)]
        tables = groups or [file.schema.empty_table().select(list(columns))]
        return pa.concat_tables(tables).select(list(columns))
    except (Damaged, KeyError) as error:
        raise UserError(
            f"{storage.name_of(path)} is damaged ({error}); restore it, or prepare the dataset again"
        ) from error
