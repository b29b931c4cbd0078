"""Where the histories are and how they become batches: the `data` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_REPLICATED_VALUES = 1_000_000
RETRY_SECONDS = 180.0


class FeatureConfig(BaseModel):
    """One further column of the prepared dataset that the model reads.

    A value becomes an id in 0..num_values, where 0 stands for unknown (missing, or out of range):
    `category`: 1 + value for integers 0..num_values-1;
    `bucket`: 1 + floor(per_octave * log2(1 + value)), capped at num_values, for numbers >= 0;
    `hash`: 1 + a 64-bit mix of the integer modulo num_values, for id spaces without a vocabulary.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    kind: Literal["category", "bucket", "hash"]
    role: Literal["event", "outcome", "user"]
    """`event` is known when the item is shown (history and targets see it), `outcome` only afterwards
    (history sees it, targets see 0), `user` is one value per user and becomes a token in front of the history."""
    num_values: int = Field(gt=0)
    per_octave: float = Field(default=1.0, gt=0)
    """Buckets per doubling of the value; `bucket` only."""

    @model_validator(mode="after")
    def _fits_every_rank(self) -> FeatureConfig:
        if self.kind != "hash" and self.num_values > MOST_REPLICATED_VALUES:
            raise ValueError(
                f"num_values={self.num_values} with kind={self.kind!r}: every rank holds such a table, which may have "
                f"{MOST_REPLICATED_VALUES:,} values; use kind='hash', whose table is sharded"
            )
        return self


class StochasticLengthConfig(BaseModel):
    """Training on a part of most long histories (docs/datasets.md); a section that is there turns it on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    alpha: float = Field(gt=1, lt=2)
    """A history of more than t = max_history^(alpha/2) events stays whole with probability max_history^alpha /
    length^2, else t of its events are kept. Attention then costs about max_history^alpha per sample."""
    selection: Literal["recent", "random", "time_weighted"] = "time_weighted"
    """Which t events: the newest; any; or any, the less likely the longer before the newest one they lie."""
    balanced: bool = True
    """Decide for the samples of a step together, so that steps and ranks get equal work; every sample stays whole as
    often as if it were decided alone."""


class DataConfig(BaseModel):
    """The `data` section."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    path: str
    """Folder of a prepared dataset (`ultrarec prepare`)."""
    features: dict[str, FeatureConfig] = {}
    """Columns read beside items, timestamps and actions, by name. `user_id` may be read as a `user` feature."""
    max_history: int = Field(default=200, gt=0, le=2**20)
    """Newest events of a user that a sample keeps in front of its targets. Ranking reads of them what is earlier than
    the first target: a record that the log repeats under one timestamp would give the label away."""
    train_targets: Literal["all", "recent"] = "all"
    """Which training events the model learns to predict in an epoch: each, once, those of users with more than
    `max_history` in several samples; or, as in the published protocol for the next item, the newest `max_history` of
    each user. What nothing stands before, a user's first event, is a target in ranking only."""
    stochastic_length: StochasticLengthConfig | None = None
    """Cuts long histories in training, and nowhere else."""
    targets_per_sample: int = Field(default=1, gt=0)
    """Ranking, training: consecutive events that share one history. 1 shows each target everything before it;
    more cost less, and hide a sample's own events from each other. Evaluation always uses 1."""
    batch_rows: int | None = Field(default=None, gt=0)
    """Samples per step over all ranks together, so that a run on other machines trains on the same batches."""
    batch_tokens: int | None = Field(default=None, gt=0)
    """Instead of `batch_rows`: events per step over all ranks together."""
    batch_cost: float | None = Field(default=None, gt=0)
    """Instead of `batch_rows`: what a step may cost over all ranks together, in tokens. A sample costs the operations
    that the model spends on it, over those for an event of the shortest sample: long ones cost more per event."""
    evaluate_rows: int = Field(default=1024, gt=0)
    """Samples per evaluation batch over all ranks together."""
    balance_for: int = Field(default=1, gt=0)
    """Ranks among which steps of few samples are to be dealt evenly. Samples dearer than half the mean then come in
    groups of so many of like cost, one for each rank, and steps hold whole groups: `batch_rows` should be a multiple of
    it, `batch_tokens` and `batch_cost` have room for some groups. Any number of ranks reads the same steps."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of rows and of the sampled negatives."""
    shuffle_row_groups: int = Field(default=16, gt=0)
    """Row groups whose rows are mixed. Ranks share them: each decodes and holds those that its part of the steps comes
    from, so that with fewer row groups than ranks several ranks read the same one."""
    threads: int = Field(default=2, gt=0)
    """Threads per rank that decode row groups and build batches."""
    prefetch: int = Field(default=4, gt=0)
    """Batches that wait ready for training, beside those that the threads work on."""
    bad_data: Literal["error", "skip"] = "error"
    """Files that are missing, damaged or of other columns, damaged row groups, and rows that break a rule: end the run
    with their place, or leave them out, count them in the metrics and list them in `OUT/skipped/`."""
    retry_seconds: float = Field(default=RETRY_SECONDS, ge=0, le=7 * 24 * 3600)
    """How long a read that fails is tried again, with growing pauses, before the run ends with exit code 75, which
    launchers answer with a restart; shorter than `trainer.watchdog_seconds`."""
    audit: bool = False
    """Write the rows of every finished step to `OUT/audit/rank-R.jsonl`."""

    @model_validator(mode="after")
    def _one_batch_size(self) -> DataConfig:
        sizes = {name: getattr(self, name) for name in ("batch_rows", "batch_tokens", "batch_cost")}
        if sum(size is not None for size in sizes.values()) != 1:
            raise ValueError(
                ", ".join(f"data.{name}={size}" for name, size in sizes.items())
                + ": exactly one of them sizes a step; set one and remove the others (--set data.NAME= removes one)"
            )
        return self
