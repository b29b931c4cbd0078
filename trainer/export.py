"""A checkpoint as other programs want it: dense weights in one safetensors file, every table in one Parquet file."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from ..data.errors import UserError
from ..data.items import read_items
from ..data.locations import shown
from ..data.storage import Storage, load_dataset
from ..embeddings.tables import ITEM_TABLE
from .pieces import Source
from .storage import Location

DENSE_FILE = "dense.safetensors"
SUMMARY_FILE = "export.json"
ROWS = 65_536
"""Rows of a table in memory at a time, and in one row group."""


def export(folder: Location, out: Path, *, dataset: str | None) -> None:
    """Write `out`, which must not exist and appears when it is complete.

        out/dense.safetensors        dense weights by the names they have in the model
        out/tables/TABLE.parquet     row int64, vector list of float32[dim]; for items also item_id, as in the log,
                                     where the dataset is known; row 0, the unknown id, has none
        out/export.json              step, fingerprint of the dataset, tables with rows and columns

    Raises:
        DamagedError: the checkpoint is damaged.
        UserError: `out` cannot be written, or the dataset is not the one it was trained on.
    """
    source = Source(folder)
    names = _original_ids(source, dataset)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        (temporary / "tables").mkdir(parents=True)
        _write(source, temporary, names)
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; choose another --out") from None
    finally:
        source.close()
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"step {source.manifest.step} of {folder} exported to {out}")
    if names is None:
        print("item ids are dense ids: give the prepared dataset with --dataset DIR for those of the log")


def _write(source: Source, out: Path, item_ids: pa.Array | None) -> None:
    weights = [name for name in source.entries if name.startswith("weights/")]
    save_file({name.removeprefix("weights/"): source.tensor(name) for name in weights}, out / DENSE_FILE)
    tables = {}
    for name in sorted(source.entries):
        if name.startswith("tables/") and name.endswith("/weight"):
            table = name.split("/")[1]
            rows, columns = source.entries[name].shape
            tables[table] = {"rows": rows, "columns": columns}
            _write_table(source, table, out, item_ids if table == ITEM_TABLE else None)
    about = {"step": source.manifest.step, "dataset": source.manifest.dataset, "tables": tables}
    (out / SUMMARY_FILE).write_text(json.dumps(about, indent=1) + "\n")


def _write_table(source: Source, table: str, out: Path, ids: pa.Array | None) -> None:
    fields = [pa.field("row", pa.int64())]
    fields += [pa.field("item_id", ids.type)] if ids is not None else []
    columns = source.entries[f"tables/{table}/weight"].shape[1]
    fields.append(pa.field("vector", pa.list_(pa.float32(), columns)))
    schema = pa.schema(fields)
    with pq.ParquetWriter(out / "tables" / f"{table}.parquet", schema, compression="zstd") as writer:
        for first, vectors in _groups(source, table):
            last = first + len(vectors)
            arrays = [pa.array(range(first, last), pa.int64())]
            arrays += [ids.slice(first, last - first)] if ids is not None else []
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.flatten().numpy()), columns))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _groups(source: Source, table: str) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows of a table in groups, each with its first row."""
    name = f"tables/{table}/weight"
    rows, columns = source.entries[name].shape
    starts = range(0, rows, ROWS)
    for first in tqdm(starts, desc=table, unit="group", leave=False, disable=not sys.stderr.isatty()):
        vectors = torch.empty(min(ROWS, rows - first), columns)
        source.read(name, vectors, origin=(first, 0))
        yield first, vectors


def _original_ids(source: Source, dataset: str | None) -> pa.Array | None:
    """By row of the item table, the id in the log; None when no dataset tells."""
    if dataset is None:
        return None
    info = load_dataset(dataset)
    if info.fingerprint != source.manifest.dataset:
        raise UserError(
            f"{shown(dataset)} is not the dataset of {source.folder} (fingerprints {info.fingerprint} and "
            f"{source.manifest.dataset}): its ids mean other items; give the right one with --dataset DIR"
        )
    ids = read_items(Storage(dataset), info, ["id", "item_id"]).sort_by("id")["item_id"].combine_chunks()
    return pa.concat_arrays([pa.nulls(1, ids.type), ids])
