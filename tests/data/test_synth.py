"""Synthetic logs follow the rule that they state, and `prepare` reads them."""

import itertools
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from ultrarec.data.schema import DatasetInfo
from ultrarec.data.synthetic_log import ACTIONS, DAYS, MS_PER_DAY, SPLIT_TIME, START, LogSpec, make_block, write_log
from ultrarec.launch.cli import COMMANDS, main

SPEC = LogSpec(users=300, items=400, events_per_user=60, seed=3)


@pytest.fixture(scope="module")
def block():
    """(columns, probabilities) of one block, in the order of users and times."""
    table, probabilities = make_block(SPEC, 0)
    columns = {name: table[name].to_numpy() for name in table.column_names}
    order = np.lexsort((columns["timestamp"], columns["user_id"]))
    return tuple({name: values[order] for name, values in each.items()} for each in (columns, probabilities))


def test_equal_arguments_write_equal_files(tmp_path):
    for name in ("one", "two"):
        write_log(SPEC, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_more_users_add_files_and_change_none(tmp_path):
    for users in (20, 27):
        write_log(LogSpec(users=users, items=50, events_per_user=100_000, seed=0), tmp_path / str(users))
    few, many = (sorted((tmp_path / str(users)).glob("*.parquet")) for users in (20, 27))
    assert (len(few), len(many)) == (2, 3)
    assert [path.read_bytes() for path in few] == [path.read_bytes() for path in many[:2]]


def shares_by_definition(categories):
    """(recent, old) of each event of one user."""
    for place, category in enumerate(categories):
        yield (
            categories[max(place - 8, 0) : place].count(category) / 8,
            categories[: min(place, 16)].count(category) / 16,
        )


def test_actions_have_the_probabilities_of_the_rule(block):
    columns, probabilities = block
    expected = {name: [] for name in ACTIONS}
    for user in np.unique(columns["user_id"]):
        for recent, old in shares_by_definition(columns["category"][columns["user_id"] == user].tolist()):
            for name, (bias, a, b) in ACTIONS.items():
                expected[name].append(1 / (1 + math.exp(-(bias + a * recent + b * old))))
    for name in ACTIONS:
        np.testing.assert_allclose(probabilities[name], expected[name], rtol=1e-12)
        p = probabilities[name]
        deviation = (columns[name] - p).sum() / np.sqrt((p * (1 - p)).sum())
        assert abs(deviation) < 4, name


def test_items_belong_to_their_category_and_few_of_them_are_popular(block):
    columns, _ = block
    assert ((columns["item_id"] - 1) % SPEC.num_categories == columns["category"]).all()
    assert columns["item_id"].min() >= 1
    assert columns["item_id"].max() <= SPEC.items
    counts = np.sort(np.bincount(columns["item_id"]))[::-1]
    assert counts[: SPEC.items // 10].sum() > 0.4 * counts.sum()


def test_users_are_uneven_and_their_times_ascend(block):
    columns, _ = block
    lengths = np.bincount(columns["user_id"])[1:]
    assert 45 < lengths.mean() < 75
    assert lengths.max() > 5 * np.median(lengths)
    same_user = columns["user_id"][1:] == columns["user_id"][:-1]
    assert (np.diff(columns["timestamp"])[same_user] > 0).all()
    assert columns["timestamp"].min() >= START
    assert columns["timestamp"].max() < START + (DAYS + 1) * MS_PER_DAY


def test_a_present_interest_gives_way_to_another(block):
    """The category of an event is more like that of the event before than like that of the 50th before."""
    columns, _ = block

    def repeats(back):
        same_user = columns["user_id"][back:] == columns["user_id"][:-back]
        return (columns["category"][back:] == columns["category"][:-back])[same_user].mean()

    assert repeats(1) > repeats(50) + 0.1


def entropy(labels, probabilities):
    return -np.log(np.where(labels, probabilities, 1 - probabilities)).mean()


def test_who_sees_more_of_the_history_predicts_better(tmp_path, block):
    """NE of the true probability, and of what the last events alone tell."""
    columns, probabilities = block
    starts = np.concatenate([[0], np.flatnonzero(np.diff(columns["user_id"])) + 1, [len(columns["user_id"])]])
    users = [columns["category"][start:end].tolist() for start, end in itertools.pairwise(starts)]
    recent = np.array([round(8 * share) for user in users for share, _ in shares_by_definition(user)])
    label = columns["share"]
    base = entropy(label, label.mean())
    by_recent = np.array([label[recent == count].mean() if (recent == count).any() else 0.5 for count in range(9)])
    best = entropy(label, probabilities["share"]) / base
    assert best + 0.05 < entropy(label, by_recent[recent]) / base < 1
    write_log(SPEC, tmp_path / "log")
    stated = json.loads((tmp_path / "log/_synth.json").read_text())["best_possible"]["all"]["share"]
    assert stated == {"base_rate": round(float(label.mean()), 6), "ne": pytest.approx(best, abs=1e-6)}


def test_the_documented_commands_make_and_prepare_a_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synth, prepare = (line.split()[1:] for line in COMMANDS["synth"].examples.replace("\\\n", " ").splitlines())
    synth[synth.index("--users") + 1] = "200"
    assert main(synth) == 0
    assert main(prepare) == 0
    info = DatasetInfo.load(prepare[prepare.index("--out") + 1])
    assert info.split.time == SPLIT_TIME
    assert info.counts.users == 200
    assert info.counts.events == pq.read_table("logs/synthetic").num_rows
    assert 0.05 < info.counts.test_events / info.counts.events < 0.2


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--users", "0", "--users 0: from 1 to"),
        ("--events-per-user", "0.5", "--events-per-user 0.5: from 1 to"),
        ("--seed", "-1", "--seed -1 is negative; give 0 or more"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path, capsys, option, value, message):
    arguments = {"--users": "3", "--items": "5", "--events-per-user": "4", "--seed": "1"} | {option: value}
    assert main(["synth", "--out", str(tmp_path / "log"), *(word for pair in arguments.items() for word in pair)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
