"""The HSTU stack and what it is trained for: the `model` and `objective` sections of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_COLUMNS = 2**16


class ModelConfig(BaseModel):
    """The `model` section. The defaults are the layer of the HSTU paper (arXiv 2402.17152, section 3)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    width: int = Field(gt=0, le=MOST_COLUMNS)
    """E, the width of a token inside the stack."""
    num_layers: int = Field(gt=0, le=1024)
    num_heads: int = Field(default=1, gt=0, le=1024)
    qk_dim: int = Field(gt=0, le=MOST_COLUMNS)
    """Columns of q and k per head."""
    value_dim: int = Field(gt=0, le=MOST_COLUMNS)
    """Columns of u and v per head."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the input tokens and before every output projection."""
    activation: Literal["uvqk", "u"] = "uvqk"
    """What SiLU is applied to after the projection: all four parts (the paper) or the gate only (industrial)."""
    gating: Literal["norm_times_u", "concat"] = "norm_times_u"
    """What the output projection reads: norm(attention) * u (the paper), or [u, attention, norm(attention) * u]."""
    norm: Literal["layer_norm", "group_norm"] = "layer_norm"
    """Normalisation of the attention output: over all heads, or per head."""
    norm_affine: bool = False
    """Learn scale and shift of the norms (the industrial variant)."""
    projection_bias: bool = False
    """Add a bias to the u, v, q, k projection (the industrial variant)."""
    attention_alpha: Literal["one", "rsqrt"] = "one"
    """Factor of <q, k>: 1 (research variant) or 1/sqrt(qk_dim) (industrial variant)."""
    relative_bias: Literal["none", "position", "position_time"] = "none"
    """Bias added to the scores in every layer, shared by its heads. It counts positions one by one, targets too: with
    several targets per sample, later ones stand further from the history than they will when scored alone."""
    position_encoding: Literal["none", "from_start", "from_end"] = "none"
    """Learned vector per position added to the input: counted from the oldest token, or back from the end of the
    history (ranking only). Tokens are scaled by sqrt(width) first, as in both published variants."""
    time_encoding: Literal["none", "sqrt", "log"] = "none"
    """Learned vector per bucket of the time from an event to the request, added to the input (ranking only)."""
    time_unit: float = Field(default=1.0, gt=0)
    """Seconds per unit of the log's timestamps: 0.001 for milliseconds. Read by `time_encoding`."""
    rematerialize: bool = False
    """Keep of each layer its input, its attention output and statistics, and compute u, v, q and k again in the
    backward pass: less memory for one more projection; the results are the same bit for bit."""
    fp8_projections: bool = False
    """Multiply by the weights of both projections of a layer in FP8 (e4m3, a scale per row), forward only: for GPUs
    that do so (sm_89 or later, gfx950, gfx12). CPUs emulate it, slowly."""
    token_hidden: int | None = Field(default=None, gt=0, le=MOST_COLUMNS)
    """Hidden width of the MLPs that make a token from item, features and actions; without it embeddings are summed,
    which needs embeddings.dim == model.width."""


class ObjectiveConfig(BaseModel):
    """The `objective` section."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    kind: Literal["ranking", "next_item"]
    tasks: tuple[str, ...] = ()
    """Ranking: names of the dataset's actions to predict, each a binary task."""
    task_weights: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Ranking: weight of each task's loss; all 1 when empty."""
    head_hidden: int = Field(default=128, gt=0, le=MOST_COLUMNS)
    """Ranking: hidden width of the prediction head."""
    loss: Literal["auto", "sampled_softmax", "full_softmax"] = "auto"
    """Next item: `auto` takes the full softmax up to `full_softmax_items` items."""
    full_softmax_items: int = Field(default=20_000, gt=0)
    num_negatives: int = Field(default=1024, gt=0)
    """Next item, sampled softmax: uniform negatives, shared by all positions of a step."""
    temperature: float = Field(default=0.05, gt=0)
    """Next item: divides the cosine of user vector and item embedding."""

    @model_validator(mode="after")
    def _tasks_fit_kind(self) -> ObjectiveConfig:
        if self.kind == "ranking" and not self.tasks:
            raise ValueError(
                "objective.tasks is empty: ranking needs at least one action to predict, e.g. tasks = ['is_click']"
            )
        if self.kind == "next_item" and self.tasks:
            raise ValueError(
                f"objective.tasks={list(self.tasks)} belongs to kind='ranking'; remove it for kind='next_item'"
            )
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"objective.tasks={list(self.tasks)} names a task twice; name each once")
        if self.task_weights and len(self.task_weights) != len(self.tasks):
            raise ValueError(
                f"objective.task_weights has {len(self.task_weights)} values for {len(self.tasks)} tasks; "
                "give one per task"
            )
        return self
