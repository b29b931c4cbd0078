"""The sequence encoder: a batch and its embeddings to one encoded vector per token."""

# T = events of all samples, B = samples, C = contextual tokens per sample, S = T + B * C tokens of all sequences,
# M = targets of all samples, E = model width

from dataclasses import dataclass

from torch import Tensor, nn

from ..data.batch import Batch
from ..kernels import position_time_encoding
from .backbones import build_backbone
from .config import ModelConfig
from .inputs import ActionEncoder, ContentEncoder, ContextEncoder, Features, features_of
from .layout import Layout
from .positions import PositionEncoder, TimeEncoder
from .sequences import Limits, Sequences


@dataclass(frozen=True, slots=True)
class Encoded:
    """A batch after the stack."""

    tokens: Tensor
    """[S, E], or, of an encoder of targets, [M, E]."""
    content: Tensor
    """[T, E], what each event shows, as it was before position, time and stack."""
    layout: Layout

    def last_tokens(self, count: int) -> Tensor:
        """The last token of each of the first `count` samples, [count, E]; zeros where a sample has none."""
        ends = self.layout.offsets[1 : count + 1]
        is_empty = self.layout.offsets[:count] == ends
        return self.tokens[(ends - 1).clamp(min=0)].masked_fill(is_empty[:, None], 0)


class SequenceEncoder(nn.Module):
    """Token encoders, position and time, dropout, and the backbone.

    With `only_targets`, for models that predict nothing else, it gives their tokens, and contextual tokens attend to
    the whole history (the paper's mask). Where every position predicts, the history ahead would reach it through them,
    so there they are the first tokens of a causal sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        features: Features,
        actions: tuple[str, ...],
        embedding_dim: int,
        max_history: int,
        max_targets: int,
        only_targets: bool,
    ) -> None:
        super().__init__()
        self.interleaved = config.tokens == "interleaved"
        limits = Limits(
            num_contextual=len(features_of(features, "user")),
            max_history=max_history,
            max_targets=max_targets,
            tokens_per_event=2 if self.interleaved else 1,
            actions=actions,
            context_sees_history=only_targets,
            only_targets=only_targets,
        )
        self.only_targets = only_targets
        self.num_contextual = limits.num_contextual
        self.width = config.width
        self.content = ContentEncoder(config, features=features, embedding_dim=embedding_dim)
        self.action: ActionEncoder | None = None
        if actions or features_of(features, "outcome"):
            self.action = ActionEncoder(
                config, features=features, num_actions=len(actions), embedding_dim=embedding_dim
            )
        self.context: ContextEncoder | None = None
        if limits.num_contextual:
            self.context = ContextEncoder(config, features=features, embedding_dim=embedding_dim)
        # Both published variants scale tokens so, but only where a position is added to them.
        self.scale = 1.0 if config.position_encoding == "none" else config.width**0.5
        self.position: PositionEncoder | None = None
        if config.position_encoding != "none":
            self.position = PositionEncoder(
                config.position_encoding, max_seq_len=limits.max_seq_len, width=config.width
            )
        self.time: TimeEncoder | None = None
        if config.time_encoding != "none":
            self.time = TimeEncoder(config.time_encoding, time_unit=config.time_unit, width=config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.stack = build_backbone(config, limits)
        self.reads_actions = bool(config.channels)

    def forward(self, batch: Batch, embeddings: dict[str, Tensor]) -> Encoded:
        """Encode a batch; `embeddings`: "item" [T, D], and for each `hash` feature [T, D] or, of users, [B, D]."""
        layout = Layout.of(batch, num_contextual=self.num_contextual, interleaved=self.interleaved)
        content_TE = self.content(batch, embeddings)
        context_BCE = self.context_tokens(batch, embeddings, layout)
        if self.interleaved:
            x_SE = layout.join(context_BCE, *self.two_tokens(batch, embeddings, layout, content_TE))
        else:
            x_SE = layout.join(context_BCE, self.event_tokens(batch, embeddings, layout, content_TE))
        sequences = Sequences(
            offsets=layout.offsets,
            num_targets=layout.num_targets,
            timestamps=layout.join_times(batch.timestamps),
            query_timestamps=layout.join_times(batch.query_timestamps),
            actions=self.actions(batch, layout) if self.reads_actions else None,
            total_targets=batch.labels.numel() if self.only_targets else None,
        )
        return Encoded(tokens=self.stack(self.dropout(x_SE), sequences), content=content_TE, layout=layout)

    def actions(self, batch: Batch, layout: Layout) -> Tensor:
        """Bitmasks of all tokens, [S]; contextual tokens have none."""
        none = batch.actions.new_zeros(batch.num_targets.numel(), self.num_contextual)
        return layout.join(none, batch.actions, batch.actions)

    def event_tokens(self, batch: Batch, embeddings: dict[str, Tensor], layout: Layout, content_TE: Tensor) -> Tensor:
        """Tokens [T, E]: content, action, position and time of every event."""
        x_TE = content_TE
        if self.action is not None:
            x_TE = x_TE + self.action(batch, embeddings, layout.is_target)
        return self.place(x_TE, batch, layout)

    def two_tokens(
        self, batch: Batch, embeddings: dict[str, Tensor], layout: Layout, content_TE: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [T, E] of what every event shows, and as many of what came of it, each with position and time."""
        assert self.action is not None
        outcome_TE = self.action(batch, embeddings, layout.is_target)
        return self.place(content_TE, batch, layout), self.place(outcome_TE, batch, layout, second=True)

    def place(self, x_TE: Tensor, batch: Batch, layout: Layout, *, second: bool = False) -> Tensor:
        """Scale the tokens and add their position and time, [T, E]."""
        return position_time_encoding(
            x_TE,
            position_weight_PE=None if self.position is None else self.position.vectors.weight,
            positions_T=None if self.position is None else self.position.positions(layout, second=second),
            time_weight_KE=None if self.time is None else self.time.vectors.weight,
            buckets_T=None if self.time is None else self.time.buckets(layout, batch.timestamps),
            scale=self.scale,
        )

    def context_tokens(self, batch: Batch, embeddings: dict[str, Tensor], layout: Layout) -> Tensor:
        """Tokens [B, C, E]: the user features' vectors, and their positions."""
        if self.context is None:
            return embeddings["item"].new_zeros(batch.num_targets.numel(), 0, self.width)
        context_BCE = self.scale * self.context(batch, embeddings)
        if self.position is not None:
            context_BCE = context_BCE + self.position.context(layout)
        return context_BCE
