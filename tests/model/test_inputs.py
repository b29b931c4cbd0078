import pytest
import torch

from ultrarec.data.config import FeatureConfig
from ultrarec.model.config import ModelConfig
from ultrarec.model.inputs import ActionEncoder, ContentEncoder, ContextEncoder, FeatureTables

E = 6
SUM = ModelConfig(width=E, num_layers=1, qk_dim=2, value_dim=2)
MLP = ModelConfig(width=E, num_layers=1, qk_dim=2, value_dim=2, token_hidden=5)
CONFIGS = pytest.mark.parametrize("config", [SUM, MLP], ids=["sum", "mlp"])


@pytest.fixture
def batch(random_sample, collate):
    return collate([random_sample(4, 1, 0), random_sample(0, 0, 1), random_sample(3, 2, 2)])


def test_summed_content_is_item_plus_event_features(batch, features, tables):
    torch.manual_seed(0)
    encoder = ContentEncoder(SUM, features=features, embedding_dim=E).double()
    embeddings = tables(E).look_up(batch)
    tab, duration = (rows.weight for rows in encoder.tables.tables)
    expected = [
        embeddings["item"][t]
        + tab[batch.features["tab"][t]]
        + duration[batch.features["duration"][t]]
        + embeddings["author"][t]
        for t in range(7)
    ]
    torch.testing.assert_close(encoder(batch, embeddings), torch.stack(expected))


def test_summed_actions_are_the_rows_of_their_bits_plus_outcomes(batch, features):
    torch.manual_seed(0)
    encoder = ActionEncoder(SUM, features=features, num_actions=3, embedding_dim=E).double()
    (play_time,) = (rows.weight for rows in encoder.tables.tables)
    is_target = torch.tensor([False, False, False, True, False, True, True])
    got = encoder(batch, {}, is_target)
    for t, (actions, target) in enumerate(zip(batch.actions.tolist(), is_target.tolist(), strict=True)):
        expected = torch.zeros(E, dtype=torch.float64)
        if not target:
            expected = play_time[batch.features["play_time"][t]]
            for bit in range(3):
                if actions & 2**bit:
                    expected = expected + encoder.action_weight[bit]
        torch.testing.assert_close(got[t], expected)


def test_action_mlp_reads_the_rows_of_the_bits_side_by_side(batch):
    torch.manual_seed(0)
    encoder = ActionEncoder(MLP, features={}, num_actions=3, embedding_dim=E).double()
    got = encoder(batch, {}, torch.zeros(7, dtype=torch.bool))
    for t, actions in enumerate(batch.actions.tolist()):
        rows = [encoder.action_weight[bit] * (actions >> bit & 1) for bit in range(3)]
        torch.testing.assert_close(got[t], encoder.mlp(torch.cat(rows)))


@CONFIGS
def test_the_action_part_of_a_target_is_exactly_zero(config, batch, features):
    encoder = ActionEncoder(config, features=features, num_actions=3, embedding_dim=E)
    is_target = torch.tensor([False, False, False, True, False, True, True])
    got = encoder(batch, {}, is_target)
    assert not got[is_target].any()
    assert got[~is_target].abs().sum(dim=1).all()


def test_the_63rd_action_is_read(batch):
    encoder = ActionEncoder(SUM, features={}, num_actions=63, embedding_dim=E)
    batch.actions[:] = 2**62
    got = encoder(batch, {}, torch.zeros(7, dtype=torch.bool))
    torch.testing.assert_close(got, encoder.action_weight[62].expand(7, E))


@CONFIGS
def test_context_is_one_token_per_user_feature_in_declared_order(config, batch, features, tables):
    torch.manual_seed(0)
    encoder = ContextEncoder(config, features=features, embedding_dim=E).double()
    embeddings = tables(E).look_up(batch)
    (age,) = encoder.tables.tables
    expected = [embeddings["user_id"], age.weight[batch.features["age"]]]
    if config is MLP:
        expected = [project(rows) for project, rows in zip(encoder.projections, expected, strict=True)]
    torch.testing.assert_close(encoder(batch, embeddings), torch.stack(expected, dim=1))


def test_content_mlp_is_linear_swish_norm_linear_norm(batch, features, tables):
    torch.manual_seed(0)
    encoder = ContentEncoder(MLP, features=features, embedding_dim=E).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    embeddings = tables(E).look_up(batch)
    p = {name.removeprefix("mlp."): value for name, value in encoder.named_parameters()}
    rows = encoder.tables(batch.features, embeddings)

    def norm(x, weight, bias):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt() * weight + bias

    hidden = torch.cat([embeddings["item"], *rows], dim=1) @ p["0.weight"].T + p["0.bias"]
    hidden = hidden / (1 + (-norm(hidden, p["1.norm.weight"], p["1.norm.bias"])).exp())
    expected = norm(hidden @ p["2.weight"].T + p["2.bias"], p["3.weight"], p["3.bias"])
    torch.testing.assert_close(encoder(batch, embeddings), expected)


def test_feature_names_may_be_those_of_module_attributes():
    names = ["type", "items", "a.b", "float"]
    features = {name: FeatureConfig(kind="category", role="event", num_values=2) for name in names}
    rows = FeatureTables(features, 3)({name: torch.tensor([0, 2]) for name in names}, {})
    assert [tuple(row.shape) for row in rows] == [(2, 3)] * 4


def test_hashed_features_come_looked_up_and_keep_their_place():
    kinds = {"author": "hash", "tab": "category", "tag": "hash"}
    features = {name: FeatureConfig(kind=kind, role="event", num_values=2) for name, kind in kinds.items()}
    encoder = FeatureTables(features, 3)
    embeddings = {"tag": torch.randn(2, 3), "author": torch.randn(2, 3)}
    rows = encoder({"tab": torch.tensor([0, 2])}, embeddings)
    assert [name for name, _ in encoder.named_parameters()] == ["tables.0.weight"]
    for got, expected in zip(
        rows, [embeddings["author"], encoder.tables[0].weight[[0, 2]], embeddings["tag"]], strict=True
    ):
        assert torch.equal(got, expected)


def test_tables_and_actions_start_small_and_mlps_as_xavier(features):
    torch.manual_seed(0)
    wide = ModelConfig(width=64, num_layers=1, qk_dim=2, value_dim=2, token_hidden=48)
    many = {"tag": FeatureConfig(kind="category", role="event", num_values=500)}
    encoder = ContentEncoder(wide, features=many, embedding_dim=32)
    (tag,) = encoder.tables.tables
    assert tag.weight.shape == (501, 32)
    assert tag.weight.std().item() == pytest.approx(0.02, rel=0.05)
    bound = (6 / (64 + 48)) ** 0.5
    for layer in (encoder.mlp[0], encoder.mlp[2]):
        assert 0.98 * bound < layer.weight.abs().max().item() <= bound
        assert not layer.bias.any()
    actions = ActionEncoder(wide, features=features, num_actions=60, embedding_dim=32)
    assert actions.action_weight.shape == (60, 8)
    assert actions.action_weight.std().item() == pytest.approx(0.1, rel=0.1)
