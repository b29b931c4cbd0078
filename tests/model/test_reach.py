"""What reaches what: no label, no later event and no other user reaches a prediction, in training as in evaluation."""

import dataclasses

import pytest
import torch
from model_variants import (
    BY_NAME,
    CAUSAL_BACKBONES,
    EVERY_BACKBONE,
    NEXT_ITEM,
    NEXT_ITEM_LOSSES,
    POSITIONS_SHARED_BY_TARGETS,
    RANKING,
    RESEARCH,
    E,
    causal,
    make,
)

from ultrarec.model.config import RegressionConfig

WATCHED = {"watched": RegressionConfig()}
OBJECTIVES = {
    "tasks": RANKING,
    "experts": RANKING.model_copy(update={"num_experts": 2}),
    "tasks and a number": RANKING.model_copy(update={"regressions": WATCHED}),
    "a number": RANKING.model_copy(update={"regressions": WATCHED, "tasks": (), "task_weights": ()}),
}


def with_numbers(batch):
    """The batch with what regressions predict of its targets."""
    batch.numbers = {"watched": torch.arange(len(batch.labels)).float()}
    return batch


@pytest.mark.parametrize(
    "settings",
    [{**RESEARCH, "relative_bias": "none"}, *(BY_NAME[name] for name in POSITIONS_SHARED_BY_TARGETS)],
    ids=["research", *POSITIONS_SHARED_BY_TARGETS],
)
def test_a_target_scores_alone_as_it_does_beside_others(settings, features, actions, samples, collate, tables):
    model, rows = make(settings, RANKING, features, actions), tables(E)
    together = samples[1]
    # The first target's time is the request's; another one alone would be another request.
    together.timestamps[-2:] = together.query_timestamps[-2:] = together.timestamps[-3]
    batch = collate([together])
    _, expected = model(batch, rows.look_up(batch))
    for target in range(3):
        keep = torch.tensor([0, 1, 2, 3 + target])
        fields = {
            name: value[keep] for name, value in vars(together).items() if torch.is_tensor(value) and len(value) == 6
        }
        alone = dataclasses.replace(together, **fields, num_targets=1, labels=together.labels[target : target + 1])
        batch = collate([alone])
        for mode in (model.train, model.eval):
            mode()
            _, got = model(batch, rows.look_up(batch))
            torch.testing.assert_close(got.logits[0], expected.logits[target], rtol=1e-12, atol=1e-12)


@EVERY_BACKBONE
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_the_first_target_is_scored_in_evaluation_as_in_training(
    settings, objective, features, actions, samples, collate, tables
):
    model, rows = make(settings, objective, features, actions), tables(E)
    batch = with_numbers(collate(samples))
    _, trained = model(batch, rows.look_up(batch))
    model.eval()
    first = 0
    for sample in samples:
        if not sample.num_targets:
            continue
        length = sample.length - sample.num_targets + 1
        fields = {name: value[:length] for name, value in vars(sample).items() if torch.is_tensor(value)}
        alone = dataclasses.replace(sample, **fields | {"labels": sample.labels[:1]}, num_targets=1)
        batch = with_numbers(collate([alone]))
        _, evaluated = model(batch, rows.look_up(batch))
        torch.testing.assert_close(evaluated.logits[0], trained.logits[first], rtol=1e-12, atol=1e-12)
        first += sample.num_targets


@CAUSAL_BACKBONES
@pytest.mark.parametrize("loss", NEXT_ITEM_LOSSES)
def test_a_position_is_encoded_in_training_as_in_evaluation(settings, loss, features, actions, walks, collate, tables):
    model, rows = make(causal(settings), NEXT_ITEM_LOSSES[loss], features, actions), tables(E)
    batch = collate(walks, torch.arange(1, 31), sampled=loss != "full", per_sample=loss == "per_sample")
    _, trained = model(batch, rows.look_up(batch))
    model.eval()
    batch = collate([dataclasses.replace(walk, labels=torch.tensor([5])) for walk in walks])
    _, evaluated = model(batch, rows.look_up(batch))
    lengths = torch.tensor([walk.length for walk in walks])
    last = lengths.cumsum(0)[lengths > 0] - 1
    torch.testing.assert_close(evaluated.user_vectors[lengths > 0], trained.user_vectors[last], rtol=1e-12, atol=1e-12)


@EVERY_BACKBONE
def test_nothing_of_a_target_reaches_another_prediction(settings, features, actions, samples, collate, tables):
    model, rows = make(settings, RANKING, features, actions), tables(E)
    batch = collate(samples)
    _, before = model(batch, rows.look_up(batch))
    # The last target of sample 1 is prediction 2 of all and event 9 of all.
    assert samples[1].num_targets == 3
    batch.ids.values()[9] += 1
    batch.features["tab"][9] = (batch.features["tab"][9] + 1) % 6
    batch.timestamps[9] += 10_000
    batch.query_timestamps[9] += 10_000
    _, after = model(batch, rows.look_up(batch))
    same = torch.arange(len(before.logits)) != 2
    assert torch.equal(after.logits[same], before.logits[same])
    assert not torch.equal(after.logits[2], before.logits[2])


@EVERY_BACKBONE
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_actions_outcomes_and_labels_of_targets_reach_no_prediction(
    settings, objective, features, actions, samples, collate, tables
):
    model, rows = make(settings, objective, features, actions), tables(E)
    batch = with_numbers(collate(samples))
    loss, before = model(batch, rows.look_up(batch))
    is_target = torch.cat([torch.arange(s.length) >= s.length - s.num_targets for s in samples])
    batch.actions[is_target] = 7
    batch.features["play_time"][is_target] = 3
    batch.labels[:] = 7 - batch.labels
    batch.numbers["watched"] += 3
    other_loss, after = model(batch, rows.look_up(batch))
    assert torch.equal(after.logits, before.logits)
    assert other_loss != loss


@CAUSAL_BACKBONES
@pytest.mark.parametrize("with_context", [True, False])
def test_no_position_sees_the_events_after_it(settings, with_context, features, actions, walks, collate, tables):
    features = features if with_context else {}
    model, rows = make(causal(settings), NEXT_ITEM, features, actions), tables(E)
    batch = collate(walks, torch.arange(1, 31))
    _, before = model(batch, rows.look_up(batch))
    # Events 8.. of sample 1, which are 12.. of all, change in everything; so does the time position 11 is asked for.
    later = slice(12, 16)
    batch.ids.values()[later] = (batch.ids.values()[later] + 1) % 31
    batch.actions[later] = 7 - batch.actions[later]
    batch.timestamps[later] += 5_000
    batch.query_timestamps[later] += 9_000
    for name in ("tab", "duration", "play_time"):
        batch.features[name][later] = (batch.features[name][later] + 1) % 6
    _, after = model(batch, rows.look_up(batch))
    changed = (after.user_vectors != before.user_vectors).any(dim=1).nonzero().flatten().tolist()
    assert changed == [12, 13, 14, 15]


@EVERY_BACKBONE
def test_a_users_data_changes_only_that_users_outputs(
    settings, features, actions, samples, random_sample, collate, tables
):
    model, rows = make(settings, RANKING, features, actions), tables(E)
    batch = collate(samples)
    _, before = model(batch, rows.look_up(batch))
    replaced = [*samples[:4], random_sample(13, 1, seed=99), samples[5]]
    batch = collate(replaced)
    _, after = model(batch, rows.look_up(batch))
    # How many rows a channel multiplies depends on everybody's actions, and rounding on how many rows there are.
    changed = ((after.logits - before.logits).abs() > 1e-13).any(dim=1).tolist()
    assert changed == (before.users == 4).tolist()


@EVERY_BACKBONE
def test_users_are_scored_together_as_they_are_alone(settings, features, actions, samples, collate, tables):
    model, rows = make(settings, RANKING, features, actions), tables(E)
    batch = collate(samples)
    _, together = model(batch, rows.look_up(batch))
    for user, sample in enumerate(samples):
        batch = collate([sample])
        _, alone = model(batch, rows.look_up(batch))
        torch.testing.assert_close(alone.logits, together.logits[together.users == user], rtol=1e-12, atol=1e-12)


def test_history_actions_are_read(features, actions, samples, collate, tables):
    model, rows = make(RESEARCH, RANKING, features, actions), tables(E)
    batch = collate(samples)
    _, before = model(batch, rows.look_up(batch))
    batch.actions[4] ^= 1  # the first event of sample 1
    _, after = model(batch, rows.look_up(batch))
    assert (after.logits != before.logits).any(dim=1).tolist() == (before.users == 1).tolist()
