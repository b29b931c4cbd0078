"""One pass over a held-out split, on all ranks together."""

# M = predictions, D = embedding width, C = items of a chunk of the catalogue

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

from ..data.batch import Batch
from ..data.faults import SkippedSample
from ..data.loader import Loader
from ..data.samples import Split
from ..data.schema import DatasetInfo
from ..model.recommender import NextItemModel, NextItemOutput, RankingOutput
from .build import Recommender, build_loader
from .config import Config
from .metrics import next_item_metrics, ranking_metrics, regression_metrics
from .opening import check_ranks
from .parallel import World, gather_rows, sum_over_ranks

CATALOGUE_CHUNK = 16_384
"""Items scored at a time: [users, chunk] scores are the largest tensor of a next-item evaluation."""
USER_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Evaluator:
    """What evaluating needs of a run."""

    config: Config
    info: DatasetInfo
    world: World
    parallel: DistributedModelParallel
    progress: Callable[[], None] = lambda: None
    """Called after every part of the work, for whoever watches that it goes on."""

    @property
    def held_out(self) -> list[Split]:
        """The splits that the dataset holds out."""
        counts = self.info.counts
        events: dict[Split, int] = {"validation": counts.validation_events, "test": counts.test_events}
        return [split for split, number in events.items() if number]

    def __call__(self, split: Split, *, left_out: list[SkippedSample] | None = None) -> dict[str, float]:
        """The metrics of a split, equal on every rank; `left_out` takes up this rank's samples that are damaged."""
        training, left_out = self.parallel.training, [] if left_out is None else left_out
        self.parallel.eval()
        try:
            with torch.no_grad():
                evaluate = self._evaluate_next_item if self._is_next_item else self._evaluate_ranking
                metrics = evaluate(self._batches(split, left_out))
        finally:
            self.parallel.train(training)
        if self.config.data.bad_data == "skip":
            metrics["skipped_samples"] = float(sum_over_ranks(torch.tensor([len(left_out)])))
        return metrics

    @property
    def _is_next_item(self) -> bool:
        return self.config.objective.kind == "next_item"

    def _batches(self, split: Split, left_out: list[SkippedSample]) -> Iterator[Batch]:
        loader = build_loader(self.config, self.info, self.world, split=split)
        if self.config.data.bad_data == "skip":
            check_ranks(loader.faults)
        hidden = not self.world.is_main
        for batch in tqdm(loader, total=len_of(loader), desc=split, unit="batch", leave=False, disable=hidden or None):
            self.progress()
            left_out += batch.skipped
            yield batch.to(self.world.device, non_blocking=True)

    def _forward(self, batch: Batch) -> tuple[Tensor, RankingOutput | NextItemOutput]:
        bf16 = self.config.trainer.precision == "bf16"
        with torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=bf16):
            return self.parallel(batch)

    def _evaluate_ranking(self, batches: Iterator[Batch]) -> dict[str, float]:
        loss, outputs = torch.zeros((), dtype=torch.float64, device=self.world.device), []
        for batch in batches:
            loss_sum, output = self._forward(batch)
            loss += loss_sum.double()
            outputs.append(output)
        if not outputs:  # all of the split's files are damaged, as every rank has found
            return {"loss": math.nan}
        logits, labels, users = (
            gather_rows(torch.cat([getattr(output, name) for output in outputs]))
            for name in ("logits", "labels", "users")
        )
        total = float(sum_over_ranks(loss))
        if not len(labels):
            return {"loss": math.nan}
        objective, binary = self.config.objective, len(self.config.objective.tasks)
        return {
            "loss": total / len(labels),
            **ranking_metrics(logits[:, :binary], labels[:, :binary], users, objective.tasks),
            **regression_metrics(logits[:, binary:], labels[:, binary:], tuple(objective.regressions)),
        }

    def _evaluate_next_item(self, batches: Iterator[Batch]) -> dict[str, float]:
        users, targets, seen = [], [], []
        for batch in batches:
            _, output = self._forward(batch)
            assert isinstance(output, NextItemOutput)
            real = batch.labels.numel()  # a padding batch has a sample, but no label
            users.append(output.user_vectors[:real])
            targets.append(batch.labels)
            seen += split_inputs(batch)[:real]
        # A split whose events all lack a history, or are damaged, gives no sample, on no rank.
        ranks = self._ranks(torch.cat(users), torch.cat(targets), seen) if users else torch.zeros(0)
        return next_item_metrics(gather_rows(ranks))

    def _ranks(self, users_MD: Tensor, targets_M: Tensor, seen: list[Tensor]) -> Tensor:
        """Rank of each target among all items that are not in the input, [M] from 1; ties count against it."""
        # Two passes: a target's own score is known only once its chunk has passed.
        target_scores = torch.full_like(users_MD[:, 0], float("inf"))
        for first, items_CD in self._catalogue():
            for rows, scores in self._scores(users_MD, items_CD):
                column = targets_M[rows] - first
                inside = (column >= 0) & (column < len(items_CD))
                own = scores.gather(1, column.clamp(0, len(items_CD) - 1)[:, None])[:, 0]
                target_scores[rows] = torch.where(inside, own, target_scores[rows])
        ranks = torch.ones_like(targets_M)
        for first, items_CD in self._catalogue():
            for rows, scores in self._scores(users_MD, items_CD):
                excluded = (
                    torch.cat([targets_M[rows, None].cpu(), _padded(seen[rows.start : rows.stop])], dim=1) - first
                )
                _drop(scores, excluded.to(scores.device))
                ranks[rows] += (scores >= target_scores[rows, None]).sum(1)
        # An item outside the vocabulary cannot be recommended: it ranks behind all of it.
        return torch.where(targets_M > 0, ranks, self.info.num_items + 1)

    def _scores(self, users_MD: Tensor, items_CD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        model = self.parallel.module.model
        for start in range(0, len(users_MD), USER_CHUNK):
            rows = slice(start, min(start + USER_CHUNK, len(users_MD)))
            yield rows, model.score(users_MD[rows], items_CD)
            self.progress()

    def _catalogue(self) -> Iterator[tuple[int, Tensor]]:
        """The normalised vectors of all items in chunks, each with its first id; every rank looks up every chunk."""
        recommender = self.parallel.module
        assert isinstance(recommender, Recommender)
        assert isinstance(recommender.model, NextItemModel)
        for first in range(1, self.info.num_items + 1, CATALOGUE_CHUNK):
            ids = torch.arange(first, min(first + CATALOGUE_CHUNK, self.info.num_items + 1), device=self.world.device)
            lengths = [len(ids) if key == "candidate" else 0 for key in recommender.lookup.keys]
            request = KeyedJaggedTensor(
                keys=recommender.lookup.keys, values=ids, lengths=torch.tensor(lengths, device=self.world.device)
            )
            yield first, recommender.model.item_vectors(recommender.lookup(request)["candidate"])


def len_of(loader: Loader) -> int:
    """Steps of a loader's single pass."""
    return loader.num_steps(1)


def split_inputs(batch: Batch) -> list[Tensor]:
    """The item ids of each sample's input."""
    return list(batch.ids["item"].values().cpu().split(batch.offsets.diff().tolist()))


def _padded(ids: list[Tensor]) -> Tensor:
    """Rows of ids of unequal length as one matrix, filled up with 0, the unknown item, which no one recommends."""
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)


def _drop(scores: Tensor, columns: Tensor) -> None:
    """Set scores[i, columns[i, k]] to -inf, in place; columns outside of it belong to other chunks."""
    inside = (columns >= 0) & (columns < scores.size(1))
    row, place = inside.nonzero(as_tuple=True)
    scores[row, columns[row, place]] = -torch.inf
