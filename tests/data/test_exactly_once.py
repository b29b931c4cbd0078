"""Random schedules of kills and restarts on changing numbers of ranks: each sample of each epoch, once."""

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest
from orders import pairs_cost

from ultrarec.data.config import DataConfig
from ultrarec.data.loader import Loader, LoaderState, NextItemSampler, RankingSampler
from ultrarec.data.synthetic import random_histories, write_dataset

NUM_ITEMS, EPOCHS = 30, 2
WORLD_SIZES = (1, 2, 3, 4, 8)
SCHEDULES = 210
SIZES = ({"batch_rows": 17}, {"batch_rows": 6}, {"batch_tokens": 120}, {"batch_cost": 150.0})
SHAPES = {
    "many small row groups": {"num_users": 32, "mean_events": 5, "num_files": 3, "rows_per_group": 3},
    "fewer row groups than ranks": {"num_users": 24, "mean_events": 7, "num_files": 1, "rows_per_group": 12},
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
    return made


def loaders(path, sampler, size, *, world_size, state):
    config = DataConfig(path=path, shuffle_row_groups=3, **size)
    options = {"split": "train", "world_size": world_size, "epochs": EPOCHS, "state": state}
    return [Loader(config, sampler, rank=k, **options, cost_model=pairs_cost(0.05, 6)) for k in range(world_size)]


def consumed(step):
    return [(batch.epoch, *sample) for batch in step for sample in batch.samples.tolist()]


def run_schedule(choose, path, sampler, size):
    """Train to the end through random kills: (epoch, file, row, sample) of every finished step."""
    state, found = LoaderState(), []
    while state.epoch < EPOCHS:
        ranks = loaders(path, sampler, size, world_size=choose.choice(WORLD_SIZES), state=state)
        steps = list(islice(zip(*ranks, strict=True), choose.choice([0, 1, 2, 5, 9, None])))
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
        if sampler not in complete:
            (whole,) = loaders(datasets[shape], sampler, SIZES[0], world_size=1, state=LoaderState())
            complete[sampler] = Counter(consumed(whole))
            assert set(complete[sampler].values()) == {1}
        assert Counter(run_schedule(choose, datasets[shape], sampler, size)) == complete[sampler], (
            number,
            sampler,
            size,
        )


PROGRAM = """
import json, sys
from ultrarec.data.config import DataConfig
from ultrarec.data.loader import Loader, LoaderState, RankingSampler
path, rank, world_size, epoch, consumed = sys.argv[1], *map(int, sys.argv[2:])
loader = Loader(DataConfig(path=path, batch_rows=17, shuffle_row_groups=3), RankingSampler(6, 2), split="train",
    rank=rank, world_size=world_size, epochs=2, state=LoaderState(epoch, consumed))
for batch in loader:
    state = [batch.state.epoch, batch.state.consumed]
    print(json.dumps([batch.epoch, batch.samples.tolist(), state]), flush=True)
"""


def test_processes_killed_in_the_middle_lose_and_repeat_nothing(datasets):
    """Two processes are killed after a few steps; three go on from the last step that both had finished."""
    path = datasets["many small row groups"]
    first, state = run_processes(path, 2, (0, 0), kill_after=4)
    second, _ = run_processes(path, 3, state, kill_after=None)
    (whole,) = loaders(path, RankingSampler(6, 2), {"batch_rows": 17}, world_size=1, state=LoaderState())
    assert Counter(first + second) == Counter(consumed(whole))


def run_processes(path, world_size, state, *, kill_after):
    arguments = [[path, str(rank), str(world_size), *map(str, state)] for rank in range(world_size)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, *each], stdout=subprocess.PIPE, text=True)
        for each in arguments
    ]
    steps = list(islice(zip(*(rank.stdout for rank in ranks), strict=True), kill_after))
    for rank in ranks:
        if kill_after is not None:
            rank.send_signal(signal.SIGKILL)
        rank.stdout.close()
        assert rank.wait(timeout=60) == (0 if kill_after is None else -signal.SIGKILL)
    lines = [json.loads(line) for step in steps for line in step]
    return [(epoch, *sample) for epoch, samples, _ in lines for sample in samples], tuple(lines[-1][2])
