import itertools

import pytest
import torch

from ultrarec.model.backbones import build_backbone
from ultrarec.model.config import ModelConfig
from ultrarec.model.mixture import Mixture
from ultrarec.model.sequences import Limits, Sequences

LENGTHS = [9, 0, 3, 12, 14]
TARGETS = [2, 0, 1, 0, 3]
LIMITS = Limits(
    num_contextual=2, max_history=12, max_targets=3, actions=("click", "like", "view"), context_sees_history=True
)
CHANNELS = {
    "engagement": {"actions": ["click", "like"], "num_events": 3, "num_layers": 2},
    "views": {"actions": ["view"], "num_events": 5},
}
SETTINGS = {"width": 6, "num_layers": 1, "num_heads": 2, "qk_dim": 3, "value_dim": 2, "channels": CHANNELS}


@pytest.fixture
def seqs():
    generator = torch.Generator().manual_seed(3)
    times = torch.arange(sum(LENGTHS))
    actions = torch.randint(0, 8, (sum(LENGTHS),), generator=generator)
    offsets = [0, *itertools.accumulate(LENGTHS)]
    for end, num_targets, begin in zip(offsets[1:], TARGETS, offsets, strict=False):
        actions[begin : min(begin + 2, end)] = 0
        actions[end - num_targets : end] = 0
    return Sequences(torch.tensor(offsets), torch.tensor(TARGETS), times, times, actions)


def read_by(mask, budget, begin, end, num_targets, actions):
    """The rows of one sequence that a channel reads, chosen one by one."""
    history = [i for i in range(begin + 2, end - num_targets) if int(actions[i]) & mask]
    return [*range(begin, min(begin + 2, end)), *history[-budget:], *range(max(begin + 2, end - num_targets), end)]


def test_each_channel_reads_its_newest_events_and_a_matrix_fuses_what_they_say_of_a_target(seqs):
    torch.manual_seed(0)
    mixture = build_backbone(ModelConfig(**SETTINGS), LIMITS).double()
    assert isinstance(mixture, Mixture)
    x = torch.randn(sum(LENGTHS), 6, dtype=torch.float64, requires_grad=True)
    expected = []
    for (begin, end), num_targets in zip(itertools.pairwise(seqs.offsets.tolist()), TARGETS, strict=True):
        said = []
        for channel, mask, budget in zip(mixture.channels, (0b011, 0b100), (3, 5), strict=True):
            rows = torch.tensor(read_by(mask, budget, begin, end, num_targets, seqs.actions), dtype=torch.int64)
            one = Sequences(
                torch.tensor([0, len(rows)]), torch.tensor([num_targets]), seqs.timestamps[rows], seqs.timestamps[rows]
            )
            said.append(channel.stack(x[rows], one))
        expected.append(torch.cat(said, dim=1) @ mixture.fuse.weight.T + mixture.fuse.bias)
    expected = torch.cat(expected)
    got = mixture(x, seqs)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    inputs, upstream = [x, *mixture.parameters()], torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_a_channel_has_its_own_depth_and_divides_its_attention_by_its_own_length():
    mixture = build_backbone(ModelConfig(**SETTINGS), LIMITS)
    assert [len(channel.stack.layers) for channel in mixture.channels] == [2, 1]
    assert [channel.stack.layers[0].max_seq_len for channel in mixture.channels] == [2 + 3 + 3, 2 + 5 + 3]


def test_a_channel_of_an_unknown_action_is_refused():
    config = ModelConfig(**{**SETTINGS, "channels": {"buys": {"actions": ["buy"], "num_events": 3}}})
    with pytest.raises(
        ValueError, match=r"model\.channels names \['buy'\], .* choose from \['click', 'like', 'view'\]"
    ):
        build_backbone(config, LIMITS)
