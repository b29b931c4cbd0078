import json

import pyarrow as pa
import pyarrow.parquet as pq
from process_group import run_ranks
from small_runs import audit, config_of, lines, make_dataset, train_on_ranks

from ultrarec.data.loader import RankingSampler
from ultrarec.data.samples import RowCounts


def break_row(dataset, row):
    """Give one row of the first file an item beyond the vocabulary; returns how many samples it gives."""
    path = min(dataset.glob("histories/*.parquet"))
    table = pq.read_table(path)
    items = table["items"].to_pylist()
    items[row][0] = 10**6
    index = table.schema.get_field_index("items")
    pq.write_table(table.set_column(index, "items", pa.array(items, pa.list_(pa.int64()))), path, row_group_size=7)
    counts = RowCounts(*(table[name].to_numpy() for name in ("num_events", "num_train", "num_validation")))
    return int(RankingSampler(12, 1).num_samples(counts, "train")[row])


def test_skipped_samples_are_counted_and_listed_and_all_others_trained(tmp_path):
    dataset, out = make_dataset(tmp_path / "dataset", num_users=30), tmp_path / "run"
    config = config_of(dataset, "ranking", "data.bad_data=skip", "trainer.epochs=1", "data.audit=true")
    row = next(
        row
        for row in range(15)
        if pq.read_table(dataset / "histories/part-00000.parquet")["num_train"][row].as_py() > 3
    )
    num_samples = break_row(dataset, row)
    run_ranks(train_on_ranks, [(config, out)], world_size=2)
    assert sum(line["skipped_samples"] for line in lines(out)) == num_samples > 3
    listed = [json.loads(line) for path in out.glob("skipped/rank-*.jsonl") for line in path.read_text().splitlines()]
    assert sorted(line["rows"][0] for line in listed) == [[0, row, sample] for sample in range(num_samples)]
    assert {(line["fault"]["row"], line["fault"]["column"]) for line in listed} == {(row, "items")}
    assert not [sample for sample in audit(out)[0] if sample[:2] == (0, row)]
