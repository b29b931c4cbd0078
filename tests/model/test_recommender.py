import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ultrarec.model.backbones import TARGET_ONLY
from ultrarec.model.config import ModelConfig, ObjectiveConfig
from ultrarec.model.recommender import NextItemModel, RankingModel, build_model

E = 8
MAX_HISTORY, MAX_TARGETS = 12, 3
RESEARCH = {
    "width": E,
    "num_layers": 2,
    "num_heads": 2,
    "qk_dim": 3,
    "value_dim": 4,
    "relative_bias": "position_time",
    "position_encoding": "from_start",
}
INDUSTRIAL = {
    **RESEARCH,
    "relative_bias": "none",
    "activation": "u",
    "gating": "concat",
    "norm_affine": True,
    "projection_bias": True,
    "attention_alpha": "rsqrt",
    "position_encoding": "from_end",
    "time_encoding": "sqrt",
    "token_hidden": 7,
}
RANKING = ObjectiveConfig(kind="ranking", tasks=("long_view", "is_click"), task_weights=(1.0, 0.5), head_hidden=5)
NEXT_ITEM = ObjectiveConfig(kind="next_item", temperature=0.1)
VARIANTS = pytest.mark.parametrize("settings", [RESEARCH, INDUSTRIAL], ids=["research", "industrial"])
PLAIN = {"width": E, "num_layers": 2, "num_heads": 2, "position_encoding": "from_start"}
ULTRA = {
    **INDUSTRIAL,
    "window": 2,
    "full_tail": 3,
    "tail": {"num_layers": 1, "num_events": 4},
    "target_action": "learned",
}
MIXTURE = {
    "engaged": {"actions": ["is_click", "is_like"], "num_events": 4, "num_layers": 1},
    "watched": {"actions": ["long_view"], "num_events": 8},
}
BY_NAME = {
    "research": RESEARCH,
    "industrial": INDUSTRIAL,
    "ultra": ULTRA,
    "softmax": {**RESEARCH, "attention": "softmax"},
    "no gate, rope": {**PLAIN, "gating": "none", "rope": True},
    "interleaved": {**RESEARCH, "tokens": "interleaved"},
    "interleaved ultra": {**ULTRA, "tokens": "interleaved", "target_action": "zero"},
    "sasrec": {**PLAIN, "backbone": "sasrec"},
    "llama": {**PLAIN, "backbone": "llama"},
    "fuxi_alpha": {**PLAIN, "backbone": "fuxi_alpha"},
    "din": {**PLAIN, "backbone": "din", "num_layers": 1},
    "stca": {**PLAIN, "backbone": "stca"},
    "mixture": {**ULTRA, "channels": MIXTURE},
}


def ranks_only(settings):
    """Whether the model encodes targets, and nothing where there are none."""
    return settings.get("backbone") in TARGET_ONLY or "channels" in settings


POSITIONS_SHARED_BY_TARGETS = (
    "industrial",
    "ultra",
    "interleaved ultra",
    "no gate, rope",
    "sasrec",
    "llama",
    "din",
    "stca",
    "mixture",
)
EVERY_BACKBONE = pytest.mark.parametrize("settings", BY_NAME.values(), ids=BY_NAME.keys())
CAUSAL_BACKBONES = pytest.mark.parametrize(
    "settings",
    [settings for settings in BY_NAME.values() if not ranks_only(settings)],
    ids=[name for name, settings in BY_NAME.items() if not ranks_only(settings)],
)

# History alone, a chunk of targets, a target without history, a user without anything, a long history.
SHAPES = [(4, 0), (6, 3), (1, 1), (0, 0), (13, 1), (3, 3)]


def causal(settings):
    """The same variant without what next_item refuses."""
    return {**settings, "position_encoding": "from_start", "time_encoding": "none"}


def make(settings, objective, features, actions, *, embedding_dim=E, seed=0, perturb=0.2):
    """A float64 model with no parameter at a value that hides it (scales of 1, biases of 0)."""
    torch.manual_seed(seed)
    model = build_model(
        ModelConfig(**settings),
        objective,
        features=features,
        actions=actions,
        embedding_dim=embedding_dim,
        max_history=MAX_HISTORY,
        max_targets=MAX_TARGETS if objective.kind == "ranking" else 0,
        popularity=torch.full((31,), 1 / 30) if objective.num_in_batch else None,
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(perturb * torch.randn_like(parameter))
    return model


@pytest.fixture
def samples(random_sample):
    return [random_sample(length, targets, seed) for seed, (length, targets) in enumerate(SHAPES)]


@pytest.fixture
def walks(random_sample):
    """Samples of next_item training."""
    return [random_sample(length, 0, seed, next_item=True) for seed, length in enumerate([4, 12, 1, 0, 7])]


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


def test_labels_of_the_step_join_the_negatives_corrected_by_their_popularity(actions, walks, collate, tables):
    torch.manual_seed(0)
    objective = ObjectiveConfig(kind="next_item", loss="sampled_softmax", temperature=0.5, num_in_batch=6)
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
    loss, outputs = model(batch, rows.look_up(batch))
    labels = batch.labels.tolist()
    drawn = [labels[k * len(labels) // 6] for k in range(6)]
    assert 0 in drawn
    items = F.normalize(rows.item, dim=1)
    positives = items[batch.ids["positive"].values()]
    expected = torch.zeros((), dtype=torch.float64)
    for vector, positive, label in zip(outputs.user_vectors, positives, labels, strict=True):
        if label == 0:
            continue
        total = (own := (vector @ positive / 0.5).exp())
        for item in [*uniform.tolist(), *drawn]:
            if item not in (label, 0):
                total = total + (vector @ items[item] / 0.5).exp() / (3 / 30 + 6 * popularity[item])
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


@CAUSAL_BACKBONES
def test_a_position_is_encoded_in_training_as_in_evaluation(settings, features, actions, walks, collate, tables):
    model, rows = make(causal(settings), NEXT_ITEM, features, actions), tables(E)
    batch = collate(walks, torch.arange(1, 31))
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
def test_actions_outcomes_and_labels_of_targets_reach_no_logit(settings, features, actions, samples, collate, tables):
    model, rows = make(settings, RANKING, features, actions), tables(E)
    batch = collate(samples)
    loss, before = model(batch, rows.look_up(batch))
    is_target = torch.cat([torch.arange(s.length) >= s.length - s.num_targets for s in samples])
    batch.actions[is_target] = 7
    batch.features["play_time"][is_target] = 3
    batch.labels[:] = 7 - batch.labels
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


@EVERY_BACKBONE
@pytest.mark.parametrize("with_features", [True, False])
@pytest.mark.parametrize("kind", ["ranking", "full", "sampled", "bce", "in_batch"])
def test_a_padding_batch_gives_zero_loss_and_a_zero_gradient_to_every_parameter(
    settings, with_features, kind, features, actions, random_sample, collate, tables
):
    features = features if with_features else {}
    ranking = kind == "ranking" or ranks_only(settings)
    losses = {"bce": {"loss": "bce"}, "in_batch": {"loss": "sampled_softmax", "num_in_batch": 4}}
    objective = RANKING if ranking else NEXT_ITEM.model_copy(update=losses.get(kind, {}))
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
