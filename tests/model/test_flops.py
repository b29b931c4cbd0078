"""The formulas of cost against brute force, torch's counter and the published figures."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ultrarec.model.fuxi
import ultrarec.model.hstu
from ultrarec.kernels import AttentionMask, gated_output, hstu_attention, norm_uvqk
from ultrarec.model.backbones import BACKBONES, build_backbone
from ultrarec.model.config import ModelConfig, ObjectiveConfig
from ultrarec.model.flops import (
    Inputs,
    Sample,
    attention,
    backbone_flops,
    matmul,
    sample_flops,
    visible_pairs,
)
from ultrarec.model.recommender import build_model
from ultrarec.model.sequences import Limits, Sequences

MASKS = [
    {},
    {"window": 3},
    {"window": 3, "full_tail": 4},
    {"window": 2, "prefix": 5},
    {"window": 2, "prefix": 5, "full_tail": 3},
    {"window": 90, "full_tail": 2},
]


@pytest.mark.parametrize("local", MASKS)
@pytest.mark.parametrize("contextual", [0, 1, 3])
@pytest.mark.parametrize("sees_history", [False, True])
def test_pairs_are_those_that_the_mask_shows(local, contextual, sees_history):
    mask = AttentionMask(**local, num_contextual=contextual if sees_history else 0)
    for history in (0, 1, 4, 17):
        for targets in (0, 1, 3):
            sample = Sample(contextual=contextual, history=history, targets=targets)
            position = torch.arange(sample.tokens)
            end = torch.tensor(mask.history_end(sample.tokens, targets))
            expected = mask.visible(position[:, None], position[None], end).sum()
            assert visible_pairs(mask, sample) == expected, sample


def test_pairs_of_16k_events_follow_the_closed_forms():
    length, near, far = 16384, 256, 256
    sample = Sample(history=length)
    assert visible_pairs(AttentionMask(), sample) == length * (length + 1) // 2
    local = length * (near + 1) - near * (near + 1) // 2
    assert visible_pairs(AttentionMask(window=near), sample) == local
    semi_local = local + far * (length - near) - far * (far + 1) // 2
    for reading in ("full_tail", "prefix"):
        assert visible_pairs(AttentionMask(window=near, **{reading: far}), sample) == semi_local


def test_compute_of_hstu_at_3072_events_lies_a_tenth_below_what_is_published_and_the_wide_projection_above():
    """Table 2 of ULTRA-HSTU: 0.118 TFLOP inference and 0.085 training (mean length 1,110) for 6 layers of 512."""
    config = ModelConfig(width=512, num_layers=6, num_heads=4, qk_dim=128, value_dim=128)
    forward = backbone_flops(config, Sample(history=3072)).forward / 1e12
    train = 3 * backbone_flops(config, Sample(history=1110)).forward / 1e12
    # The projection of the table lies between that of norm(a) * u and that of [u, a, norm(a) * u].
    wide = backbone_flops(config.model_copy(update={"gating": "concat"}), Sample(history=3072)).forward / 1e12
    assert forward < 0.118 < wide
    assert forward == pytest.approx(0.106, abs=0.001)
    assert train == pytest.approx(0.075, abs=0.001)


SETTINGS = {
    "hstu": {"num_layers": 2},
    "concat": {"num_layers": 2, "gating": "concat", "activation": "u"},
    "no gate": {"num_layers": 1, "gating": "none"},
    "interleaved": {"num_layers": 1, "tokens": "interleaved", "tail": {"num_layers": 2, "num_events": 3}},
    "tail": {"num_layers": 1, "tail": {"num_layers": 2, "num_events": 5}},
    "mixture": {
        "num_layers": 1,
        "channels": {
            "short": {"actions": ["a"], "num_events": 4, "num_layers": 3},
            "long": {"actions": ["a", "b"], "num_events": 9},
        },
    },
    **{
        name: {"num_layers": 1 if name == "din" else 2, "backbone": name}
        for name in sorted(BACKBONES.keys() - {"hstu"})
    },
}
CONTEXTUAL, HISTORY, TARGETS = 2, 11, 3


@pytest.fixture
def every_pair(monkeypatch):
    """The reference implementations, which compute all pairs, and formulas that count them."""
    for module in (ultrarec.model.hstu, ultrarec.model.fuxi):
        for operator in (norm_uvqk, gated_output, hstu_attention):
            if hasattr(module, operator.__name__):
                monkeypatch.setattr(module, operator.__name__, functools.partial(operator, backend="reference"))
    monkeypatch.setattr("ultrarec.model.flops.visible_pairs", lambda mask, sample: sample.tokens**2)


@pytest.mark.usefixtures("every_pair")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_torch_counts_as_many_operations_as_the_formula_once_every_pair_is_computed(settings):
    config = ModelConfig(width=12, num_heads=2, qk_dim=4, value_dim=6, ffn_width=10, **settings)
    limits = Limits(
        num_contextual=CONTEXTUAL,
        max_history=HISTORY,
        max_targets=TARGETS,
        actions=("a", "b"),
        tokens_per_event=1 + (settings.get("tokens") == "interleaved"),
        context_sees_history=True,
    )
    sample = Sample(contextual=CONTEXTUAL, history=HISTORY, targets=TARGETS)
    backbone = build_backbone(config, limits)
    num_tokens = limits.max_seq_len
    times = torch.arange(num_tokens)
    seqs = Sequences(torch.tensor([0, num_tokens]), torch.tensor([TARGETS]), times, times, torch.ones_like(times))
    x = torch.randn(num_tokens, config.width, requires_grad=True)
    # Of its fused attention torch counts nothing on the CPU.
    with FlopCounterMode(display=False) as forward, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = backbone(x, seqs)
    formula = backbone_flops(config, sample)
    expected, backward_expected = formula.forward, formula.backward
    if config.backbone in ("din", "stca"):
        # Padded to the longest sequence, which holds the targets as well.
        extra = backbone_flops(config, Sample(history=sample.tokens, targets=TARGETS))
        shorter = backbone_flops(config, Sample(history=CONTEXTUAL + HISTORY, targets=TARGETS))
        expected += padded_pairs(config, extra, shorter).forward
        backward_expected += padded_pairs(config, extra, shorter).backward
    assert forward.get_total_flops() == expected
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    # The reference keeps its weights and need not multiply q and k again.
    again = scores_made_again(config, sample)
    assert backward.get_total_flops() == backward_expected - again


@pytest.mark.usefixtures("every_pair")
@pytest.mark.parametrize("tokens", ["merged", "interleaved"])
def test_torch_counts_as_many_operations_as_the_formula_of_the_events_that_channels_select(tokens):
    config = ModelConfig(
        width=12,
        num_heads=2,
        qk_dim=4,
        value_dim=6,
        tokens=tokens,
        num_layers=1,
        channels=SETTINGS["mixture"]["channels"],
    )
    # Bits of a and b, event by event: more than the budget of "short" (4), some of each, and none.
    histories = [[1, 1, 3, 1, 2, 1, 3], [2, 0, 2, 1], [0, 0], []]
    num_tokens = 1 + (tokens == "interleaved")
    actions, lengths = [], []
    for events in histories:
        sequence = [0] * CONTEXTUAL + [action for action in events for _ in range(num_tokens)] + [0] * TARGETS
        actions += sequence
        lengths.append(len(sequence))
    limits = Limits(
        num_contextual=CONTEXTUAL,
        max_history=HISTORY,
        max_targets=TARGETS,
        actions=("a", "b"),
        tokens_per_event=num_tokens,
        context_sees_history=True,
    )
    times = torch.arange(len(actions))
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    seqs = Sequences(offsets, torch.full((4,), TARGETS), times, times, torch.tensor(actions))
    with FlopCounterMode(display=False) as counter:
        build_backbone(config, limits)(torch.randn(len(actions), 12), seqs)
    sample = Sample(
        contextual=CONTEXTUAL,
        history=np.array([7, 4, 2, 0]),
        targets=np.full(4, TARGETS),
        chosen=(np.array([6, 1, 0, 0]), np.array([7, 3, 0, 0])),
    )
    assert counter.get_total_flops() == backbone_flops(config, sample).forward.sum()
    assert counter.get_total_flops() < backbone_flops(config, dataclasses.replace(sample, chosen=())).forward.sum()


def padded_pairs(config, extra, shorter):
    if config.backbone == "din":
        return extra + shorter * -1
    return attention(TARGETS * TARGETS, config) * config.num_layers


def scores_made_again(config, sample):
    if config.tokens == "interleaved":
        sample = Sample(contextual=CONTEXTUAL, history=2 * HISTORY, targets=TARGETS, tokens_per_event=2)
    if config.backbone == "din":
        return 0
    layers = [sample] * config.num_layers
    if config.tail is not None:
        layers += [sample.newest(config.tail.num_events)] * config.tail.num_layers
    if config.channels:
        layers = [sample.newest(4)] * 3 + [sample.newest(9)]
    pairs = sum(s.tokens**2 for s in layers)
    if config.backbone == "stca":
        pairs = config.num_layers * TARGETS * sample.tokens
    return 2 * pairs * config.num_heads * config.qk_dim


def test_rematerialising_costs_one_more_projection():
    settings = {"width": 12, "num_layers": 3, "num_heads": 2, "qk_dim": 4, "value_dim": 6}
    sample = Sample(history=50)
    plain = backbone_flops(ModelConfig(**settings), sample)
    again = backbone_flops(ModelConfig(**settings, rematerialize=True), sample)
    assert again.forward == plain.forward
    assert again.backward - plain.backward == 3 * matmul(50, 12, 2 * (4 + 4 + 6 + 6)).forward


@pytest.mark.usefixtures("every_pair")
@pytest.mark.parametrize("token_hidden", [None, 7])
@pytest.mark.parametrize("kind", ["ranking", "experts", "next_item"])
def test_torch_counts_as_many_operations_of_a_whole_model(
    kind, token_hidden, features, actions, random_sample, collate, tables
):
    ranking, width = kind != "next_item", 8
    config = ModelConfig(width=width, num_layers=2, num_heads=2, token_hidden=token_hidden)
    objective = ObjectiveConfig(
        kind="ranking" if ranking else kind,
        tasks=actions[:2] if ranking else (),
        head_hidden=5,
        num_experts=4 if kind == "experts" else 0,
    )
    embedding_dim = width if token_hidden is None else 6
    model = build_model(
        config,
        objective,
        features=features,
        actions=actions,
        embedding_dim=embedding_dim,
        max_history=HISTORY,
        max_targets=TARGETS if ranking else 0,
    )
    targets = TARGETS if ranking else 0
    one = random_sample(HISTORY + targets, targets, 0, next_item=not ranking)
    batch = collate([one], None if ranking else torch.arange(1, 31))
    embeddings = tables(embedding_dim, torch.float32).look_up(batch)
    with FlopCounterMode(display=False) as counter:
        model(batch, embeddings)[0].backward()
    sample = Sample(contextual=CONTEXTUAL, history=HISTORY, targets=targets)
    inputs = Inputs(
        embedding_dim=embedding_dim,
        num_actions=len(actions),
        num_event_features=3,
        num_outcomes=1,
        num_candidates=0 if ranking else 30,
    )
    expected = sample_flops(config, objective, sample, inputs).train - scores_made_again(config, sample)
    if not ranking:
        # The gradient of the candidates is added in place, which torch's counter does not know.
        expected -= 2 * HISTORY * 30 * embedding_dim
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)


def hidden_as_products(mlp, queries, items):
    """The scores with the hidden layer of all pairs as one tensor, which torch's counter then knows."""
    (queries, hidden_queries), (items, hidden_items) = mlp._parts(queries), mlp._parts(items)
    hidden = (hidden_queries[..., :, None, :] + hidden_items[..., None, :, :]).relu()
    return queries @ items.transpose(-1, -2) + (hidden.flatten(0, -2) @ mlp.output.weight.T).view(hidden.shape[:-1])


@pytest.mark.usefixtures("every_pair")
@pytest.mark.parametrize("loss", ["full_softmax", "sampled_softmax", "per_sample", "bce"])
def test_torch_counts_as_many_operations_of_similarity_by_a_network(
    loss, features, actions, random_sample, collate, tables, monkeypatch
):
    monkeypatch.setattr("ultrarec.model.similarity.MLP.scores", hidden_as_products)
    config = ModelConfig(width=8, num_layers=1, num_heads=2)
    objective = ObjectiveConfig(
        kind="next_item",
        loss="sampled_softmax" if loss == "per_sample" else loss,
        negatives_shared_by="sample" if loss == "per_sample" else "step",
        similarity="mlp",
        head_hidden=5,
    )
    arguments = {"actions": actions, "embedding_dim": 8, "max_history": HISTORY, "max_targets": 0}
    model = build_model(config, objective, features=features, **arguments)
    one = random_sample(HISTORY, 0, 0, next_item=True)
    batch = collate([one], torch.arange(1, 31), sampled=loss != "full_softmax", per_sample=loss == "per_sample")
    embeddings = tables(8, torch.float32).look_up(batch)
    with FlopCounterMode(display=False) as counter:
        model(batch, embeddings)[0].backward()
    sample = Sample(contextual=CONTEXTUAL, history=HISTORY)
    inputs = Inputs(embedding_dim=8, num_actions=len(actions), num_event_features=3, num_outcomes=1, num_candidates=30)
    expected = sample_flops(config, objective, sample, inputs).train - scores_made_again(config, sample)
    if loss != "per_sample":
        # The hidden vectors of the items that all samples of a step share.
        expected += matmul(30, 8, 5).train
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)
