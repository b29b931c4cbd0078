"""Embedding tables: widths, optimizer, placement: the `embeddings` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MomentDecay = Annotated[float, Field(ge=0, lt=1)]
Sharding = Literal["auto", "row_wise", "table_wise", "column_wise", "data_parallel"]


class EmbeddingOptimizerConfig(BaseModel):
    """The optimizer that runs inside the tables' backward pass."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    kind: Literal["rowwise_adagrad", "adam", "adamw"] = "rowwise_adagrad"
    """`rowwise_adagrad` for any table; `adam` of the rows looked up, for sharded tables on GPUs; `adamw` of every row
    at every update, as torch's with dense gradients, for `data_parallel` tables."""
    lr: float = Field(default=0.01, gt=0)
    eps: float = Field(default=1e-8, gt=0)
    betas: tuple[MomentDecay, MomentDecay] = (0.9, 0.999)
    """First and second moment decay; `adam` and `adamw` only."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Share of a row, times the learning rate, that each update of the row takes away; rows not looked up keep it, but
    for `adamw`, which updates them too."""


class EmbeddingsConfig(BaseModel):
    """The `embeddings` section."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    dim: int = Field(gt=0, le=2**16)
    """Columns of every table. Stored rows are padded to a multiple of 4, the width of one fbgemm vector load."""
    init_std: float = Field(default=0.02, gt=0)
    sharding: dict[str, Sharding] = {}
    """Per table: how its weights are split over ranks; a table that is not named is placed by the planner, row- or
    table-wise. `column_wise` cuts columns into pieces of at least 128, each with a `rowwise_adagrad` sum of its own;
    `data_parallel` keeps a small table whole on every rank, and sums its gradients over them, row by row."""
    hbm_gib: float | None = Field(default=None, gt=0)
    """Device memory per rank that tables may use, in GiB; default: what the device has, less the planner's reserve."""
    optimizer: EmbeddingOptimizerConfig = EmbeddingOptimizerConfig()

    @model_validator(mode="after")
    def _optimizer_fits_whole_tables(self) -> EmbeddingsConfig:
        whole = sorted(name for name, sharding in self.sharding.items() if sharding == "data_parallel")
        if whole and self.optimizer.kind == "adam":
            raise ValueError(
                f"embeddings.sharding places {whole} data_parallel, where embeddings.optimizer.kind='adam' is none of "
                "the optimizers; choose 'adamw' or 'rowwise_adagrad', or another placement"
            )
        return self
