import math

import pytest
import torch

from ultrarec.model.layout import Layout
from ultrarec.model.positions import PositionEncoder, TimeEncoder

# History of 3 and 2 targets; history of 1; targets alone; nothing.
SHAPES = [(5, 2), (1, 0), (2, 2), (0, 0)]


@pytest.fixture
def batch(random_sample, collate):
    return collate([random_sample(length, targets, seed) for seed, (length, targets) in enumerate(SHAPES)])


@pytest.mark.parametrize(
    ("kind", "positions"),
    [("from_start", [2, 3, 4, 5, 5, 2, 2, 2]), ("from_end", [5, 4, 3, 2, 2, 3, 2, 2])],
)
def test_positions_follow_the_context_and_all_targets_share_one(kind, positions, batch):
    encoder = PositionEncoder(kind, max_seq_len=7, width=3)
    layout = Layout.of(batch, num_contextual=2)
    assert encoder.positions(layout).tolist() == positions
    assert torch.equal(encoder.context(layout), encoder.vectors.weight[:2])


@pytest.mark.parametrize("kind", ["sqrt", "log"])
@pytest.mark.parametrize("time_unit", [1.0, 0.001])
def test_time_buckets_count_from_the_first_target_or_the_newest_event(kind, time_unit, batch):
    encoder = TimeEncoder(kind, time_unit=time_unit, width=3)
    batch.timestamps *= round(1 / time_unit)
    buckets = encoder.buckets(Layout.of(batch, num_contextual=2), batch.timestamps).tolist()
    times = batch.timestamps.tolist()
    request = [times[3]] * 5 + [times[5]] + [times[6]] * 2
    for time, asked, bucket in zip(times, request, buckets, strict=True):
        minutes = max(0, asked - time) * time_unit / 60
        scaled = math.sqrt(minutes) if kind == "sqrt" else math.log(max(minutes, 1e-9))
        assert bucket == max(0, int(scaled))
    assert max(buckets) > 0


def test_the_oldest_events_share_the_last_time_bucket(batch):
    encoder = TimeEncoder("sqrt", time_unit=1.0, width=3)
    batch.timestamps[0] = 0
    assert encoder.buckets(Layout.of(batch, num_contextual=0), batch.timestamps)[0] == 2048


def test_vectors_start_as_published():
    torch.manual_seed(0)
    start = PositionEncoder("from_start", max_seq_len=300, width=50).vectors.weight
    assert start.shape == (300, 50)
    assert start.abs().max() <= 2 * 50**-0.5
    assert start.std().item() == pytest.approx(0.88 * 50**-0.5, rel=0.03)
    end = PositionEncoder("from_end", max_seq_len=300, width=50).vectors.weight
    time = TimeEncoder("sqrt", time_unit=1.0, width=50).vectors.weight
    for vectors, rows, buckets in ((end, 300, 300), (time, 2049, 2048)):
        assert vectors.shape == (rows, 50)
        assert 0.99 * buckets**-0.5 < vectors.abs().max().item() <= buckets**-0.5
