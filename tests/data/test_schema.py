import dataclasses
import json
import re

import pytest
from permissions import unreadable

from ultrarec.data.errors import UserError
from ultrarec.data.schema import (
    DATASET_FILE,
    Column,
    Counts,
    DatasetInfo,
    HistoryFile,
    Lengths,
    Minimums,
    Roles,
    SourceFile,
    Split,
    Vocabulary,
)


@pytest.fixture
def info(tmp_path):
    return DatasetInfo(
        root=tmp_path,
        roles=Roles(user="user_id", item="item_id", time="time_ms", actions=("is_click", "long_view")),
        columns={"tab": Column(kind="event", type="int8"), "city": Column(kind="user", type="string")},
        vocabularies={"items": Vocabulary(size=7, path="items.parquet", sha256="0" * 64)},
        counts=Counts(
            users=2, events=9, items=7, train_events=5, validation_events=0, test_events=4, unknown_item_events=1
        ),
        split=Split(kind="split_time", time=1651330969569),
        files=(
            HistoryFile(
                path="histories/part-00000.parquet",
                rows=2,
                row_groups=2,
                bytes=123,
                sha256="1" * 64,
                group_rows=(1, 1),
                group_events=(4, 5),
                group_train_events=(2, 3),
            ),
        ),
        sources=(SourceFile(path="lög.parquet", bytes=45),),
        created_by="ultrarec 0.1.0",
        lengths=Lengths(mean=4.5, quantiles={"0.5": 4}, bucket_from=(0, 1), bucket_users=(0, 2), bucket_events=(0, 9)),
        minimums=Minimums(user_events=0, item_events=2),
    )


def edit(root, **changes):
    path = root / DATASET_FILE
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))


def test_what_is_written_is_read_back(info):
    info.write()
    assert DatasetInfo.load(info.root) == info
    assert DatasetInfo.load(str(info.root)) == info


def test_a_dataset_of_version_1_is_read_and_keeps_its_fingerprint(info):
    info.write()
    fingerprint = DatasetInfo.load(info.root).fingerprint
    file = dataclasses.asdict(info.files[0])
    old = {name: file[name] for name in ("path", "rows", "row_groups", "bytes", "sha256")}
    edit(info.root, schema_version=1, lengths=None, minimums=None, files=[old])
    loaded = DatasetInfo.load(info.root)
    assert (loaded.lengths, loaded.minimums, loaded.files[0].group_rows) == (None, None, ())
    assert loaded.fingerprint == fingerprint


def test_the_facts_of_row_groups_take_one_line_each(info):
    info.write()
    assert '"group_events": [4, 5],\n' in (info.root / DATASET_FILE).read_text()


def test_the_file_is_written_whole_or_not_at_all(info):
    info.write()
    before = (info.root / DATASET_FILE).read_text()
    broken = dataclasses.replace(info, created_by=object())
    with pytest.raises(TypeError):
        broken.write()
    assert (info.root / DATASET_FILE).read_text() == before


def test_a_dataset_can_be_moved(info, tmp_path_factory):
    info.write()
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "dataset"
    info.root.rename(elsewhere)
    assert DatasetInfo.load(elsewhere).history_paths == [elsewhere / "histories/part-00000.parquet"]


def test_the_fingerprint_leaves_out_where_the_dataset_lies_and_where_it_comes_from(info, tmp_path):
    elsewhere = dataclasses.replace(info, root=tmp_path / "elsewhere", sources=(), created_by="another version")
    assert elsewhere.fingerprint == info.fingerprint
    assert re.fullmatch("[0-9a-f]{16}", info.fingerprint)


def test_the_fingerprint_survives_writing_and_reading(info):
    info.write()
    assert DatasetInfo.load(info.root).fingerprint == info.fingerprint


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("roles", {"actions": ("long_view", "is_click")}),
        ("columns", {"city": Column(kind="event", type="string")}),
        ("vocabularies", {"items": Vocabulary(size=7, path="items.parquet", sha256="2" * 64)}),
        ("counts", {"unknown_item_events": 2}),
        ("split", {"time": 1651330969570}),
        ("files", {"sha256": "2" * 64}),
    ],
)
def test_the_fingerprint_covers_all_that_describes_the_content(info, field, change):
    value = getattr(info, field)
    if isinstance(value, dict):
        changed = value | change
    elif isinstance(value, tuple):
        changed = (dataclasses.replace(value[0], **change),)
    else:
        changed = dataclasses.replace(value, **change)
    assert dataclasses.replace(info, **{field: changed}).fingerprint != info.fingerprint


def test_columns_are_told_apart_by_kind(info):
    assert (info.event_columns, info.user_columns, info.num_items) == (["tab"], ["city"], 7)


def test_the_split_lists_only_what_its_kind_uses(info):
    info.write()
    assert json.loads((info.root / DATASET_FILE).read_text())["split"] == {"kind": "split_time", "time": 1651330969569}


def test_a_dataset_that_others_may_not_read_is_told_from_a_damaged_one(info):
    info.write()
    with unreadable(info.root), pytest.raises(UserError, match=r"dataset\.json cannot be read .*; check its perm"):
        DatasetInfo.load(info.root)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist; make it with `ultrarec prepare"):
        DatasetInfo.load(tmp_path / "nowhere")


def test_a_folder_without_the_file_is_not_a_dataset(tmp_path):
    with pytest.raises(UserError, match=r"is not a prepared dataset: it has no dataset.json; give the folder"):
        DatasetInfo.load(tmp_path)


def test_a_file_in_place_of_the_folder_is_not_a_dataset(tmp_path):
    (tmp_path / "log.csv").touch()
    with pytest.raises(UserError, match=r"log.csv is not a prepared dataset"):
        DatasetInfo.load(tmp_path / "log.csv")


def test_a_newer_version_asks_for_an_upgrade(info):
    info.write()
    edit(info.root, schema_version=3)
    with pytest.raises(UserError, match="schema_version=3, but this ultrarec reads up to 2; upgrade ultrarec"):
        DatasetInfo.load(info.root)


@pytest.mark.parametrize("version", [None, 0, "1"])
def test_a_file_without_a_version_is_refused(info, version):
    info.write()
    edit(info.root, schema_version=version)
    with pytest.raises(UserError, match=f"schema_version={version!r} is not a version; prepare it again"):
        DatasetInfo.load(info.root)


@pytest.mark.parametrize(
    "changes", [{"counts": None}, {"files": [{}]}, {"roles": {"user": "u"}}, {"columns": []}, {"vocabularies": {}}]
)
def test_a_damaged_file_is_refused(info, changes):
    info.write()
    edit(info.root, **changes)
    with pytest.raises(UserError, match=r"dataset.json is damaged .*; prepare the dataset again"):
        DatasetInfo.load(info.root)


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[]", "holds no JSON object")])
def test_a_file_that_is_not_json_is_refused(tmp_path, text, message):
    (tmp_path / DATASET_FILE).write_text(text)
    with pytest.raises(UserError, match=f"{message}.*; prepare the dataset again"):
        DatasetInfo.load(tmp_path)
