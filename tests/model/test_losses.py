import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from ultrarec.model import losses, similarity
from ultrarec.model.losses import (
    full_softmax,
    multi_task_loss,
    normalize,
    per_position_softmax,
    per_sample_softmax,
    sampled_bce,
    sampled_softmax,
)

M, C, D = 37, 11, 6


def vectors(count, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, D, generator=generator, dtype=dtype)).requires_grad_()


def labels(seed=0):
    return torch.randint(0, C + 1, (M,), generator=torch.Generator().manual_seed(seed))


def assert_same_gradients(got, expected, inputs):
    got_gradients = torch.autograd.grad(got, inputs.values())
    expected_gradients = torch.autograd.grad(expected, inputs.values())
    for name, got_gradient, expected_gradient in zip(inputs, got_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got_gradient, expected_gradient, rtol=1e-10, atol=1e-10, msg=f"gradient of {name}")


@pytest.fixture(params=[1, 3 * C, 2**20], ids=["one row", "three rows", "all rows"])
def chunk(request, monkeypatch):
    """The result may not depend on how many rows' logits exist at once."""
    monkeypatch.setitem(losses.LOGITS_PER_CHUNK, "cpu", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_full_softmax_is_cross_entropy_over_the_catalogue(temperature):
    users, catalogue, label = vectors(M, 1), vectors(C, 2), labels()
    logits = users @ catalogue.T / temperature
    expected = F.cross_entropy(logits[label > 0], label[label > 0] - 1, reduction="sum")
    got = full_softmax(users, catalogue, label, temperature=temperature)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert_same_gradients(3 * got, 3 * expected, {"users": users, "catalogue": catalogue})


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_sampled_softmax_is_cross_entropy_over_positive_and_other_candidates(temperature):
    users, positives, candidates, label = vectors(M, 1), vectors(M, 2), vectors(C, 3), labels()
    candidate_ids = torch.tensor([3, 5, 5, 20, 21, 22, 23, 1, 9, 10, 3])
    expected = users.new_zeros(())
    for m in range(M):
        if label[m] == 0:
            continue
        others = [candidates[c] for c in range(C) if candidate_ids[c] != label[m]]
        logits = torch.stack([positives[m], *others]) @ users[m] / temperature
        expected = expected + logits.logsumexp(0) - logits[0]
    got = sampled_softmax(
        users, positives, candidates, labels_M=label, candidate_ids_C=candidate_ids, temperature=temperature
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert_same_gradients(got, expected, {"users": users, "positives": positives, "candidates": candidates})


@pytest.mark.usefixtures("chunk")
def test_with_candidates_of_its_own_each_sample_is_a_sampled_softmax():
    users, positives, label = vectors(M, 1), vectors(M, 2), labels()
    bounds = [0, 0, 1, 20, 20, M]
    candidates = vectors(5 * C, 3)
    ids = torch.randint(1, C + 1, (5, C), generator=torch.Generator().manual_seed(4))
    expected = users.new_zeros(())
    for sample, (begin, end) in enumerate(itertools.pairwise(bounds)):
        for m in range(begin, end):
            if label[m] == 0:
                continue
            others = [candidates[sample * C + c] for c in range(C) if ids[sample, c] != label[m]]
            logits = torch.stack([positives[m], *others]) @ users[m] / 0.2
            expected = expected + logits.logsumexp(0) - logits[0]
    got = per_sample_softmax(
        users,
        positives,
        candidates.unflatten(0, (5, C)),
        offsets=torch.tensor(bounds),
        labels_M=label,
        candidate_ids_BC=ids,
        temperature=0.2,
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert_same_gradients(got, expected, {"users": users, "positives": positives, "candidates": candidates})


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("by", ["dot", "mlp"])
@pytest.mark.parametrize("is_corrected", [False, True], ids=["uniform", "corrected"])
def test_with_candidates_of_its_own_each_position_is_a_sampled_softmax(is_corrected, by):
    torch.manual_seed(5)
    mlp = similarity.MLP(width=D, hidden=4, temperature=0.2).double() if by == "mlp" else None
    users, positives, candidates, label = vectors(M, 1), vectors(M, 2), vectors(C, 3), labels()
    ids = torch.tensor([3, 5, 5, 20, 21, 22, 23, 1, 9, 10, 3])
    places = torch.randint(0, C, (M, 7), generator=torch.Generator().manual_seed(4))
    counts = torch.linspace(0.1, 2, C, dtype=torch.float64) if is_corrected else None
    inputs = {"users": users, "positives": positives, "candidates": candidates}
    if mlp is not None:
        torch.nn.init.normal_(mlp.output.weight)
        inputs |= dict(mlp.named_parameters())

    def score(user, item):
        if mlp is None:
            return user @ item / 0.2
        hidden = (mlp.hidden.weight @ torch.cat([user, item]) + mlp.hidden.bias).relu()
        return ((mlp.product * user) @ item + mlp.output.weight[0] @ hidden) / 0.2

    expected = users.new_zeros(())
    for m in range(M):
        if label[m] == 0:
            continue
        total = (own := score(users[m], positives[m]).exp())
        for c in places[m].tolist():
            if ids[c] != label[m]:
                total = total + score(users[m], candidates[c]).exp() / (1 if counts is None else counts[c])
        expected = expected + (total / own).log()
    read = losses.DOT if mlp is None else mlp
    got = per_position_softmax(
        read.queries(users),
        read.items(positives),
        read.items(candidates),
        places_MP=places,
        labels_M=label,
        candidate_ids_C=ids,
        temperature=0.2,
        expected_counts_C=counts,
        similarity=read,
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert_same_gradients(3 * got, 3 * expected, inputs)


def test_candidates_of_positions_are_copied_in_chunks_and_none_is_a_loss_of_zero(monkeypatch):
    copied = []
    index = torch.Tensor.__getitem__

    def watched(self, places):
        out = index(self, places)
        copied.append(out.numel())
        return out

    users, candidates = vectors(M, 1), vectors(C, 3)
    given = {"candidate_ids_C": torch.arange(1, C + 1), "temperature": 0.1}
    places = torch.arange(5).expand(M, 5)
    monkeypatch.setitem(losses.LOGITS_PER_CHUNK, "cpu", 3 * 5 * D)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__getitem__", watched)
        per_position_softmax(users, vectors(M, 2), candidates, places_MP=places, labels_M=labels(), **given)
    assert 0 < max(copied) <= 3 * 5 * D
    none, places = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 5, dtype=torch.int64)
    users, positives = vectors(0, 1), vectors(0, 2)
    loss = per_position_softmax(users, positives, candidates, places_MP=places, labels_M=none, **given)
    loss.backward()
    assert loss == 0
    assert users.grad.shape == positives.grad.shape == (0, D)
    assert torch.equal(candidates.grad, torch.zeros(C, D, dtype=torch.float64))


@pytest.mark.usefixtures("chunk")
def test_a_corrected_candidate_counts_as_the_items_it_stands_for():
    users, positives, candidates, label = vectors(M, 1), vectors(M, 2), vectors(C, 3), labels()
    candidate_ids = torch.tensor([3, 5, 5, 20, 21, 22, 23, 1, 9, 10, 3])
    counts = torch.linspace(0.1, 2, C, dtype=torch.float64)
    counts[4] = torch.inf
    expected = users.new_zeros(())
    for m in range(M):
        if label[m] == 0:
            continue
        total = (own := (positives[m] @ users[m] / 0.2).exp())
        for c in range(C):
            if candidate_ids[c] != label[m]:
                total = total + (candidates[c] @ users[m] / 0.2).exp() / counts[c]
        expected = expected + (total / own).log()
    got = sampled_softmax(
        users,
        positives,
        candidates,
        labels_M=label,
        candidate_ids_C=candidate_ids,
        temperature=0.2,
        expected_counts_C=counts,
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert_same_gradients(got, expected, {"users": users, "positives": positives, "candidates": candidates})


@pytest.mark.usefixtures("chunk")
def test_sampled_bce_judges_each_positive_and_the_mean_of_other_candidates():
    users, positives, candidates, label = vectors(M, 1), vectors(M, 2), vectors(C, 3), labels()
    candidate_ids = torch.tensor([3, 5, 5, 20, 21, 22, 23, 1, 9, 10, 3])
    expected = users.new_zeros(())
    for m in range(M):
        if label[m] == 0:
            continue
        expected = expected - torch.sigmoid(positives[m] @ users[m] / 0.2).log()
        for c in range(C):
            if candidate_ids[c] != label[m]:
                expected = expected - (1 - torch.sigmoid(candidates[c] @ users[m] / 0.2)).log() / C
    got = sampled_bce(users, positives, candidates, labels_M=label, candidate_ids_C=candidate_ids, temperature=0.2)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=0)
    assert_same_gradients(got, expected, {"users": users, "positives": positives, "candidates": candidates})


def test_sampled_softmax_over_the_whole_catalogue_is_the_full_softmax():
    users, catalogue, label = vectors(M, 1), vectors(C, 2), labels()
    sampled = sampled_softmax(
        users,
        catalogue[(label - 1).clamp(min=0)],
        catalogue,
        labels_M=label,
        candidate_ids_C=torch.arange(1, C + 1),
        temperature=0.1,
    )
    full = full_softmax(users, catalogue, label, temperature=0.1)
    torch.testing.assert_close(sampled, full, rtol=1e-12, atol=0)
    assert_same_gradients(sampled, full, {"users": users, "catalogue": catalogue})


def test_softmax_of_tiny_temperature_stays_finite_in_float32():
    users, catalogue = vectors(M, 1, torch.float32), vectors(C, 2, torch.float32)
    loss = full_softmax(users, catalogue, labels(), temperature=1e-3)
    loss.backward()
    assert loss.isfinite()
    assert users.grad.isfinite().all()
    assert catalogue.grad.isfinite().all()


def test_softmax_without_labels_is_zero_with_a_gradient_for_every_input():
    users, positives, candidates = vectors(0, 1), vectors(0, 2), vectors(C, 3)
    none = torch.zeros(0, dtype=torch.int64)
    full = full_softmax(users, candidates, none, temperature=0.1)
    sampled = sampled_softmax(
        users, positives, candidates, labels_M=none, candidate_ids_C=torch.arange(C), temperature=0.1
    )
    bce = sampled_bce(users, positives, candidates, labels_M=none, candidate_ids_C=torch.arange(C), temperature=0.1)
    (full + sampled + bce).backward()
    assert full == sampled == bce == 0
    assert users.grad.shape == positives.grad.shape == (0, D)
    assert torch.equal(candidates.grad, torch.zeros(C, D, dtype=torch.float64))


def test_softmax_under_autocast_is_computed_in_float32():
    users, catalogue, label = vectors(M, 1, torch.float32), vectors(C, 2, torch.float32), labels()
    expected = full_softmax(users, catalogue, label, temperature=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = full_softmax(users, catalogue, label, temperature=0.05)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_softmax_holds_no_matrix_of_positions_and_items(monkeypatch):
    rows = []
    matmul = torch.Tensor.__matmul__

    def watched(self, other):
        out = matmul(self, other)
        rows.append(out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    monkeypatch.setitem(losses.LOGITS_PER_CHUNK, "cpu", 4 * C)
    full_softmax(vectors(M, 1), vectors(C, 2), labels(), temperature=1.0)
    assert max(rows) <= 4 * C


def test_multi_task_loss_is_the_mean_over_tasks_of_the_weighted_definitions():
    predictions = torch.tensor([[0.3, -2.0, 1.5], [40.0, 1.0, -0.5], [0.0, 0.0, 7.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.0, 0.25], [0.0, 1.0, 2.0], [1.0, 1.0, math.nan]], dtype=torch.float64)
    weights = [1.0, 0.2, 3.0]
    expected, gradient = 0.0, torch.zeros(3, 3, dtype=torch.float64)
    for m, (row, target) in enumerate(zip(predictions.tolist(), targets.tolist(), strict=True)):
        for k, (value, label, weight) in enumerate(zip(row, target, weights, strict=True)):
            if k < 2:
                p = 1 / (1 + math.exp(-value))
                expected -= weight / 3 * (math.log(p) if label else -value + math.log(p))
                gradient[m, k] = weight / 3 * (p - label)
            elif not math.isnan(label):
                expected += weight / 3 * (value - label) ** 2
                gradient[m, k] = weight / 3 * 2 * (value - label)
    predictions.requires_grad_()
    got = multi_task_loss(predictions, targets, torch.tensor(weights, dtype=torch.float64), num_binary=2)
    got.backward()
    assert got.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(predictions.grad, gradient, rtol=1e-12, atol=1e-12)


def test_normalize_divides_by_the_length_but_never_by_less_than_a_millionth():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-8, 4e-8]])
    torch.testing.assert_close(normalize(x), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.03, 0.04]]))
    assert normalize(x.bfloat16()).dtype == torch.float32
