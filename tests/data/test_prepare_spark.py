"""Both engines make one dataset: the same bytes in every file. With a real Spark session in this process."""

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ultrarec.data.append import append
from ultrarec.data.errors import UserError
from ultrarec.data.preparation.spark_engine import open_spark
from ultrarec.data.prepare import PrepareOptions, prepare

ROLES = {"user": "user", "item": "item", "time": "time"}


JAVA_VERSION = 17
"""The oldest that Spark 4 runs on."""


def java_version():
    """Of the Java that Spark would start, or None."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which(Path(home) / "bin" / "java" if home else "java")
    if java is None:
        return None
    # On standard error: `openjdk version "17.0.12" 2024-07-16`; before Java 9, "1.8.0_421".
    said = subprocess.run([java, "-version"], check=False, capture_output=True, text=True).stderr
    found = re.search(r'version "(?:1\.)?(\d+)', said)
    return None if found is None else int(found[1])


@pytest.fixture(scope="module")
def spark():
    """One session for all tests: starting one takes longer than all they do with it."""
    # Nobody reads what a robot left out; ci.yml sets this.
    leave_out = pytest.fail if os.environ.get("ULTRAREC_TEST_SPARK") == "always" else pytest.skip
    if find_spec("pyspark") is None:
        leave_out("--engine spark needs pyspark: pip install 'ultrarec[spark]'")
    if (version := java_version()) is None or version < JAVA_VERSION:
        found = "there is none here" if version is None else f"here is Java {version}"
        leave_out(f"--engine spark needs Java {JAVA_VERSION} or later, and {found}")
    from pyspark.sql import SparkSession

    settings = {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.shuffle.partitions": "3",
        "spark.sql.session.timeZone": "Asia/Kolkata",  # a user's own settings must not change the dataset
        "spark.sql.ansi.enabled": "false",
        "spark.driver.host": "127.0.0.1",
        # Compiling is most of the work on so few rows.
        "spark.sql.codegen.wholeStage": "false",
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1",
        "spark.default.parallelism": "2",
    }
    builder = SparkSession.builder.master("local[2]")
    for name, value in settings.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    yield session
    session.stop()


def both(tmp_path, *logs, **options):
    """The dataset of either engine."""
    for engine in ("duckdb", "spark"):
        choice = {"engine": engine} | ({"memory_limit": "1GB"} if engine == "duckdb" else {})
        yield prepare(PrepareOptions(logs=logs, out=tmp_path / engine, **{**ROLES, **options, **choice}))


def assert_equal(one, other):
    assert [file.path for file in one.files] == [file.path for file in other.files]
    for path in [*(file.path for file in one.files), one.vocabularies["items"].path, "dataset.json"]:
        assert one.locate(path).read_bytes() == other.locate(path).read_bytes(), path


def write(path, columns, **options):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def random_log(num_rows, *, seed):
    """Few times and tie-breaks, so that most of the order is that of files and rows."""
    rng = np.random.default_rng(seed)
    users = rng.integers(0, 3_000, num_rows)
    return {
        "user": pa.array(users),
        "item": pa.array([("é", "Z", "a", "")[k % 4] + str(k) for k in rng.integers(0, 200, num_rows).tolist()]),
        "time": pa.array(rng.integers(0, 9, num_rows)),
        "step": pa.array(rng.choice([0.5, -1.0, 3.25], num_rows)),
        "click": pa.array(rng.random(num_rows) < 0.3),
        "like": pa.array(rng.integers(0, 2, num_rows), pa.int8()),
        "small": pa.array(rng.integers(0, 250, num_rows), pa.uint8(), mask=rng.random(num_rows) < 0.1),
        "word": pa.array(rng.choice(["x", "yy", "ß"], num_rows), mask=rng.random(num_rows) < 0.1),
        "share": pa.array(rng.random(num_rows), pa.float32()),
        "level": pa.array(users.astype(np.uint64) << 30, mask=users % 7 == 0),
    }


def random_logs(tmp_path):
    """Three files in folders with difficult names, of two schemas, given in another order than that of their names."""
    first, second, third = (random_log(num_rows, seed=num_rows) for num_rows in (9_000, 5_000, 300))
    second["user"] = second["user"].cast(pa.int32())
    return (
        write(tmp_path / "lo g[1]%é" / "z.parquet", first, row_group_size=700),
        write(tmp_path / "a" / "log.parquet", second, row_group_size=999),
        write(tmp_path / "b" / "log.parquet", third),
    )


@pytest.mark.parametrize(
    "split",
    [
        {"leave_last": 1, "min_user_events": 3, "min_item_events": 60},
        {"split_time": 7, "validation_time": 6, "min_user_events": 2, "min_item_events": 40},
    ],
    ids=["leave last", "split time"],
)
def test_spark_writes_the_bytes_that_duckdb_writes(spark, tmp_path, split):
    options = {
        "order": "step",
        "actions": ("like", "click"),
        "columns": ("small", "word", "share"),
        "user_columns": ("level",),
    }
    one, other = both(tmp_path, *random_logs(tmp_path), **options, **split)
    assert len(one.files[0].group_rows) == 2
    assert one.num_items < 200
    assert_equal(one, other)


def test_spark_orders_ties_by_file_and_row_and_times_below_the_millisecond(spark, tmp_path):
    rng = np.random.default_rng(0)
    logs = []
    for part, unit in enumerate(("ns", "us")):
        ticks = pa.array(rng.integers(-3_000, 3_000, 4_000) * (1_000 if unit == "ns" else 1))
        times = ticks.cast(pa.timestamp(unit, tz="UTC"))
        columns = {"user": ["u"] * 4_000, "item": rng.integers(0, 50, 4_000), "time": times}
        logs.append(write(tmp_path / f"{9 - part}.parquet", columns, row_group_size=500))
    one, other = both(tmp_path, *logs)
    assert_equal(one, other)
    assert spark.sql("SELECT current_timezone()").collect()[0][0] == "Asia/Kolkata", "the user's session was changed"
    assert spark.catalog.listTables() == []


def test_spark_names_the_file_and_the_row_of_a_bad_value(spark, tmp_path):
    good = write(tmp_path / "good.parquet", {"user": [1] * 5, "item": [1] * 5, "time": [1.0] * 5})
    bad = write(tmp_path / "bad.parquet", {"user": [1] * 3, "item": [1] * 3, "time": [1.0, 2.5, float("nan")]})
    options = PrepareOptions(logs=(good, bad), out=tmp_path / "out", engine="spark", **ROLES)
    with pytest.raises(UserError, match=r"--time 'time' is '2.5' in .*bad.parquet, row 2 \(2 such rows\)"):
        prepare(options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.parquet", "good.parquet"]


def test_spark_reads_csv_and_appends_it_as_duckdb_does(spark, tmp_path):
    """Ids that look like numbers, empty fields, quoted text and times of several forms; then a newer log."""
    logs = []
    for part, users in enumerate((["07", "7", "x", "7", "07"], ["x", "new", "7", "new", "x"])):
        rows = zip(users, ["5", "06", "5", "a", "b"], [1, 3, 2, 5, 4], ["0", "true", "", "1", "0"], strict=True)
        text = "".join(
            f'{user},{item},2024-0{part + 1}-0{day} 10:00:00.12345{day},{flag or 0},"say ""{item}"", {day}"\n'
            for user, item, day, flag in rows
        )
        logs.append(tmp_path / f"{part}.csv")
        logs[-1].write_text("user,item,time,click,word\n" + text)
    options = {"actions": ("click",), "columns": ("word",)}
    prepare(PrepareOptions(logs=(str(logs[0]),), out=tmp_path / "duckdb", **ROLES, **options))
    shutil.copytree(tmp_path / "duckdb", tmp_path / "spark")
    one, other = (append(tmp_path / engine, (str(logs[1]),), engine=engine) for engine in ("duckdb", "spark"))
    assert_equal(one, other)
    assert other.counts.users == 4


def test_spark_numbers_rows_where_they_lie_and_not_on_one_executor(spark, tmp_path):
    with open_spark(tmp_path, master=None) as engine:
        rows = "SELECT id * 7 % 1000 AS key FROM range(0, 1000, 1, 5)"
        engine.create_numbered("numbered", rows, number="place", by="key", first=3)
        assert sorted(engine.rows("SELECT key, place FROM numbered")) == [(key, key + 3) for key in range(1000)]
        assert "Window" not in engine.rows("EXPLAIN SELECT * FROM numbered")[0][0]


@pytest.mark.parametrize("missing", ["pyspark", "java"])
def test_spark_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch, missing):
    log = write(tmp_path / "log.parquet", {"user": [1], "item": [1], "time": [1]})
    if missing == "pyspark":
        monkeypatch.setattr(
            "ultrarec.data.preparation.spark_engine.find_spec",
            lambda name: None if name == "pyspark" else find_spec(name),
        )
    else:
        monkeypatch.setattr("ultrarec.data.preparation.spark_engine.find_spec", lambda name: True)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(UserError, match=r"--engine spark needs .*ultrarec\[spark\]"):
        prepare(PrepareOptions(logs=(log,), out=tmp_path / "out", engine="spark", **ROLES))
    assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]


def test_a_spark_master_without_the_spark_engine_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--spark-master local\[2\] needs --engine spark; give both, or neither"):
        PrepareOptions(logs=("log.parquet",), out=tmp_path / "out", spark_master="local[2]", **ROLES)
