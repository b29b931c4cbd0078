"""Similarity by a network against its equation, pair by pair, in every loss and in the ranking of the catalogue."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from model_variants import NEXT_ITEM_LOSSES, RESEARCH, E, causal, make
from torch.utils._python_dispatch import TorchDispatchMode

from ultrarec.model import similarity
from ultrarec.model.losses import normalize
from ultrarec.model.similarity import MLP

D, H, TEMPERATURE = 6, 5, 0.2
BY_MLP = {
    name: objective.model_copy(update={"similarity": "mlp", "head_hidden": H})
    for name, objective in NEXT_ITEM_LOSSES.items()
}
EVERY_LOSS = pytest.mark.parametrize("kind", BY_MLP)


def vectors(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, D, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


def network(dtype=torch.float64):
    torch.manual_seed(0)
    mlp = MLP(width=D, hidden=H, temperature=TEMPERATURE).to(dtype)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mlp


def score(mlp, user, item):
    """The equation for one user vector and one item vector, before the temperature."""
    hidden = F.relu(mlp.hidden.weight @ torch.cat([user, item]) + mlp.hidden.bias)
    return mlp.product @ (user * item) + mlp.output.weight[0] @ hidden


def scores_of(mlp, users, items):
    return mlp.scores(mlp.queries(users) / TEMPERATURE, mlp.items(items))


def assert_same_gradients(got, expected, inputs):
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(9), dtype=got.dtype)
    got_gradients = torch.autograd.grad(got, inputs.values(), upstream)
    expected_gradients = torch.autograd.grad(expected, inputs.values(), upstream)
    for name, a, b in zip(inputs, got_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"gradient of {name}: {m}")


@pytest.fixture(params=[1, 3 * 7, 2**20], ids=["one row", "three rows", "all rows"])
def chunk(request, monkeypatch):
    """The result may not depend on how many scores are made at once."""
    monkeypatch.setitem(similarity.LOGITS_PER_CHUNK, "cpu", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("batch", [(), (3,)], ids=["shared items", "items per sample"])
def test_scores_are_the_equation_of_every_pair_with_its_gradients(batch):
    mlp, users, items = network(), vectors(*batch, 10, seed=1), vectors(*batch, 7, seed=2)
    got = scores_of(mlp, users, items)
    flat_users, flat_items = users.view(-1, 10, D), items.view(-1, 7, D)
    rows = [
        score(mlp, user, item) / TEMPERATURE
        for some_users, some_items in zip(flat_users, flat_items, strict=True)
        for user in some_users
        for item in some_items
    ]
    expected = torch.stack(rows).view(got.shape)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(got, expected, {"users": users, "items": items, **dict(mlp.named_parameters())})


def test_a_pair_scores_what_its_place_among_all_pairs_does():
    mlp, users, items = network(), vectors(10, seed=1), vectors(10, seed=2)
    inputs = {"users": users, "items": items, **dict(mlp.named_parameters())}
    pairs = mlp.pairs(mlp.queries(users) / TEMPERATURE, mlp.items(items))
    expected = scores_of(mlp, users, items).diagonal()
    torch.testing.assert_close(pairs, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(pairs, expected, inputs)


def test_errors_in_float32_are_at_most_twice_those_of_plain_torch():
    results = {}
    for dtype in (torch.float64, torch.float32):
        mlp, users, items = network(dtype), vectors(300, seed=1, dtype=dtype), vectors(200, seed=2, dtype=dtype)
        inputs = [users, items, *mlp.parameters()]
        pairs = torch.cat(torch.broadcast_tensors(users[:, None], items[None]), dim=-1)
        products = (users[:, None] * items) @ mlp.product
        plain = (products + mlp.output(F.relu(mlp.hidden(pairs)))[..., 0]) / TEMPERATURE
        for name, got in (("plain", plain), ("ours", scores_of(mlp, users, items))):
            upstream = torch.linspace(-1, 1, got.numel(), dtype=dtype).view_as(got)
            results[name, dtype] = [got.detach(), *torch.autograd.grad(got, inputs, upstream)]
    exact, plain, ours = (
        results[key] for key in (("plain", torch.float64), ("plain", torch.float32), ("ours", torch.float32))
    )
    names = ("scores", "users", "items", "product", "weight", "bias", "output")
    for name, x, a, b in zip(names, exact, plain, ours, strict=True):
        error, bound = (b - x).abs().max(), 2 * (a - x).abs().max() + 1e-6
        assert error <= bound, f"{name}: error {error:.1e} > {bound:.1e}"


def test_training_starts_from_the_cosine():
    mlp, users, items = MLP(width=D, hidden=H, temperature=TEMPERATURE).double(), vectors(4, seed=1), vectors(5, seed=2)
    torch.testing.assert_close(scores_of(mlp, users, items), users @ items.T / TEMPERATURE)
    assert sum(parameter.numel() for parameter in mlp.parameters()) == D + 2 * D * H + 2 * H


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operator gives, and that ReLUs give."""

    numel = of_relu = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
            self.of_relu = max(self.of_relu, out.numel() if "relu" in str(func) else 0)
        return out


def test_ranking_holds_no_hidden_layer_of_all_pairs(monkeypatch):
    monkeypatch.setitem(similarity.LOGITS_PER_CHUNK, "cpu", 3 * 50)
    mlp, users, items = network(), vectors(40, seed=1), vectors(50, seed=2)
    with torch.no_grad(), Largest() as largest:
        scores = scores_of(mlp, users, items)
    assert largest.numel == scores.numel() == 40 * 50
    assert largest.of_relu == 3 * 50, "one unit of three users at a time"


def test_a_loss_holds_the_scores_of_a_chunk_only(monkeypatch, features, actions, walks, collate, tables):
    model, rows = make(causal(RESEARCH), BY_MLP["full"], features, actions), tables(E)
    model.requires_grad_(False)
    users, catalogue = vectors(100, seed=1)[:, [0, 1, 2, 3, 4, 5, 0, 1]], torch.arange(1, 31)
    batch = dataclasses.replace(collate(walks, catalogue), labels=torch.arange(100) % 31)
    monkeypatch.setitem(similarity.LOGITS_PER_CHUNK, "cpu", 60)
    with Largest() as largest:
        model.loss(users, batch, {"candidate": rows.item[catalogue]}).backward()
    assert largest.numel == 100 * (E + H), "the largest should be the queries, and not 100 x 30 scores"


def expected_loss(kind, scores_M, own_M, labels, candidates, popularity):
    """Of scores of the candidates and of the positive, by the definitions; `candidates` are ids, a list per label."""
    total = torch.zeros((), dtype=torch.float64)
    for scores, own, label, ids in zip(scores_M, own_M, labels, candidates, strict=True):
        others = [i for i, item in enumerate(ids) if item != label]
        if kind == "bce":
            total = total + F.softplus(-own) + F.softplus(scores[others]).sum() / len(ids)
            continue
        logits = scores[others]
        if kind == "in_batch":
            logits = logits - math.log(popularity)
        total = total + torch.cat([own[None], logits]).logsumexp(0) - own
    return total


@EVERY_LOSS
def test_every_loss_is_its_definition_over_these_scores_with_its_gradients(
    kind, features, actions, walks, collate, tables
):
    objective = BY_MLP[kind]
    model, rows = make(causal(RESEARCH), objective, features, actions), tables(E)
    ids = list(range(1, 31)) if kind == "full" else [3, 9, 1, 30, 3, 17, 22]
    batch = collate(walks, torch.tensor(ids), sampled=kind != "full", per_sample=kind == "per_sample")
    loss, outputs = model(batch, rows.look_up(batch))
    labels = batch.labels.tolist()
    # Every uniform negative is expected 1/30 of a time, and so is every label with shares of 1/30.
    drawn = [labels[k * len(labels) // 4] for k in range(4)] if kind == "in_batch" else []
    candidates = [ids + drawn] * len(labels)
    items = F.normalize(rows.item, dim=1)

    def row(user, wanted):
        return torch.stack([score(model.similarity, user, items[i]) for i in wanted]) / objective.temperature

    users = outputs.user_vectors
    scores_M = [row(user, wanted) for user, wanted in zip(users, candidates, strict=True)]
    own_M = [row(user, [label])[0] for user, label in zip(users, labels, strict=True)]
    expected = expected_loss(kind, scores_M, own_M, labels, candidates, popularity=(len(ids) + len(drawn)) / 30)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)  # shares of items are float32
    inputs = {"items": rows.item, **dict(model.named_parameters())}
    assert_same_gradients_of_losses(loss, expected, inputs)


def assert_same_gradients_of_losses(got, expected, inputs):
    got_gradients = torch.autograd.grad(got, inputs.values(), retain_graph=True)
    expected_gradients = torch.autograd.grad(expected, inputs.values())
    for name, a, b in zip(inputs, got_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"gradient of {name}: {m}")


@EVERY_LOSS
def test_evaluation_scores_as_training_does(kind, features, actions, walks, collate, tables):
    """Of the last position, the only one that is evaluated, the training loss follows from the scores of evaluation."""
    objective = BY_MLP[kind]
    model, rows = make(causal(RESEARCH), objective, features, actions), tables(E)
    walks = [walk for walk in walks if walk.length]
    ids = list(range(1, 31)) if kind == "full" else [3, 9, 1, 30, 3, 17, 22]
    batch = collate(walks, torch.tensor(ids), sampled=kind != "full", per_sample=kind == "per_sample")
    last = batch.offsets[1:] - 1
    labels = batch.labels.where(torch.isin(torch.arange(len(batch.labels)), last), 0)
    drawn = [int(labels[k * len(labels) // 4]) for k in range(4)] if kind == "in_batch" else []
    loss, _ = model(dataclasses.replace(batch, labels=labels), rows.look_up(batch))
    model.eval()
    asked = [dataclasses.replace(walk, labels=walk.labels[-1:]) for walk in walks]
    request = collate(asked)
    with torch.no_grad():
        _, outputs = model(request, rows.look_up(request))
        scores = model.score(outputs.user_vectors, model.item_vectors(rows.item))
    wanted = request.labels.tolist()
    candidates = [[item for item in ids + drawn if item] for _ in wanted]
    expected = expected_loss(
        kind,
        [row[some] for row, some in zip(scores, candidates, strict=True)],
        [row[label] for row, label in zip(scores, wanted, strict=True)],
        wanted,
        candidates,
        popularity=(len(ids) + 4) / 30,
    )
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-7, atol=0)


@EVERY_LOSS
def test_a_padding_batch_gives_every_parameter_a_gradient_of_zero(
    kind, features, actions, random_sample, collate, tables
):
    model, rows = make(causal(RESEARCH), BY_MLP[kind], features, actions), tables(E)
    nobody = dataclasses.replace(random_sample(0, 0, 0, next_item=True), user_id=0, age=0)
    batch = collate([nobody], torch.arange(1, 31), sampled=kind != "full", per_sample=kind == "per_sample")
    loss, _ = model(batch, rows.look_up(batch))
    loss.backward()
    assert loss == 0
    for name, parameter in [*model.named_parameters(), ("items", rows.item)]:
        assert parameter.grad is not None, f"{name} has no gradient"
        assert not parameter.grad.any(), f"{name} has a gradient of nothing"


def test_scores_under_autocast_are_those_of_float32():
    mlp = network(torch.float32)
    users, items = vectors(8, seed=1, dtype=torch.float32), vectors(8, seed=2, dtype=torch.float32)
    expected = scores_of(mlp, users, items).diagonal()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mlp.pairs(mlp.queries(users) / TEMPERATURE, mlp.items(items))
    torch.testing.assert_close(got, expected)
