"""Small interaction logs for tests of the preparation, and what a prepared dataset then holds."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ultrarec.data.prepare import PrepareOptions, prepare
from ultrarec.data.schema import UNKNOWN_ITEM

ROLES = {"user": "user", "item": "item", "time": "time"}


def write_log(path, columns, *, row_group_size=100):
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return str(path)


def write_csv(path, columns, *, delimiter=",", header=True, end="\n"):
    rows = list(zip(*columns.values(), strict=True))
    lines = [delimiter.join(map(str, row)) for row in ([tuple(columns)] if header else []) + rows]
    path.write_bytes(("".join(line + end for line in lines)).encode())
    return str(path)


def prepare_log(out, *logs, **options):
    return prepare(PrepareOptions(logs=logs, out=out, **{**ROLES, "memory_limit": "1GB", **options}))


def histories(info):
    return [row for path in info.history_paths for row in pq.read_table(path).to_pylist()]


def items(info):
    return pq.read_table(info.root / "items.parquet").to_pylist()


def original_items(info):
    """{user: its items as the log calls them, None for unknown ones}."""
    names = {UNKNOWN_ITEM: None} | {row["id"]: row["item_id"] for row in items(info)}
    return {row["user_id"]: [names[item] for item in row["items"]] for row in histories(info)}


def log_with_ties(num_rows, *, seed=0, num_users=40):
    """Many events of few users at few different times; `place` numbers the rows."""
    rng = np.random.default_rng(seed)
    return {
        "user": rng.integers(0, num_users, num_rows),
        "item": rng.integers(100, 160, num_rows),
        "time": rng.integers(0, 8, num_rows),
        "place": np.arange(num_rows),
    }
