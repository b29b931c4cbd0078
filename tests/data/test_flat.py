"""Values of lists are read without looking for where the lists begin, exactly as they were written, or not at all."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ultrarec.data.parquet import Damaged, ParquetFile
from ultrarec.data.storage import Storage

LENGTHS = np.random.default_rng(0).integers(1, 90, 700)
TOTAL = int(LENGTHS.sum())
VALUES = {
    "few": np.arange(TOTAL) % 7,
    "many": np.random.default_rng(1).integers(-(2**62), 2**62, TOTAL),
    "small": (np.arange(TOTAL) * 7919 % 100_003).astype(np.int32),
    "single": np.random.default_rng(2).normal(size=TOTAL).astype(np.float32),
    "double": np.random.default_rng(3).normal(size=TOTAL),
    "yes": np.random.default_rng(4).integers(0, 2, TOTAL).astype(bool),
}


def as_lists(values, lengths=LENGTHS):
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), pa.array(values))


TABLE = pa.table({"user_id": np.arange(len(LENGTHS)), **{name: as_lists(values) for name, values in VALUES.items()}})


def written(folder, table=TABLE, **options):
    """A file of two row groups and many pages."""
    options = {"compression": "zstd", "data_page_version": "2.0", "data_page_size": 4096, **options}
    pq.write_table(table, folder / "file.parquet", row_group_size=400, write_page_checksum=True, **options)
    return ParquetFile(Storage(str(folder)), "file.parquet")


@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip", "brotli", "none"])
@pytest.mark.parametrize("use_dictionary", [True, False])
def test_values_are_those_of_the_lists_in_every_codec_and_encoding(tmp_path, compression, use_dictionary):
    file = written(tmp_path, compression=compression, use_dictionary=use_dictionary)
    ends = np.cumsum(LENGTHS)[[399, 699]]
    for group, (begin, end) in enumerate([(0, ends[0]), tuple(ends)]):
        found = file.read_values(group, list(VALUES), int(end - begin))
        assert set(found) == set(VALUES)
        for name, values in found.items():
            assert values.equals(pa.chunked_array([VALUES[name][begin:end]])), name


def test_columns_far_apart_in_the_file_are_found(tmp_path):
    wide = TABLE.add_column(2, "wide", as_lists(np.random.default_rng(5).normal(size=TOTAL)))
    found = written(tmp_path, wide).read_values(0, ["few", "many"], int(LENGTHS[:400].sum()))
    assert {name: values.to_numpy().tolist() for name, values in found.items()} == {
        name: VALUES[name][: LENGTHS[:400].sum()].tolist() for name in ("few", "many")
    }


NOT_FLAT = {
    "a null": lambda lists: [[None, *lists[0][1:]], *lists[1:]],
    "a null list": lambda lists: [None, *lists[1:], lists[0]],
    "an empty list": lambda lists: [[], *lists[1:], lists[0]],
    "one value more": lambda lists: [[*lists[0], 5], *lists[1:]],
    "words": lambda lists: [[str(value) for value in each] for each in lists],
}


@pytest.mark.parametrize("kind", NOT_FLAT)
def test_lists_with_more_to_them_than_their_values_are_left_out(tmp_path, kind):
    lists = TABLE["few"].to_pylist()[:400]
    table = pa.table({"changed": NOT_FLAT[kind](lists)[:400], "few": lists})
    total = int(LENGTHS[:400].sum())
    assert set(written(tmp_path, table).read_values(0, ["changed", "few"], total)) == {"few"}


def test_pages_that_mix_values_and_levels_are_left_out(tmp_path):
    assert written(tmp_path, data_page_version="1.0").read_values(0, list(VALUES), int(LENGTHS[:400].sum())) == {}


def test_a_flipped_bit_in_the_values_or_before_them_is_damage(tmp_path):
    total = int(LENGTHS[:400].sum())
    whole = written(tmp_path, TABLE.select(["many"]), use_dictionary=False)
    chunk = whole.metadata.row_group(0).column(0)
    content = (tmp_path / "file.parquet").read_bytes()
    for place in np.linspace(0, chunk.total_compressed_size - 1, 40).astype(int).tolist():
        broken = bytearray(content)
        broken[chunk.data_page_offset + place] ^= 16
        (tmp_path / "broken.parquet").write_bytes(broken)
        file = ParquetFile(Storage(str(tmp_path)), "broken.parquet")
        found = file.read_values(0, ["many"], total)
        # Some bits of a page's header mean nothing.
        assert not found or found["many"].to_numpy().tolist() == VALUES["many"][:total].tolist()
        if not found:
            with pytest.raises(Damaged):
                file.read(0, ["many"])
