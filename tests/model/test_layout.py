import torch

from ultrarec.model.layout import Layout

# Sample 0: history 10 11, target 12. Sample 1: nothing. Sample 2: targets 13 14. Sample 3: history 15.
SHAPES = [(3, 1), (0, 0), (2, 2), (1, 0)]


def lay_out(random_sample, collate, num_contextual):
    batch = collate([random_sample(length, targets, seed) for seed, (length, targets) in enumerate(SHAPES)])
    return batch, Layout.of(batch, num_contextual=num_contextual)


def test_sequences_hold_context_then_events(random_sample, collate):
    _, layout = lay_out(random_sample, collate, 2)
    context = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    events = torch.arange(10, 16)
    assert layout.join(context, events).tolist() == [0, 1, 10, 11, 12, 2, 3, 4, 5, 13, 14, 6, 7, 15]
    assert layout.offsets.tolist() == [0, 5, 7, 11, 14]
    assert layout.rows(torch.arange(6)).tolist() == [2, 3, 4, 9, 10, 13]


def test_sequences_without_context_are_the_events(random_sample, collate):
    batch, layout = lay_out(random_sample, collate, 0)
    events = torch.arange(10, 16)
    assert layout.join(torch.empty(4, 0), events).tolist() == events.tolist()
    assert layout.offsets.tolist() == batch.offsets.tolist() == [0, 3, 3, 5, 6]
    assert layout.rows(torch.arange(6)).tolist() == list(range(6))
    assert torch.equal(layout.join_times(batch.timestamps), batch.timestamps)


def test_targets_are_the_trailing_events(random_sample, collate):
    _, layout = lay_out(random_sample, collate, 2)
    assert layout.is_target.tolist() == [False, False, True, True, True, False]
    assert layout.target_events(3).tolist() == [2, 3, 4]
    assert layout.num_history.tolist() == [2, 0, 0, 1]
    assert layout.index_of_event.tolist() == [0, 1, 2, 0, 1, 0]


def test_context_is_as_old_as_the_first_event_of_its_sample(random_sample, collate):
    batch, layout = lay_out(random_sample, collate, 2)
    times = layout.join_times(batch.timestamps)
    t = batch.timestamps.tolist()
    assert times[:5].tolist() == [t[0], t[0], t[0], t[1], t[2]]
    assert times[5:7].tolist() == [0, 0]
    assert times[7:].tolist() == [t[3], t[3], t[3], t[4], t[5], t[5], t[5]]


def test_a_batch_without_events_is_context_alone(random_sample, collate):
    batch = collate([random_sample(0, 0, 0)])
    layout = Layout.of(batch, num_contextual=2)
    assert layout.join(torch.tensor([[8, 9]]), torch.empty(0, dtype=torch.int64)).tolist() == [8, 9]
    assert layout.target_events(0).tolist() == []
    assert layout.join_times(batch.timestamps).tolist() == [0, 0]
