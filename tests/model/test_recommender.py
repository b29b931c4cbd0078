import dataclasses

import pytest
import torch
import torch.nn.functional as F
from model_variants import (
    BY_NAME,
    EVERY_BACKBONE,
    MAX_HISTORY,
    MAX_TARGETS,
    MIXTURE,
    NEXT_ITEM,
    NEXT_ITEM_LOSSES,
    PLAIN,
    RANKING,
    RESEARCH,
    VARIANTS,
    E,
    causal,
    make,
    ranks_only,
)

from ultrarec.model.config import ModelConfig, ObjectiveConfig, RegressionConfig
from ultrarec.model.recommender import NextItemModel, RankingModel, build_model


class Formula:
    """The whole model for one sample, written from the equations with dense matrices."""

    def __init__(self, model, settings, tables):
        self.p = dict(model.named_parameters())
        self.config = ModelConfig(**settings)
        self.tables = tables
        self.ranking = isinstance(model, RankingModel)
        self.N = 2 + MAX_HISTORY + (MAX_TARGETS if self.ranking else 0)

    def norm(self, x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        if f"{name}.weight" in self.p:
            x = x * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]
        return x

    def linear(self, x, name):
        x = x @ self.p[f"{name}.weight"].T
        return x + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else x

    def mlp(self, x, name):
        x = self.linear(x, f"{name}.0")
        x = x * torch.sigmoid(self.norm(x, f"{name}.1.norm"))
        return self.norm(self.linear(x, f"{name}.2"), f"{name}.3")

    def combine(self, parts, name):
        if self.config.token_hidden is None:
            return torch.stack(parts).sum(0)
        return self.mlp(torch.cat(parts, dim=1), f"{name}.mlp")

    def content(self, s):
        tab, duration = (self.p[f"encoder.content.tables.tables.{i}.weight"] for i in range(2))
        return self.combine(
            [self.tables.item[s.items], tab[s.tab], duration[s.duration], self.tables.author[s.author]],
            "encoder.content",
        )

    def action(self, s):
        bits = torch.stack([s.actions >> bit & 1 for bit in range(3)], dim=1).double()
        weight = self.p["encoder.action.action_weight"]
        if self.config.token_hidden is None:
            rows = bits @ weight
        else:
            rows = torch.cat([bits[:, bit, None] * weight[bit] for bit in range(3)], dim=1)
        play_time = self.p["encoder.action.tables.tables.0.weight"][s.play_time]
        action = self.combine([rows, play_time], "encoder.action")
        known = (torch.arange(s.length) < s.length - s.num_targets).double()
        return action * known[:, None]

    def context(self, s):
        rows = [self.tables.user_id[s.user_id], self.p["encoder.context.tables.tables.0.weight"][s.age]]
        if self.config.token_hidden is not None:
            rows = [self.linear(row, f"encoder.context.projections.{i}") for i, row in enumerate(rows)]
        return torch.stack(rows)

    def tokens(self, s):
        """The sequence as it enters the stack: two contextual tokens, then events."""
        events = self.content(s) + self.action(s)
        history = s.length - s.num_targets
        x = torch.cat([self.context(s), events]) * E**0.5
        index = torch.arange(s.length).clamp(max=history)
        if self.config.position_encoding == "from_end":
            index = history - index
        x = x + self.p["encoder.position.vectors.weight"][torch.cat([torch.arange(2), 2 + index])]
        if self.config.time_encoding == "sqrt" and s.length:
            request = s.timestamps[history] if s.num_targets else s.timestamps[-1]
            minutes = (request - s.timestamps).clamp(min=0).double() / 60
            added = self.p["encoder.time.vectors.weight"][minutes.sqrt().long().clamp(max=2048)]
            x = torch.cat([x[:2], x[2:] + added])
        return x

    def visible(self, s):
        n, history_end = 2 + s.length, 2 + s.length - s.num_targets
        i, j = torch.arange(n)[:, None], torch.arange(n)
        seen = (i == j) | ((j < i) & (j < history_end))
        return seen | ((i < 2) & (j < history_end)) if self.ranking else seen

    def layer(self, x, s, name):
        c = self.config
        uvqk = self.linear(self.norm(x, f"{name}.norm_input"), f"{name}.uvqk")
        u, v, q, k = uvqk.split([2 * 4, 2 * 4, 2 * 3, 2 * 3], dim=1)
        u = F.silu(u)
        if c.activation == "uvqk":
            v, q, k = F.silu(v), F.silu(q), F.silu(k)
        n = len(x)
        bias = x.new_zeros(n, n)
        if c.relative_bias == "position_time":
            i, j = torch.arange(n)[:, None], torch.arange(n)
            first = s.timestamps[:1].repeat(2) if s.length else torch.zeros(2, dtype=torch.int64)
            asked = s.query_timestamps[:1].repeat(2) if s.length else first
            elapsed = (torch.cat([asked, s.query_timestamps])[:, None] - torch.cat([first, s.timestamps])).abs()
            bucket = (elapsed.clamp(min=1).double().log() / 0.301).long().clamp(max=128)
            bias = (
                self.p[f"{name}.bias.position_weight"][i - j + self.N - 1] + self.p[f"{name}.bias.time_weight"][bucket]
            )
        alpha = 1.0 if c.attention_alpha == "one" else 3**-0.5
        q, k, v = (part.unflatten(1, (2, -1)).transpose(0, 1) for part in (q, k, v))
        weights = F.silu(alpha * q @ k.transpose(1, 2) + bias) * self.visible(s) / self.N
        a = (weights @ v).transpose(0, 1).flatten(1)
        gated = u * self.norm(a, f"{name}.norm_attention.norm")
        return x + self.linear(torch.cat([u, a, gated], dim=1) if c.gating == "concat" else gated, f"{name}.output")

    def encode(self, s):
        x = self.tokens(s)
        for i in range(self.config.num_layers):
            x = self.layer(x, s, f"encoder.stack.layers.{i}")
        return x

    def rank(self, s):
        """Logits of the sample's targets."""
        targets = slice(s.length - s.num_targets, s.length)
        user = self.norm(self.encode(s)[2:][targets], "head.norm")
        hidden = self.linear(user * self.mlp(self.content(s)[targets], "head.item"), "head.predict.0")
        hidden = hidden * torch.sigmoid(self.norm(hidden, "head.predict.1.norm"))
        return self.linear(hidden, "head.predict.2")

    def user_vectors(self, s):
        """Of every position, contextual tokens included."""
        x = self.encode(s)
        x = self.linear(x, "head.project") if "head.project.weight" in self.p else x
        return x / x.norm(dim=1, keepdim=True)


def assert_same_gradients(got, expected, inputs, tolerance=1e-9):
    got_gradients = torch.autograd.grad(got, inputs.values(), retain_graph=True)
    expected_gradients = torch.autograd.grad(expected, inputs.values(), allow_unused=True)
    for name, a, b in zip(inputs, got_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=tolerance, msg=lambda m, name=name: f"gradient of {name}: {m}")


def all_inputs(model, tables):
    return {**vars(tables), **dict(model.named_parameters())}


@VARIANTS
def test_ranking_is_the_formula_with_its_gradients(settings, features, actions, samples, collate, tables):
    model, rows = make(settings, RANKING, features, actions), tables(E)
    batch = collate(samples)
    loss, outputs = model(batch, rows.look_up(batch))
    formula = Formula(model, settings, rows)
    logits = torch.cat([formula.rank(sample) for sample in samples])
    labels = torch.stack([batch.labels >> 2 & 1, batch.labels & 1], dim=1).double()
    expected = torch.zeros((), dtype=torch.float64)
    for row, label in zip(logits, labels, strict=True):
        for task, weight in enumerate(RANKING.task_weights):
            p = torch.sigmoid(row[task])
            expected = expected - weight / 2 * (p if label[task] else 1 - p).log()
    torch.testing.assert_close(outputs.logits, logits, rtol=1e-9, atol=1e-9)
    assert torch.equal(outputs.labels, labels)
    assert outputs.users.tolist() == batch.users.tolist()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    assert_same_gradients(loss, expected, all_inputs(model, rows))


def test_numbers_are_predicted_beside_actions_and_a_missing_one_costs_nothing(
    features, actions, samples, collate, tables
):
    regressions = {"watched": RegressionConfig(weight=0.25), "tab": RegressionConfig(scale="linear")}
    objective = RANKING.model_copy(update={"regressions": regressions, "num_experts": 2})
    model, rows = make(RESEARCH, objective, features, actions), tables(E)
    batch = collate(samples)
    number = len(batch.labels)
    watched = torch.arange(number).float().exp()
    watched[1], watched[3] = torch.nan, -1.0
    batch.numbers = {"watched": watched, "tab": torch.arange(number) / 2}
    loss, outputs = model(batch, rows.look_up(batch))
    assert outputs.logits.shape == outputs.labels.shape == (number, 4)
    expected = torch.zeros((), dtype=torch.float64)
    for m, row in enumerate(outputs.logits):
        for task, (bit, weight) in enumerate([(2, 1.0), (0, 0.5)]):
            p = torch.sigmoid(row[task])
            expected = expected - weight / 4 * (p if batch.labels[m] >> bit & 1 else 1 - p).log()
        if m not in (1, 3):
            expected = expected + 0.25 / 4 * (row[2] - (1 + watched[m].double()).log()) ** 2
        expected = expected + (row[3] - m / 2) ** 2 / 4
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # labels are float32
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@VARIANTS
@pytest.mark.parametrize("sampled", [False, True], ids=["full", "sampled"])
@pytest.mark.parametrize("embedding_dim", [E, 5], ids=["one width", "two widths"])
def test_next_item_is_the_formula_with_its_gradients(
    settings, sampled, embedding_dim, features, actions, walks, collate, tables
):
    settings = causal(settings)
    if embedding_dim != E:
        settings["token_hidden"] = 7
    model, rows = make(settings, NEXT_ITEM, features, actions, embedding_dim=embedding_dim), tables(embedding_dim)
    candidates = torch.tensor([3, 9, 1, 30, 3, 17, 22]) if sampled else torch.arange(1, 31)
    batch = collate(walks, candidates, sampled=sampled)
    loss, outputs = model(batch, rows.look_up(batch))
    formula = Formula(model, settings, rows)
    vectors = torch.cat([formula.user_vectors(sample)[2:] for sample in walks])
    expected = torch.zeros((), dtype=torch.float64)
    for vector, label in zip(vectors, batch.labels.tolist(), strict=True):
        ids = torch.tensor([label, *(c for c in candidates.tolist() if c != label)])
        logits = vector @ F.normalize(rows.item[ids], dim=1).T / NEXT_ITEM.temperature
        expected = expected + logits.logsumexp(0) - logits[0]
    torch.testing.assert_close(outputs.user_vectors, vectors, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    assert_same_gradients(loss, expected, all_inputs(model, rows))


@pytest.mark.parametrize("by", ["step", "position"])
def test_labels_of_the_step_join_the_negatives_corrected_by_their_popularity(by, actions, walks, collate, tables):
    torch.manual_seed(0)
    objective = ObjectiveConfig(
        kind="next_item",
        loss="sampled_softmax",
        temperature=0.5,
        num_in_batch=6,
        num_negatives=3 if by == "step" else 2,
        negatives_shared_by=by,
    )
    popularity = torch.rand(31, dtype=torch.float64)
    popularity = popularity.index_fill(0, torch.tensor([0]), 0) / popularity[1:].sum()
    model = build_model(
        ModelConfig(**PLAIN),
        objective,
        features={},
        actions=actions,
        embedding_dim=E,
        max_history=MAX_HISTORY,
        max_targets=0,
        popularity=popularity,
    ).double()
    rows, uniform = tables(E), torch.tensor([3, 9, 17])
    batch = collate(walks, uniform, sampled=True)
    batch.labels[4] = 0  # the unknown item, which stands at one of the places that are drawn
    places = torch.arange(3).expand(len(batch.labels), 3)
    if by == "position":
        places = batch.negatives = torch.randint(0, 3, (len(batch.labels), 2))
    loss, outputs = model(batch, rows.look_up(batch))
    labels = batch.labels.tolist()
    drawn = [labels[k * len(labels) // 6] for k in range(6)]
    assert 0 in drawn
    items = F.normalize(rows.item, dim=1)
    positives = items[batch.ids["positive"].values()]
    expected = torch.zeros((), dtype=torch.float64)
    for vector, positive, label, row in zip(outputs.user_vectors, positives, labels, places, strict=True):
        if label == 0:
            continue
        total = (own := (vector @ positive / 0.5).exp())
        for item in [*uniform[row].tolist(), *drawn]:
            if item not in (label, 0):
                total = total + (vector @ items[item] / 0.5).exp() / (len(row) / 30 + 6 * popularity[item])
        expected = expected + (total / own).log()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


@VARIANTS
def test_next_item_evaluation_encodes_the_last_position_and_needs_no_candidates(
    settings, features, actions, walks, collate, tables
):
    model, rows = make(causal(settings), NEXT_ITEM, features, actions).eval(), tables(E)
    asked = [dataclasses.replace(walk, labels=torch.tensor([5])) for walk in walks]
    batch = collate(asked)
    loss, outputs = model(batch, rows.look_up(batch))
    formula = Formula(model, causal(settings), rows)
    expected = torch.stack([formula.user_vectors(sample)[-1] for sample in walks])
    assert loss == 0
    torch.testing.assert_close(outputs.user_vectors, expected, rtol=1e-9, atol=1e-9)
    assert outputs.labels.tolist() == [5] * len(walks)
    scores = model.score(outputs.user_vectors, model.item_vectors(rows.item))
    cosines = F.cosine_similarity(expected[:, None], rows.item[None], dim=-1)
    torch.testing.assert_close(scores, cosines / NEXT_ITEM.temperature)


def test_next_item_evaluation_of_a_user_with_nothing_to_encode_is_a_zero_vector(actions, walks, collate, tables):
    model, rows = make(causal(RESEARCH), NEXT_ITEM, {}, actions).eval(), tables(E)
    asked = [dataclasses.replace(walk, labels=torch.tensor([5])) for walk in walks]
    batch = collate(asked)
    _, outputs = model(batch, rows.look_up(batch))
    lengths = outputs.user_vectors.norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([float(walk.length > 0) for walk in walks], dtype=torch.float64))


@EVERY_BACKBONE
@pytest.mark.parametrize("with_features", [True, False])
@pytest.mark.parametrize("kind", ["ranking", *NEXT_ITEM_LOSSES])
def test_a_padding_batch_gives_zero_loss_and_a_zero_gradient_to_every_parameter(
    settings, with_features, kind, features, actions, random_sample, collate, tables
):
    features = features if with_features else {}
    ranking = kind == "ranking" or ranks_only(settings)
    objective = RANKING if ranking else NEXT_ITEM_LOSSES[kind]
    model = make(settings if ranking else causal(settings), objective, features, actions)
    rows = tables(E)
    nobody = dataclasses.replace(random_sample(0, 0, 0, next_item=not ranking), user_id=0, age=0)
    batch = collate([nobody], None if ranking else torch.arange(1, 31), sampled=kind != "full")
    embeddings = rows.look_up(batch)
    if not with_features:
        del embeddings["author"], embeddings["user_id"]
    loss, outputs = model(batch, embeddings)
    loss.backward()
    assert loss == 0
    assert len(outputs.users) == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert not parameter.grad.any(), f"{name} has a gradient of nothing"
    # The tables' backward pass communicates, so every rank must reach it.
    assert rows.item.grad is not None
    assert not rows.item.grad.any()


def test_every_parameter_has_a_gradient_when_no_sample_has_history(features, actions, random_sample, collate, tables):
    model, rows = make(RESEARCH, RANKING, features, actions), tables(E)
    batch = collate([random_sample(1, 1, seed) for seed in range(5)])
    model(batch, rows.look_up(batch))[0].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@EVERY_BACKBONE
@pytest.mark.parametrize("kind", ["ranking", "next_item"])
def test_bf16_autocast_is_near_fp32(settings, kind, features, actions, samples, walks, collate, tables):
    ranking = kind == "ranking" or ranks_only(settings)
    settings = settings if ranking else causal(settings)
    model = make(settings, RANKING if ranking else NEXT_ITEM, features, actions, perturb=0.05).float()
    batch = collate(samples) if ranking else collate(walks, torch.arange(1, 31))
    results = {}
    for enabled in (False, True):
        rows = tables(E, torch.float32)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss, outputs = model(batch, rows.look_up(batch))
        loss.backward()
        assert loss.dtype == torch.float32
        predictions = outputs.logits if ranking else outputs.user_vectors
        assert predictions.dtype == torch.float32
        gradient = torch.cat([p.grad.flatten() for p in [*model.parameters(), rows.item]])
        results[enabled] = (loss.detach(), predictions.detach(), gradient)
    (loss, predictions, gradient), (half_loss, half_predictions, half_gradient) = results[False], results[True]
    assert not torch.equal(predictions, half_predictions)
    torch.testing.assert_close(half_loss, loss, rtol=0.02, atol=0)
    torch.testing.assert_close(half_predictions, predictions, rtol=0.05, atol=0.05)
    assert F.cosine_similarity(gradient, half_gradient, dim=0) > 0.99


@EVERY_BACKBONE
def test_the_same_seed_builds_the_same_model_and_repeats_its_loss(
    settings, features, actions, samples, collate, tables
):
    settings = {**settings, "dropout": 0.3}
    batch, rows = collate(samples), tables(E)
    losses = []
    for _ in range(2):
        model = make(settings, RANKING, features, actions, seed=3)
        losses.append(model(batch, rows.look_up(batch))[0].item())
    assert losses[0] == losses[1]
    other = make(settings, RANKING, features, actions, seed=4)
    assert other(batch, rows.look_up(batch))[0].item() != losses[0]


def test_dropout_acts_in_training_only(features, actions, samples, collate, tables):
    model, rows = make({**RESEARCH, "dropout": 0.3}, RANKING, features, actions), tables(E)
    batch = collate(samples)
    embeddings = rows.look_up(batch)
    assert not torch.equal(model(batch, embeddings)[1].logits, model(batch, embeddings)[1].logits)
    model.eval()
    assert torch.equal(model(batch, embeddings)[1].logits, model(batch, embeddings)[1].logits)


def test_interleaved_tokens_need_something_that_came_of_an_event():
    with pytest.raises(ValueError, match=r"model\.tokens='interleaved' gives what came .* use 'merged'"):
        make({**PLAIN, "tokens": "interleaved"}, NEXT_ITEM, {}, ())


def test_a_dataset_without_actions_trains_the_next_item(walks, collate, tables):
    model, rows = make(causal(RESEARCH), NEXT_ITEM, {}, ()), tables(E)
    assert isinstance(model, NextItemModel)
    assert not any("action" in name for name, _ in model.named_parameters())
    batch = collate(walks, torch.arange(1, 31))
    loss, _ = model(batch, rows.look_up(batch))
    assert loss > 0


@pytest.mark.parametrize(
    ("settings", "objective", "message"),
    [
        (
            RESEARCH,
            ObjectiveConfig(kind="ranking", tasks=("is_clik",)),
            r"objective\.tasks names 'is_clik', which is no action of the dataset; choose from "
            r"\['is_click', 'is_like', 'long_view'\], or prepare the log again with --action is_clik",
        ),
        (
            {**RESEARCH, "width": 16},
            RANKING,
            r"model\.width=16 differs from embeddings\.dim=8, .* make the two equal, or set model\.token_hidden",
        ),
        (
            {**RESEARCH, "position_encoding": "from_end"},
            NEXT_ITEM,
            r"model\.position_encoding='from_end' counts the events ahead .* use 'from_start'",
        ),
        (
            {**PLAIN, "channels": MIXTURE},
            NEXT_ITEM,
            r"model\.channels=\['engaged', 'watched'\] encode targets, .* remove them",
        ),
        (
            {**PLAIN, "tokens": "interleaved", "target_action": "learned"},
            NEXT_ITEM,
            r"model\.target_action='learned' is part of a target's token, .* use 'zero'",
        ),
        (BY_NAME["din"], NEXT_ITEM, r"model\.backbone='din' encodes targets, which .* choose another backbone"),
        (
            {**RESEARCH, "time_encoding": "sqrt"},
            NEXT_ITEM,
            r"model\.time_encoding='sqrt' measures from the newest event, .* use 'none'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, objective, message, features, actions):
    with pytest.raises(ValueError, match=message):
        make(settings, objective, features, actions)
