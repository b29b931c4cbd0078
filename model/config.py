"""The model and what it is trained for: the `model` and `objective` sections of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_COLUMNS = 2**16
MOST_EVENTS = 2**20


def _own_width(values: dict[str, Any]) -> int:
    return int(values["width"])


def _own_share(values: dict[str, Any]) -> int:
    return max(1, int(values["width"]) // int(values["num_heads"]))


class TailConfig(BaseModel):
    """Attention truncation (ULTRA-HSTU, arXiv 2602.16986): further layers that read the newest events only."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    num_layers: int = Field(gt=0, le=1024)
    """Layers after the `model.num_layers` that read the whole history."""
    num_events: int = Field(gt=0, le=MOST_EVENTS)
    """L', the newest events of the history that these layers keep; contextual tokens and targets stay too. Older
    tokens leave as the layers before made them."""
    window: int = Field(default=0, ge=0, le=MOST_EVENTS)
    """As `model.window`, for these layers."""
    full_tail: int = Field(default=0, ge=0, le=MOST_EVENTS)
    """As `model.full_tail`, for these layers."""
    prefix: int = Field(default=0, ge=0, le=MOST_EVENTS)
    """As `model.prefix`, for these layers."""

    @model_validator(mode="after")
    def _window_is_set(self) -> TailConfig:
        _check_window("model.tail", self)
        return self


class ChannelConfig(BaseModel):
    """Mixture of transducers (ULTRA-HSTU, arXiv 2602.16986): one of several stacks, and the events that it reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    actions: tuple[str, ...] = Field(min_length=1)
    """The events of the history with any of these actions; contextual tokens and targets are read by every channel."""
    num_events: int = Field(gt=0, le=MOST_EVENTS)
    """The newest of them that are read."""
    num_layers: int | None = Field(default=None, gt=0, le=1024)
    """Layers of this stack; default: `model.num_layers`. All else is that of `model`."""

    def action_mask(self, actions: tuple[str, ...]) -> int:
        """The bits of this channel's actions; `actions` are the dataset's, in the order of theirs."""
        return sum(1 << actions.index(action) for action in self.actions)


class ModelConfig(BaseModel):
    """The `model` section. The defaults are the layer of the HSTU paper (arXiv 2402.17152, section 3)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    backbone: Literal["hstu", "sasrec", "llama", "fuxi_alpha", "din", "stca"] = "hstu"
    """What stands between input tokens and head. `din` and `stca` let targets read the history: ranking only."""
    width: int = Field(gt=0, le=MOST_COLUMNS)
    """E, the width of a token inside the backbone."""
    num_layers: int = Field(gt=0, le=1024)
    num_heads: int = Field(default=1, gt=0, le=1024)
    qk_dim: int = Field(default_factory=_own_share, gt=0, le=MOST_COLUMNS)
    """Columns of q and k per head; default: width / num_heads."""
    value_dim: int = Field(default_factory=_own_share, gt=0, le=MOST_COLUMNS)
    """Columns of v, and of the gate u, per head; default: width / num_heads."""
    ffn_width: int = Field(default_factory=_own_width, gt=0, le=MOST_COLUMNS)
    """Hidden width of the feed-forward networks, and of `din`'s activation unit; `hstu` has none. Default: width."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the input tokens and before every output projection."""
    activation: Literal["uvqk", "u"] = "uvqk"
    """What SiLU is applied to after the projection: all four parts (the paper) or the gate only (industrial)."""
    attention: Literal["silu", "softmax"] = "silu"
    """What makes weights of scores: SiLU / N (the paper), or softmax, an ablation that pads the batch."""
    gating: Literal["norm_times_u", "concat", "none"] = "norm_times_u"
    """What the output projection reads: norm(attention) * u (the paper), [u, attention, norm(attention) * u], or, as
    an ablation without u, norm(attention)."""
    norm: Literal["layer_norm", "group_norm"] = "layer_norm"
    """Normalisation of the attention output: over all heads, or per head."""
    norm_affine: bool = False
    """Learn scale and shift of the norms (the industrial variant)."""
    projection_bias: bool = False
    """Add a bias to the u, v, q, k projection (the industrial variant)."""
    attention_alpha: Literal["one", "rsqrt", "reciprocal"] = "one"
    """Factor of <q, k>: 1 (research variant), 1/sqrt(qk_dim) (industrial variant) or 1/qk_dim (the authors' layers for
    16k events)."""
    relative_bias: Literal["none", "position", "position_time"] = "none"
    """Bias added to the scores in every layer, shared by its heads. It counts positions one by one, targets too: with
    several targets per sample, later ones would stand further from the history than when scored alone, which is
    refused."""
    rope: bool = False
    """Rotate q and k by their position (arXiv 2104.09864); all targets of a sample share one."""
    window: int = Field(default=0, ge=0, le=MOST_EVENTS)
    """K1 of semi-local attention (ULTRA-HSTU): a token sees itself and so many before it; 0 is all of them."""
    full_tail: int = Field(default=0, ge=0, le=MOST_EVENTS)
    """K2 of semi-local attention: the newest events of the history that, like targets, see beyond the window."""
    prefix: int = Field(default=0, ge=0, le=MOST_EVENTS)
    """K2 in its other reading: the oldest tokens that every token sees from beyond the window; targets see all."""
    tail: TailConfig | None = None
    """Attention truncation: more layers, over the newest events only."""
    channels: dict[str, ChannelConfig] = {}
    """Mixture of transducers, by name: a stack for each channel instead of one for all events (ranking only)."""
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
    tokens: Literal["merged", "interleaved"] = "merged"
    """An event of the history is one token, content plus action (ULTRA-HSTU), or two, content then action (HSTU's
    first form: twice the length, four times the attention). Windows then count tokens."""
    target_action: Literal["zero", "learned"] = "zero"
    """What stands for the action of a target, whose own is the label: nothing (ULTRA-HSTU), or a learned vector
    (the authors' industrial variant)."""
    token_hidden: int | None = Field(default=None, gt=0, le=MOST_COLUMNS)
    """Hidden width of the MLPs that make a token from item, features and actions; without it embeddings are summed,
    which needs embeddings.dim == model.width."""

    @model_validator(mode="after")
    def _settings_fit_the_backbone(self) -> ModelConfig:
        if self.backbone != "hstu":
            for name in HSTU_SETTINGS:
                value, default = getattr(self, name), ModelConfig.model_fields[name].default
                if value != default:
                    raise ValueError(
                        f"model.{name}={value!r} belongs to backbone='hstu', and backbone={self.backbone!r} would "
                        "ignore it; remove it"
                    )
        if self.backbone == "din" and self.num_layers != 1:
            raise ValueError(f"model.num_layers={self.num_layers}, but backbone='din' has one layer; set it to 1")
        return self

    @model_validator(mode="after")
    def _attention_settings_agree(self) -> ModelConfig:
        _check_window("model", self)
        if (self.rope or self.backbone == "llama") and self.qk_dim % 2:
            raise ValueError(f"model.qk_dim={self.qk_dim} is odd; rotary positions turn pairs of columns: make it even")
        if self.tokens == "interleaved" and self.target_action == "learned":
            raise ValueError(
                "model.target_action='learned' is part of a target's token, and with model.tokens='interleaved' "
                "actions have tokens of their own; use 'zero'"
            )
        if self.gating == "none" and self.activation == "u":
            raise ValueError("model.activation='u' activates a gate that model.gating='none' leaves out; use 'uvqk'")
        return self


HSTU_SETTINGS = (
    *("activation", "attention", "gating", "norm", "projection_bias", "attention_alpha", "relative_bias", "rope"),
    *("window", "full_tail", "prefix", "tail", "channels", "rematerialize", "fp8_projections"),
)
"""Settings that the other backbones do not read."""


def _check_window(place: str, layers: TailConfig | ModelConfig) -> None:
    """Refuse exemptions from a window that is not there."""
    for name in ("full_tail", "prefix"):
        value = getattr(layers, name)
        if value and not layers.window:
            raise ValueError(
                f"{place}.{name}={value} exempts tokens from a window, and {place}.window=0 is none; set {place}.window"
            )


class RegressionConfig(BaseModel):
    """One task of ranking that predicts a number: the value of an event column at a target, with squared error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    scale: Literal["log", "linear"] = "log"
    """What is predicted of a value v: log(1 + v), for times and counts, which span orders of magnitude, or v itself."""
    weight: float = Field(default=1.0, ge=0)
    """Weight of the task's squared error beside the other tasks."""


class ObjectiveConfig(BaseModel):
    """The `objective` section."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    kind: Literal["ranking", "next_item"]
    tasks: tuple[str, ...] = ()
    """Ranking: names of the dataset's actions to predict, each a binary task."""
    task_weights: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Ranking: weight of each task's loss; all 1 when empty."""
    regressions: dict[str, RegressionConfig] = {}
    """Ranking: further tasks, each named by the event column whose value it predicts. A missing value, and on a
    logarithmic scale a negative one, is no label."""
    head_hidden: int = Field(default=128, gt=0, le=MOST_COLUMNS)
    """Hidden width of the prediction head, and of `similarity = "mlp"`."""
    num_experts: int = Field(default=0, ge=0, le=1024)
    """Ranking: hidden layers of the head, which each task mixes by a gate of its own (MMoE, KDD 2018); 0 is a single
    one that all tasks share."""
    loss: Literal["full_softmax", "sampled_softmax", "bce"] = "full_softmax"
    """Next item: softmax over all items, which is dear from tens of thousands on; over the item that followed and
    negatives; or `bce`, which judges that item and negatives one by one, as SASRec does."""
    num_negatives: int = Field(default=1024, gt=0)
    """Next item, sampled softmax and bce: uniform negatives."""
    negatives_shared_by: Literal["step", "sample", "position"] = "step"
    """Next item: whose positions are compared with the same negatives, all of a step, which costs least, or those of
    each sample (sampled softmax only), so that a step of few negatives still meets most of a small catalogue. With
    `position` (sampled softmax only) each draws its own, as HSTU's public recipes do: scores then are no matrix product
    of many rows, and cost the most."""
    num_in_batch: int = Field(default=0, ge=0)
    """Next item, sampled softmax: so many further negatives, labels of other positions of this rank's step. They are
    items as often as these are popular; each negative's score is then corrected by how often it is expected."""
    similarity: Literal["dot", "mlp"] = "dot"
    """Next item: how a user vector and an item embedding, both of length 1, become a score: their dot product, or, with
    `mlp`, that with a learned weight per column plus a hidden layer of `head_hidden` units which reads both (NeuMF,
    arXiv 1708.05031). It costs a pass over all scores for every unit: choose few, and a sampled loss."""
    temperature: float = Field(default=0.05, gt=0)
    """Next item: divides the similarity of user vector and item embedding."""

    @model_validator(mode="after")
    def _tasks_fit_kind(self) -> ObjectiveConfig:
        if self.kind == "ranking" and not (self.tasks or self.regressions):
            raise ValueError(
                "objective.tasks is empty: ranking needs at least one action to predict, e.g. tasks = ['is_click'], "
                "or one of objective.regressions"
            )
        for name, tasks in (("tasks", self.tasks), ("regressions", self.regressions)):
            if self.kind == "next_item" and tasks:
                raise ValueError(
                    f"objective.{name}={list(tasks)} belongs to kind='ranking'; remove it for kind='next_item'"
                )
        if self.kind == "ranking" and self.similarity != "dot":
            raise ValueError(
                f"objective.similarity={self.similarity!r} belongs to kind='next_item'; remove it for kind='ranking'"
            )
        if both := sorted(set(self.tasks) & set(self.regressions)):
            raise ValueError(f"objective.tasks and objective.regressions both name {both}; a task is one or the other")
        if self.num_in_batch and self.loss != "sampled_softmax":
            raise ValueError(
                f"objective.num_in_batch={self.num_in_batch} adds negatives to loss='sampled_softmax', and "
                f"objective.loss={self.loss!r} would ignore them; set that loss, or num_in_batch to 0"
            )
        if self.negatives_shared_by == "position" and self.loss == "bce":
            raise ValueError(
                "objective.negatives_shared_by='position' is for loss='sampled_softmax', and objective.loss='bce'; "
                "use 'step'"
            )
        if self.negatives_shared_by == "sample" and (self.loss == "bce" or self.num_in_batch):
            raise ValueError(
                "objective.negatives_shared_by='sample' is for loss='sampled_softmax' without num_in_batch, and "
                f"objective.loss={self.loss!r}, objective.num_in_batch={self.num_in_batch}; use 'step'"
            )
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"objective.tasks={list(self.tasks)} names a task twice; name each once")
        if self.task_weights and len(self.task_weights) != len(self.tasks):
            raise ValueError(
                f"objective.task_weights has {len(self.task_weights)} values for {len(self.tasks)} tasks; "
                "give one per task"
            )
        return self
