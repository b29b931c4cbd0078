"""Random schedules of kills and restarts on changing numbers of ranks: each sample of each epoch, once."""

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from orders import pairs_cost
from random_datasets import random_histories, write_dataset

from ultrarec.data.config import DataConfig
from ultrarec.data.loader import Loader, LoaderState, NextItemSampler, RankingSampler

NUM_ITEMS, EPOCHS = 30, 2
WORLD_SIZES = (1, 2, 3, 4, 8)
SCHEDULES = 210
SIZES = ({"batch_rows": 11}, {"batch_rows": 5, "balance_for": 2}, {"batch_tokens": 60}, {"batch_cost": 75.0})
MANNERS = (
    {},
    {"threads": 3, "prefetch": 2},
    {"max_history": 6, "stochastic_length": {"alpha": 1.3, "selection": "random"}},
    {"bad_data": "skip"},
)
SHAPES = {
    "many small row groups": {"num_users": 16, "mean_events": 5, "num_files": 3, "rows_per_group": 2},
    "fewer row groups than ranks": {"num_users": 12, "mean_events": 7, "num_files": 1, "rows_per_group": 6},
    "fewer users than ranks": {"num_users": 5, "mean_events": 3, "num_files": 2, "rows_per_group": 2},
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    made = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        root = tmp_path_factory.mktemp("once") / "dataset"
        users = {key: shape[key] for key in ("num_users", "mean_events")}
        files = {key: shape[key] for key in ("num_files", "rows_per_group")}
        write_dataset(root, random_histories(**users, num_items=NUM_ITEMS, seed=seed), num_items=NUM_ITEMS, **files)
        made[name] = str(root)
        made[name, "damaged"] = str(shutil.copytree(root, root.with_name("damaged")))
        break_a_row(Path(made[name, "damaged"]), shape["rows_per_group"])
    return made


def break_a_row(root, rows_per_group):
    """Let the user with the most training events have an item outside of the vocabulary."""
    most = {path: pc.max(pq.read_table(path)["num_train"]).as_py() for path in (root / "histories").iterdir()}
    path = max(most, key=most.get)
    table = pq.read_table(path)
    items = table["items"].to_pylist()
    items[table["num_train"].to_pylist().index(most[path])][0] = NUM_ITEMS + 1
    index = table.schema.get_field_index("items")
    broken = table.set_column(index, "items", pa.array(items, table.schema.field("items").type))
    pq.write_table(broken, path, row_group_size=rows_per_group, write_page_checksum=True)


def loaders(path, sampler, settings, *, world_size, state):
    config = DataConfig(**{"path": path, "shuffle_row_groups": 3, "threads": 1, "prefetch": 1, **settings})
    options = {"split": "train", "world_size": world_size, "epochs": EPOCHS, "state": state}
    return [Loader(config, sampler, rank=k, **options, cost_model=pairs_cost(0.05, 6)) for k in range(world_size)]


def consumed(step):
    """(epoch, file, row, sample) of all that a step trained, or left out as damaged."""
    trained = [(batch.epoch, *sample) for batch in step for sample in batch.samples.tolist()]
    return trained + left_out(step)


def left_out(step):
    return [(batch.epoch, skip.file, skip.row, skip.sample) for batch in step for skip in batch.skipped]


def run_schedule(choose, path, sampler, settings):
    """Train to the end through random kills: what every finished step consumed."""
    state, found = LoaderState(), []
    while state.epoch < EPOCHS:
        ranks = loaders(path, sampler, settings, world_size=choose.choice(WORLD_SIZES), state=state)
        steps = list(islice(zip(*ranks, strict=True), choose.choice([0, 1, 2, 4, 7, None])))
        # The last steps may not have reached a checkpoint: what they trained is lost, and counts for nothing.
        for step in steps[: len(steps) - choose.choice([0, 0, 1, 2])]:
            assert len({batch.state for batch in step}) == 1
            found += consumed(step)
            state = step[0].state
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_each_sample_is_trained_exactly_once_through_any_kills_and_world_sizes(datasets, shape):
    complete = {}
    for number in range(SCHEDULES // len(SHAPES)):
        choose = random.Random(f"{shape} {number}")
        sampler, size = choose.choice([RankingSampler(6, 2), NextItemSampler(6)]), choose.choice(SIZES)
        manner = choose.choice(MANNERS)
        if sampler not in complete:
            (whole,) = loaders(datasets[shape], sampler, SIZES[0], world_size=1, state=LoaderState())
            complete[sampler] = Counter(consumed(whole))
            assert set(complete[sampler].values()) == {1}
        path = datasets[(shape, "damaged") if "bad_data" in manner else shape]
        found = Counter(run_schedule(choose, path, sampler, size | manner))
        assert found == complete[sampler], (number, sampler, size, manner)


def test_the_damaged_datasets_leave_something_out(datasets):
    for shape in SHAPES:
        settings = SIZES[0] | {"bad_data": "skip"}
        (whole,) = loaders(
            datasets[shape, "damaged"], RankingSampler(6, 2), settings, world_size=1, state=LoaderState()
        )
        assert left_out(whole)


PROGRAM = """
import json, os, signal, sys
from itertools import islice
from ultrarec.data.config import DataConfig
from ultrarec.data.loader import Loader, LoaderState, RankingSampler

config = DataConfig(path=sys.argv[1], batch_rows=11, shuffle_row_groups=3)

def rank_of(rank, world_size, epochs, state):
    # Forked, which takes nothing of a loader along: importing torch five times took 40 s.
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        options = {"rank": rank, "world_size": world_size, "epochs": epochs, "state": state}
        loader = Loader(config, RankingSampler(6, 2), split="train", **options)
        with os.fdopen(writing, "w") as out:
            for batch in loader:
                state = [batch.state.epoch, batch.state.consumed]
                print(json.dumps([batch.epoch, batch.samples.tolist(), state]), file=out, flush=True)
        os._exit(0)
    os.close(writing)
    return pid, os.fdopen(reading)

def run(world_size, state, kill_after):
    # Without end where they are to be killed, or they might be done by then.
    epochs = 2 if kill_after is None else None
    ranks = [rank_of(rank, world_size, epochs, LoaderState(*state)) for rank in range(world_size)]
    for lines in islice(zip(*(out for _, out in ranks), strict=True), kill_after):
        for line in lines:
            print(line, end="")
    state = json.loads(lines[-1])[2]
    for pid, out in ranks:
        if kill_after is not None:
            os.kill(pid, signal.SIGKILL)
        out.close()
        assert os.waitpid(pid, 0)[1] == (0 if kill_after is None else signal.SIGKILL)
    return state

run(3, run(2, (0, 0), 4), None)
"""


def test_processes_killed_in_the_middle_lose_and_repeat_nothing(datasets):
    """Two processes are killed after a few steps; three go on from the last step that both had finished."""
    path = datasets["many small row groups"]
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, path], stdout=subprocess.PIPE, text=True, timeout=300, check=True
    )
    steps = [json.loads(line) for line in ran.stdout.splitlines()]
    found = [(epoch, *sample) for epoch, samples, _ in steps for sample in samples]
    (whole,) = loaders(path, RankingSampler(6, 2), {"batch_rows": 11}, world_size=1, state=LoaderState())
    assert Counter(found) == Counter(consumed(whole))
