"""The two models a recipe can ask for, whole: batch and embeddings in, summed loss and outputs out.

`RankingModel` predicts the actions on target events from the history before them, `NextItemModel` the item that
follows every event. Both are a backbone (HSTU, or one to compare it with) over one token per event. Neither knows of
ranks or tables: embeddings arrive looked up, and the loss is the sum over this rank's labels.
"""

# T = events of all samples, B = samples, M = labelled predictions, C = candidates, E = model width,
# D = embedding width, K = tasks

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from .backbones import TARGET_ONLY
from .config import ModelConfig, ObjectiveConfig
from .encoder import SequenceEncoder
from .heads import RankingHead, UserVectorHead
from .inputs import Features, features_of
from .losses import (
    full_softmax,
    multi_task_loss,
    normalize,
    per_position_softmax,
    per_sample_softmax,
    sampled_bce,
    sampled_softmax,
)
from .similarity import DOT, MLP, Similarity

Embeddings = dict[str, Tensor]
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "log": lambda v: torch.where(v < 0, torch.nan, v).log1p(),
    "linear": lambda v: v,
}
"""By `objective.regressions.NAME.scale`: from a column's values to what is predicted; NaN is no label."""


@dataclass(frozen=True, slots=True)
class RankingOutput:
    """What a ranking step predicted; rows are the batch's targets, in order."""

    logits: Tensor
    """[M, K] float32, one column per task: logits in the order of `objective.tasks`, then, in the order of
    `objective.regressions`, numbers on the scale of each."""
    labels: Tensor
    """[M, K] float32, 1.0 where the action was taken; of regressions the value on its scale, NaN without one."""
    users: Tensor
    """[M] int64, the user of each target."""


@dataclass(frozen=True, slots=True)
class NextItemOutput:
    """What a next-item step encoded; rows are all positions in training, one per sample in evaluation."""

    user_vectors: Tensor
    """[M, D] float32 of length 1; zeros where an evaluated sample has nothing to encode."""
    labels: Tensor
    """[M] int64, the dense id of the item that followed."""
    users: Tensor
    """[M] int64, the user of each row."""


class RankingModel(nn.Module):
    """Predictions of several tasks, binary ones and regressions, for every target event."""

    task_bits: Tensor
    task_weights: Tensor

    def __init__(
        self, encoder: SequenceEncoder, head: RankingHead, objective: ObjectiveConfig, *, task_bits: list[int]
    ) -> None:
        """`task_bits` are the places of the binary tasks' actions in the bitmask."""
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.regressions = objective.regressions
        task_weights = [*(objective.task_weights or [1.0] * len(task_bits))]
        task_weights += [task.weight for task in self.regressions.values()]
        # Both follow from the configuration, so a checkpoint need not hold them.
        self.register_buffer("task_bits", torch.tensor(task_bits, dtype=torch.int64), persistent=False)
        self.register_buffer("task_weights", torch.tensor(task_weights), persistent=False)

    def forward(self, batch: Batch, embeddings: Embeddings) -> tuple[Tensor, RankingOutput]:
        """The loss, summed over this rank's targets, and the predictions it was made of.

        `embeddings`: "item" [T, D], and for each `hash` feature [T, D] or, of users, [B, D].
        The loss is that of `multi_task_loss`; without targets it is 0, with a graph through every parameter.
        """
        encoded = self.encoder(batch, embeddings)
        targets_M = encoded.layout.target_events(batch.labels.numel())
        logits_MK = self.head(encoded.tokens, encoded.content[targets_M])
        labels_MK = self.labels(batch).to(logits_MK.dtype)
        loss = multi_task_loss(logits_MK, labels_MK, self.task_weights, num_binary=len(self.task_bits))
        return loss, RankingOutput(logits=logits_MK, labels=labels_MK, users=batch.users)

    def labels(self, batch: Batch) -> Tensor:
        """What the tasks predict of every target, [M, K], as `RankingOutput` says."""
        binary = batch.labels[:, None] >> self.task_bits & 1
        numbers = [SCALES[task.scale](batch.numbers[name]) for name, task in self.regressions.items()]
        return torch.cat([binary, *(number[:, None] for number in numbers)], dim=1)


class NextItemModel(nn.Module):
    """A vector per user whose similarity with an item's embedding ranks the catalogue."""

    popularity: Tensor

    def __init__(
        self,
        encoder: SequenceEncoder,
        head: UserVectorHead,
        similarity: Similarity,
        objective: ObjectiveConfig,
        *,
        popularity: Tensor | None,
    ) -> None:
        """`popularity` [items + 1], each item's share of the training events by id; for in-batch negatives only."""
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.similarity = similarity
        self.temperature = objective.temperature
        self.is_bce = objective.loss == "bce"
        self.negatives_shared_by = objective.negatives_shared_by
        self.num_negatives = objective.num_negatives
        self.num_in_batch = objective.num_in_batch
        if objective.num_in_batch:
            if popularity is None:
                raise ValueError(
                    "objective.num_in_batch corrects negatives by their popularity; give the items' shares"
                )
            # It follows from the dataset, so a checkpoint need not hold it.
            self.register_buffer("popularity", popularity, persistent=False)

    def forward(self, batch: Batch, embeddings: Embeddings) -> tuple[Tensor, NextItemOutput]:
        """The loss, summed over this rank's labels, and the user vectors it was made of.

        `embeddings`: "item" [T, D], as much for each `hash` feature ([B, D] of users), and in training "candidate"
        [C, D] with, for the sampled softmax, "positive" [M, D]; without "positive" the candidates are the catalogue,
        ids 1..C in order.
        In evaluation mode (`model.eval()`) only the last position of each sample becomes a user vector, candidates
        are not needed and the loss is 0.
        """
        encoded = self.encoder(batch, embeddings)
        if self.training:
            events_T = torch.arange(batch.labels.numel(), device=batch.labels.device)
            users_MD = self.head(encoded.tokens[encoded.layout.last_rows(events_T)])
            loss = self.loss(users_MD, batch, embeddings)
        else:
            users_MD = self.head(encoded.last_tokens(batch.labels.numel()))
            loss = users_MD.new_zeros(())
        return loss, NextItemOutput(user_vectors=users_MD, labels=batch.labels, users=batch.users)

    def loss(self, users_MD: Tensor, batch: Batch, embeddings: Embeddings) -> Tensor:
        """Sampled softmax where the batch brings positives, else full softmax; summed over labels (scalar)."""
        users_MD, candidates_CD = self.similarity.queries(users_MD), self.item_vectors(embeddings["candidate"])
        if "positive" not in embeddings:
            return full_softmax(
                users_MD, candidates_CD, batch.labels, temperature=self.temperature, similarity=self.similarity
            )
        positives_MD = self.item_vectors(embeddings["positive"])
        ids = batch.ids.values()
        ids_C = ids[len(ids) - len(candidates_CD) :]  # candidates are the last key, and may be none
        if self.negatives_shared_by == "sample":
            shape = (batch.num_targets.numel(), -1)
            return per_sample_softmax(
                users_MD,
                positives_MD,
                candidates_CD.view(*shape, candidates_CD.size(1)),
                offsets=batch.offsets,
                labels_M=batch.labels,
                candidate_ids_BC=ids_C.view(shape),
                temperature=self.temperature,
                similarity=self.similarity,
            )
        if self.is_bce:
            return sampled_bce(
                users_MD,
                positives_MD,
                candidates_CD,
                labels_M=batch.labels,
                candidate_ids_C=ids_C,
                temperature=self.temperature,
                similarity=self.similarity,
            )
        counts_C, num_drawn = None, len(candidates_CD)
        if self.num_in_batch:
            candidates_CD, ids_C, counts_C = self.with_labels(candidates_CD, ids_C, positives_MD, batch.labels)
        if batch.negatives is not None:
            labels_MC = torch.arange(num_drawn, len(candidates_CD), device=ids_C.device).expand(len(users_MD), -1)
            return per_position_softmax(
                users_MD,
                positives_MD,
                candidates_CD,
                places_MP=torch.cat([batch.negatives, labels_MC], dim=1),
                labels_M=batch.labels,
                candidate_ids_C=ids_C,
                temperature=self.temperature,
                expected_counts_C=counts_C,
                similarity=self.similarity,
            )
        return sampled_softmax(
            users_MD,
            positives_MD,
            candidates_CD,
            labels_M=batch.labels,
            candidate_ids_C=ids_C,
            temperature=self.temperature,
            expected_counts_C=counts_C,
            similarity=self.similarity,
        )

    def with_labels(
        self, candidates_CD: Tensor, ids_C: Tensor, positives_MD: Tensor, labels_M: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The uniform candidates and labels of the step: vectors, ids, and how often a prediction expects each.

        Labels are taken at even distances, so that all users of the step give some. The unknown item, which is no
        candidate, is expected infinitely often: it then counts for nothing.
        """
        num_labels = min(self.num_in_batch, len(labels_M))
        places = torch.arange(num_labels, device=labels_M.device) * len(labels_M) // max(num_labels, 1)
        ids_C = torch.cat([ids_C, labels_M[places]])
        num_items = self.popularity.numel() - 1
        num_uniform = self.num_negatives if self.negatives_shared_by == "position" else len(candidates_CD)
        expected_C = num_uniform / num_items + num_labels * self.popularity[ids_C]
        expected_C = expected_C.masked_fill(ids_C == 0, torch.inf)
        return torch.cat([candidates_CD, positives_MD[places]]), ids_C, expected_C

    def item_vectors(self, item_embeddings: Tensor) -> Tensor:
        """Rows of the item table [..., D] as what `score` reads; float32 vectors of length 1 for the dot product."""
        return self.similarity.items(normalize(item_embeddings))

    def score(self, user_vectors: Tensor, item_vectors: Tensor) -> Tensor:
        """Logits [M, items] of user vectors [M, D] against `item_vectors(...)` [items, ...], as training has them."""
        return self.similarity.scores(self.similarity.queries(user_vectors) / self.temperature, item_vectors)


def build_model(
    model: ModelConfig,
    objective: ObjectiveConfig,
    *,
    features: Features,
    actions: tuple[str, ...],
    embedding_dim: int,
    max_history: int,
    max_targets: int,
    popularity: Tensor | None = None,
) -> RankingModel | NextItemModel:
    """The model of a recipe, initialised from torch's global generator: same seed, same parameters.

    `actions` are the dataset's declared actions in bit order; `max_history` and `max_targets` bound the events of a
    sample (next item: `max_targets` is 0); `popularity` [items + 1] has each item's share of the training events, which
    in-batch negatives are corrected by. Raises ValueError for a task that is no action of the dataset, and for
    settings that do not go together.
    """
    _check(model, objective, features=features, actions=actions, embedding_dim=embedding_dim)
    is_ranking = objective.kind == "ranking"
    encoder = SequenceEncoder(
        model,
        features=features,
        actions=actions,
        embedding_dim=embedding_dim,
        max_history=max_history,
        max_targets=max_targets,
        only_targets=is_ranking,
    )
    if not is_ranking:
        head = UserVectorHead(width=model.width, embedding_dim=embedding_dim)
        return NextItemModel(encoder, head, _similarity(objective, embedding_dim), objective, popularity=popularity)
    return RankingModel(
        encoder,
        RankingHead(
            width=model.width,
            hidden=objective.head_hidden,
            num_tasks=len(objective.tasks) + len(objective.regressions),
            num_experts=objective.num_experts,
            norm_affine=model.norm_affine,
        ),
        objective,
        task_bits=[actions.index(task) for task in objective.tasks],
    )


def _similarity(objective: ObjectiveConfig, embedding_dim: int) -> Similarity:
    if objective.similarity == "dot":
        return DOT
    return MLP(width=embedding_dim, hidden=objective.head_hidden, temperature=objective.temperature)


def _check(
    model: ModelConfig, objective: ObjectiveConfig, *, features: Features, actions: tuple[str, ...], embedding_dim: int
) -> None:
    for task in objective.tasks:
        if task not in actions:
            raise ValueError(
                f"objective.tasks names {task!r}, which is no action of the dataset; choose from {list(actions)}, "
                f"or prepare the log again with --action {task}"
            )
    has_outcomes = bool(actions) or bool(features_of(features, "outcome"))
    if model.tokens == "interleaved" and not has_outcomes:
        raise ValueError(
            "model.tokens='interleaved' gives what came of an event a token, but the dataset has no actions and the "
            "recipe no outcome features; use 'merged', or prepare the log with --action"
        )
    if model.token_hidden is None and model.width != embedding_dim:
        raise ValueError(
            f"model.width={model.width} differs from embeddings.dim={embedding_dim}, and without model.token_hidden "
            "embeddings are summed into tokens; make the two equal, or set model.token_hidden"
        )
    if objective.kind == "next_item":
        if model.channels:
            raise ValueError(
                f"model.channels={sorted(model.channels)} encode targets, which objective.kind='next_item' does not "
                "have; remove them, or choose kind='ranking'"
            )
        if model.backbone in TARGET_ONLY:
            raise ValueError(
                f"model.backbone={model.backbone!r} encodes targets, which objective.kind='next_item' does not have; "
                "choose another backbone, or kind='ranking'"
            )
        _check_causal(model)


def _check_causal(model: ModelConfig) -> None:
    """Refuse what would tell a position of events that come after the item it predicts."""
    if model.position_encoding == "from_end":
        raise ValueError(
            "model.position_encoding='from_end' counts the events ahead of a position, which "
            "objective.kind='next_item' predicts; use 'from_start'"
        )
    if model.time_encoding != "none":
        raise ValueError(
            f"model.time_encoding={model.time_encoding!r} measures from the newest event, which "
            "objective.kind='next_item' predicts; use 'none', and model.relative_bias='position_time' for time"
        )
