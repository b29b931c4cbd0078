"""Losses, each the sum over a rank's labels, so that the sum over ranks divided by all labels is the step's mean.

Those of the next item read what `similarity` makes of user and item vectors of length 1, the vectors themselves for the
dot product; D is then its width. The temperature divides all scores.
"""

# M = labelled predictions, C = candidates, D = embedding width, K = tasks, B = samples, N = their most predictions,
# P = candidates of a prediction

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .layers import full_precision
from .similarity import DOT, LOGITS_PER_CHUNK, Similarity

NORMALIZE_EPS = 1e-6


def normalize(x: Tensor) -> Tensor:
    """Vectors [..., D] divided by their length, or by 1e-6 where that is shorter; float32 unless float64."""
    return F.normalize(full_precision(x), dim=-1, eps=NORMALIZE_EPS)


def multi_task_loss(predictions_MK: Tensor, labels_MK: Tensor, weights_K: Tensor, *, num_binary: int) -> Tensor:
    """The sum over predictions of the mean over tasks of weight * loss (scalar).

    The loss of the first `num_binary` tasks is the binary cross entropy of a logit, that of the others the squared
    error, 0 where the label is NaN.
    """
    return (task_losses(predictions_MK, labels_MK, num_binary=num_binary) * weights_K).mean(dim=1).sum()


def task_losses(predictions_MK: Tensor, labels_MK: Tensor, *, num_binary: int) -> Tensor:
    """What `multi_task_loss` weighs, [M, K]."""
    logits, numbers = predictions_MK[:, :num_binary], predictions_MK[:, num_binary:]
    entropy = F.binary_cross_entropy_with_logits(logits, labels_MK[:, :num_binary], reduction="none")
    # Before the difference: the gradient of a NaN that is masked afterwards is a NaN.
    expected = torch.where(labels_MK[:, num_binary:].isnan(), numbers.detach(), labels_MK[:, num_binary:])
    return torch.cat([entropy, (numbers - expected).square()], dim=1)


def full_softmax(
    users_MD: Tensor,
    catalogue_CD: Tensor,
    labels_M: Tensor,
    *,
    temperature: float,
    similarity: Similarity = DOT,
) -> Tensor:
    """Cross entropy of every user vector over the whole catalogue, summed (scalar).

    The catalogue's rows are the items 1..C in order, so label i is row i - 1. Label 0, the unknown item, is ignored.
    """
    queries_MD = users_MD / temperature
    positive_M = similarity.pairs(queries_MD, catalogue_CD[(labels_M - 1).clamp(min=0)])
    return _softmax(queries_MD, catalogue_CD, positive_M, labels_M, similarity=similarity)


def sampled_softmax(
    users_MD: Tensor,
    positives_MD: Tensor,
    candidates_CD: Tensor,
    *,
    labels_M: Tensor,
    candidate_ids_C: Tensor,
    temperature: float,
    expected_counts_C: Tensor | None = None,
    similarity: Similarity = DOT,
) -> Tensor:
    """Cross entropy of every user vector over its own positive and the shared candidates, summed (scalar).

    A candidate that is the row's own label does not count against it. Label 0, the unknown item, is ignored.
    With `expected_counts_C`, how often each candidate's item is expected among the candidates, an item counts as much
    however popular it is: the logarithm is taken off its score (Bengio and Senecal, 2008), and the sum over candidates
    estimates that over the catalogue.
    """
    queries_MD = users_MD / temperature
    positive_M = similarity.pairs(queries_MD, positives_MD)
    shift_C = None if expected_counts_C is None else -expected_counts_C.to(queries_MD.dtype).log()
    return _softmax(
        queries_MD, candidates_CD, positive_M, labels_M, candidate_ids_C, shift_C=shift_C, similarity=similarity
    )


def per_sample_softmax(
    users_MD: Tensor,
    positives_MD: Tensor,
    candidates_BCD: Tensor,
    *,
    offsets: Tensor,
    labels_M: Tensor,
    candidate_ids_BC: Tensor,
    temperature: float,
    similarity: Similarity = DOT,
) -> Tensor:
    """As sampled_softmax, where sample b's predictions, `offsets[b]` to `offsets[b + 1]`, have candidates of their own.

    Predictions are padded to as many as the longest sample has; `offsets` is [B + 1].
    """
    lengths = offsets.diff()
    longest = max(1, int(lengths.max()))
    sample_M = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    place_M = torch.arange(len(labels_M), device=lengths.device) - offsets[sample_M] + sample_M * longest
    queries_MD = users_MD / temperature

    def pad(x_M: Tensor) -> Tensor:
        padded = x_M.new_zeros(len(lengths) * longest, *x_M.shape[1:])
        return padded.index_copy(0, place_M, x_M).view(len(lengths), longest, *x_M.shape[1:])

    # A place without a prediction has label 0, and so counts for nothing.
    positive_M = similarity.pairs(queries_MD, positives_MD)
    return _softmax(
        pad(queries_MD), candidates_BCD, pad(positive_M), pad(labels_M), candidate_ids_BC, similarity=similarity
    )


def per_position_softmax(
    users_MD: Tensor,
    positives_MD: Tensor,
    candidates_CD: Tensor,
    *,
    places_MP: Tensor,
    labels_M: Tensor,
    candidate_ids_C: Tensor,
    temperature: float,
    expected_counts_C: Tensor | None = None,
    similarity: Similarity = DOT,
) -> Tensor:
    """As sampled_softmax, where prediction m has candidates of its own, those at `places_MP[m]` [P] int64.

    So do the public recipes of HSTU (arXiv 2402.17152). What many predictions have drawn is
    there once, and copied to them in chunks: nothing of size M x P x D exists.
    """
    queries_MD = users_MD / temperature
    positive_M = similarity.pairs(queries_MD, positives_MD)
    shift_C = None if expected_counts_C is None else -expected_counts_C.to(queries_MD.dtype).log()
    apply = cast(Callable[..., Tensor], _GatheredSoftmax.apply)
    with torch.autocast(queries_MD.device.type, enabled=False):
        if similarity is DOT:
            return apply(queries_MD, candidates_CD, positive_M, labels_M, places_MP, candidate_ids_C, shift_C)
        loss = queries_MD.new_zeros(())
        for chunk in _gathered_chunks(places_MP, candidates_CD):
            own = (queries_MD[chunk], candidates_CD, positive_M[chunk], labels_M[chunk], places_MP[chunk])
            inputs = (similarity, *own, candidate_ids_C, shift_C)
            loss = loss + checkpoint(_gathered_entropy, *inputs, use_reentrant=False, preserve_rng_state=False)
        return loss


def sampled_bce(
    users_MD: Tensor,
    positives_MD: Tensor,
    candidates_CD: Tensor,
    *,
    labels_M: Tensor,
    candidate_ids_C: Tensor,
    temperature: float,
    similarity: Similarity = DOT,
) -> Tensor:
    """Binary cross entropy of every positive, and the mean of it over the shared negatives, summed (scalar).

    SASRec's loss (arXiv 1808.09781, section 3.6) with more negatives than one. A candidate that is the row's own label
    is no negative of it. Label 0, the unknown item, is ignored.
    """
    queries_MD = users_MD / temperature
    positive_M = similarity.pairs(queries_MD, positives_MD)
    counts_M = (labels_M > 0).to(queries_MD.dtype)
    with torch.autocast(queries_MD.device.type, enabled=False):
        loss = (counts_M * F.softplus(-positive_M)).sum()
        # At least once, so that candidates have a gradient where there is no label.
        for chunk in _chunks(queries_MD, candidates_CD):
            weights = counts_M[chunk, None] * (labels_M[chunk, None] != candidate_ids_C) / len(candidate_ids_C)
            # The logits are made again in the backward: of all chunks together they are the largest tensor of a step.
            inputs = (similarity, queries_MD[chunk], candidates_CD, weights)
            loss = loss + checkpoint(_weighted_softplus, *inputs, use_reentrant=False, preserve_rng_state=False)
    return loss


def _weighted_softplus(similarity: Similarity, queries_MD: Tensor, candidates_CD: Tensor, weights_MC: Tensor) -> Tensor:
    return (weights_MC * F.softplus(similarity.scores(queries_MD, candidates_CD))).sum()


def _chunks(queries: Tensor, candidates: Tensor) -> list[slice]:
    """Parts of queries [M, D], which share candidates [C, D], or [B, N, D], which do not; at least one."""
    logits_per_row = candidates.size(-2) * (1 if candidates.dim() == 2 else queries.size(1))
    return _parts(queries, LOGITS_PER_CHUNK[queries.device.type] // logits_per_row)


def _parts(x: Tensor, num_rows: int) -> list[slice]:
    """Parts of so many rows of x, one at least; and one at least if x is empty."""
    rows = max(1, num_rows)
    return [slice(begin, begin + rows) for begin in range(0, max(len(x), 1), rows)]


def _softmax(
    queries: Tensor,
    candidates: Tensor,
    positive: Tensor,
    labels: Tensor,
    candidate_ids: Tensor | None = None,
    *,
    shift_C: Tensor | None = None,
    similarity: Similarity,
) -> Tensor:
    """sum over m with label > 0 of logsumexp(logits_m) - positive_m, where logits = similarity.scores(...).

    Queries [M, D] share the candidates [C, D]; or queries [B, N, D] have candidates [B, C, D], and so ids [B, C].
    With candidate ids, the positive joins the candidates' logits, and candidates equal to the label leave them; a
    shift [C] is added to the candidates' logits and takes no gradient. Nothing of size M x C exists.
    """
    apply = cast(Callable[..., Tensor], _ChunkedSoftmax.apply)
    with torch.autocast(queries.device.type, enabled=False):
        if similarity is DOT:
            return apply(queries, candidates, positive, labels, candidate_ids, shift_C)
        loss = queries.new_zeros(())
        for chunk in _chunks(queries, candidates):
            compared = slice(None) if candidates.dim() == 2 else chunk
            ids = None if candidate_ids is None else candidate_ids[compared]
            inputs = (similarity, queries[chunk], candidates[compared], positive[chunk], labels[chunk], ids, shift_C)
            loss = loss + checkpoint(_entropy, *inputs, use_reentrant=False, preserve_rng_state=False)
        return loss


def _entropy(
    similarity: Similarity,
    queries: Tensor,
    candidates: Tensor,
    positive: Tensor,
    labels: Tensor,
    candidate_ids: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """`_softmax` of a chunk, any similarity's, by autograd."""
    logits = similarity.scores(queries, candidates)
    if shift is not None:
        logits = logits + shift
    if candidate_ids is not None:
        logits = logits.masked_fill(labels[..., None] == candidate_ids.unsqueeze(-2), -torch.inf)
        logits = torch.cat([positive[..., None], logits], dim=-1)
    return ((labels > 0) * (logits.logsumexp(dim=-1) - positive)).sum()


class _KeepsGradients(torch.autograd.Function):
    """A loss that takes queries, candidates, positives and what needs no gradient.

    It is a sum, so its gradients are known up to the incoming scalar while a chunk's logits are at hand, and the
    forward pass keeps those instead of the logits.
    """

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [dinput * dloss for dinput in ctx.saved_tensors]
        return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


class _ChunkedSoftmax(_KeepsGradients):
    """`_softmax` of the dot product."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        candidates: Tensor,
        positive: Tensor,
        labels: Tensor,
        candidate_ids: Tensor | None,
        shift_C: Tensor | None,
    ) -> Tensor:
        loss = queries.new_zeros(())
        dqueries, dpositive = torch.empty_like(queries), torch.empty_like(positive)
        dcandidates = torch.zeros_like(candidates)
        is_shared = candidates.dim() == 2
        for chunk in _chunks(queries, candidates):
            compared = slice(None) if is_shared else chunk
            ids = None if candidate_ids is None else candidate_ids[compared]
            found = _chunk(queries[chunk], candidates[compared], positive[chunk], labels[chunk], ids, shift_C)
            loss += found.loss
            dqueries[chunk], dpositive[chunk] = found.dqueries, found.dpositive
            add = dcandidates.addmm_ if is_shared else dcandidates[compared].baddbmm_
            add(found.weights.transpose(-1, -2), found.shared_queries)
        ctx.save_for_backward(dqueries, dcandidates, dpositive)
        return loss


def _gathered_chunks(places_MP: Tensor, candidates_CD: Tensor) -> list[slice]:
    """Parts of the predictions whose copies of candidates are as many values as logits elsewhere; at least one."""
    values_per_row = places_MP.size(1) * candidates_CD.size(1)
    return _parts(places_MP, LOGITS_PER_CHUNK[candidates_CD.device.type] // values_per_row)


def _gathered_entropy(
    similarity: Similarity,
    queries_MD: Tensor,
    candidates_CD: Tensor,
    positive_M: Tensor,
    labels_M: Tensor,
    places_MP: Tensor,
    candidate_ids_C: Tensor,
    shift_C: Tensor | None,
) -> Tensor:
    """A chunk of `per_position_softmax` by autograd: samples of one prediction each."""
    own = (queries_MD[:, None], candidates_CD[places_MP], positive_M[:, None], labels_M[:, None])
    return _entropy(similarity, *own, candidate_ids_C[places_MP], _gathered_shift(shift_C, places_MP))


def _gathered_shift(shift_C: Tensor | None, places_MP: Tensor) -> Tensor | None:
    return None if shift_C is None else shift_C[places_MP][:, None]


class _GatheredSoftmax(_KeepsGradients):
    """`per_position_softmax` of the dot product."""

    @staticmethod
    def forward(
        ctx: Any,
        queries_MD: Tensor,
        candidates_CD: Tensor,
        positive_M: Tensor,
        labels_M: Tensor,
        places_MP: Tensor,
        candidate_ids_C: Tensor,
        shift_C: Tensor | None,
    ) -> Tensor:
        loss = queries_MD.new_zeros(())
        dqueries, dpositive = torch.empty_like(queries_MD), torch.empty_like(positive_M)
        dcandidates = torch.zeros_like(candidates_CD)
        for chunk in _gathered_chunks(places_MP, candidates_CD):
            places = places_MP[chunk]
            own = (queries_MD[chunk, None], candidates_CD[places], positive_M[chunk, None], labels_M[chunk, None])
            found = _chunk(*own, candidate_ids_C[places], _gathered_shift(shift_C, places))
            loss += found.loss
            dqueries[chunk], dpositive[chunk] = found.dqueries[:, 0], found.dpositive[:, 0]
            gradients = found.weights.transpose(-1, -2) @ found.shared_queries
            dcandidates.index_add_(0, places.flatten(), gradients.flatten(0, 1))
        ctx.save_for_backward(dqueries, dcandidates, dpositive)
        return loss


class _Chunk(NamedTuple):
    """The softmax of some rows, and its gradients; that of the candidates is weights^T @ shared_queries."""

    loss: Tensor
    dqueries: Tensor
    dpositive: Tensor
    weights: Tensor
    shared_queries: Tensor


def _chunk(
    queries: Tensor,
    candidates: Tensor,
    positive: Tensor,
    labels: Tensor,
    candidate_ids: Tensor | None,
    shift: Tensor | None,
) -> _Chunk:
    counts = (labels > 0).to(queries.dtype)
    logits = queries @ candidates.transpose(-1, -2)
    if shift is not None:
        logits += shift
    if candidate_ids is not None:
        logits.masked_fill_(labels[..., None] == candidate_ids.unsqueeze(-2), -torch.inf)
    top = torch.maximum(logits.amax(dim=-1), positive)
    weights = logits.sub_(top[..., None]).exp_()
    total = weights.sum(dim=-1)
    own = torch.zeros_like(total)
    if candidate_ids is not None:
        own = (positive - top).exp()
        total = total + own
    share = counts / total
    return _Chunk(
        loss=(counts * (top + total.log() - positive)).sum(),
        dqueries=share[..., None] * (weights @ candidates),
        dpositive=share * own - counts,
        weights=weights,
        shared_queries=share[..., None] * queries,
    )
