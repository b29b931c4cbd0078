import pytest
import torch

from ultrarec.model.config import ModelConfig
from ultrarec.model.encoder import SequenceEncoder

E = 8
SETTINGS = {"width": E, "num_layers": 1, "position_encoding": "from_start", "tokens": "interleaved"}
# History and targets, targets alone, nothing, history alone.
SHAPES = [(6, 2), (2, 2), (0, 0), (3, 0)]


class Recorded(torch.nn.Module):
    """In place of a backbone: keeps what it is given."""

    def forward(self, x, sequences):
        self.x, self.sequences = x, sequences
        return x


@pytest.mark.parametrize("kind", ["from_start", "from_end"])
def test_interleaved_histories_alternate_content_and_action_and_targets_have_content_only(
    kind, features, actions, random_sample, collate, tables
):
    torch.manual_seed(0)
    encoder = SequenceEncoder(
        ModelConfig(**{**SETTINGS, "position_encoding": kind, "time_encoding": "sqrt"}),
        features=features,
        actions=actions,
        embedding_dim=E,
        max_history=5,
        max_targets=2,
        only_targets=True,
    ).double()
    assert encoder.position.vectors.num_embeddings == 2 + 2 * 5 + 2
    encoder.stack = Recorded()
    batch = collate([random_sample(length, targets, seed) for seed, (length, targets) in enumerate(SHAPES)])
    embeddings = tables(E).look_up(batch)
    encoded = encoder(batch, embeddings)
    layout, scale = encoded.layout, E**0.5
    content = encoder.content(batch, embeddings)
    action = encoder.action(batch, embeddings, layout.is_target)
    context = encoder.context(batch, embeddings)
    times = encoder.time.vectors(encoder.time.buckets(layout, batch.timestamps))
    expected, clocks, first_rows, last_rows = [], [], [], []
    for b, (length, num_targets) in enumerate(SHAPES):
        begin, history = sum(n for n, _ in SHAPES[:b]), length - num_targets
        rows = [scale * context[b, c] + encoder.position.vectors.weight[c] for c in range(2)]
        clock = [int(batch.timestamps[begin]) if length else 0] * 2
        for i in range(length):
            first_rows.append(len(expected) + len(rows))
            for second in range(2 if i < history else 1):
                number = min(2 * i + second, 2 * history)
                number = number if kind == "from_start" else 2 * history - number
                what = (action if second else content)[begin + i]
                rows.append(scale * what + encoder.position.vectors.weight[2 + number] + times[begin + i])
                clock.append(int(batch.timestamps[begin + i]))
            last_rows.append(len(expected) + len(rows) - 1)
        expected += rows
        clocks += clock
    torch.testing.assert_close(encoder.stack.x, torch.stack(expected), rtol=1e-12, atol=1e-12)
    sequences = encoder.stack.sequences
    assert sequences.offsets.tolist() == [0, 2 + 8 + 2, 16, 18, 18 + 2 + 6]
    assert sequences.timestamps.tolist() == clocks
    events = torch.arange(11)
    assert layout.rows(events).tolist() == first_rows
    assert layout.last_rows(events).tolist() == last_rows
