"""The configuration tree: one TOML file, one validated value. Reading it needs no torch."""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..data.config import RETRY_SECONDS, DataConfig
from ..data.errors import UserError
from ..data.locations import redacted
from ..embeddings.config import EmbeddingsConfig, MomentDecay
from ..model.config import ModelConfig, ObjectiveConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"


class Section(BaseModel):
    """A frozen section that knows all its names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class OptimizerConfig(Section):
    """The `optimizer` section: AdamW for the dense weights, and the schedule that dense and sparse rates share."""

    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[MomentDecay, MomentDecay] = (0.9, 0.98)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of a step's dense gradients; those of tables are applied inside their backward, unclipped."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which every learning rate rises linearly from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Course from the end of the warm-up to the last step."""
    final_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """What `linear` and `cosine` decay to by the end of the run, over the highest learning rate."""


class TrainerConfig(Section):
    """The `trainer` section."""

    epochs: int | None = Field(default=None, gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    accumulate: int = Field(default=1, gt=0)
    """Loader batches per update of the dense weights; tables are updated in every backward pass."""
    log_every: int = Field(default=50, gt=0)
    """Steps between lines of metrics."""
    evaluate_every: int | None = Field(default=None, gt=0)
    """Steps between passes over the validation split; default: at the end only."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` runs the dense forward pass under autocast; weights, norms and losses stay fp32."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of initial weights and dropout."""
    timeout_seconds: int = Field(default=600, gt=0, le=7 * 24 * 3600)
    """How long a rank waits for the others before it gives up."""
    watchdog_seconds: float = Field(default=300, gt=0, le=7 * 24 * 3600)
    """How long a step may take, batch included, before the rank writes its stacks to `OUT/stacks/` and aborts."""
    max_skipped_batches: int = Field(default=10, ge=0)
    """Batches of the whole run that are skipped for an infinite or NaN loss or gradient; one more stops the run."""
    spike_factor: float = Field(default=3.0, gt=1)
    """A batch whose loss exceeds the median of the last 64 by this factor is reported with its rows."""

    @model_validator(mode="after")
    def _has_an_end(self) -> TrainerConfig:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("neither trainer.epochs nor trainer.max_steps is set; training needs an end: set one")
        return self


class CheckpointConfig(Section):
    """The `checkpoint` section."""

    every: int | None = Field(default=None, gt=0)
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = Field(default=2, gt=0)
    """Newest complete checkpoints that are kept; `ultrarec evaluate --checkpoint best` chooses among all kept ones."""
    keep_every: int | None = Field(default=None, gt=0)
    """Checkpoints of steps divisible by this are kept besides."""
    keep_best: int = Field(default=0, ge=0)
    """So many checkpoints with the best validation metrics are kept besides; it needs `trainer.evaluate_every` to meet
    `every`."""
    best_metric: str | None = None
    """Validation metric that tells which is best, e.g. `auc/is_click`; of `loss` and `ne/...` less is better. Default:
    `ndcg@10`, or the mean of all tasks' `ne`."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory as large as a rank's share of the run."""
    path: str | None = None
    """Where checkpoints lie instead of in the run folder: a folder, or an address such as `s3://bucket/run`."""
    start_from: str | None = None
    """A checkpoint folder, or run folder, with whose weights and table optimizer state a new run begins. Tables may be
    new or have more rows; ids must mean what they meant there."""


class LaunchConfig(Section):
    """The `launch` section: what one run asks of a cluster. Flags of `ultrarec launch` override it."""

    nodes: int = Field(default=1, gt=0)
    procs_per_node: int = Field(default=1, gt=0)
    gpus_per_node: int = Field(default=0, ge=0)
    cpus_per_node: int = Field(default=2, gt=0)
    memory_gib_per_node: int = Field(default=8, gt=0)
    image: str = "ultrarec:latest"
    """Container image, for schedulers that run one."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts in place, by torchrun, after a process failed or one of MIN:MAX nodes was lost; each continues from the
    newest complete checkpoint."""
    max_retries: int = Field(default=3, ge=0)
    """Restarts of the whole job by the scheduler, after torchrun has given up or a node was taken away."""
    grace_seconds: int = Field(default=120, gt=0)
    """Time to finish a step and save after SIGTERM, before torchrun kills; the scheduler's own limit must be longer."""


def _meet(first: int | None, second: int | None) -> bool:
    """Whether one of two periods is a multiple of the other."""
    return first is not None and second is not None and 0 in (first % second, second % first)


class Config(Section):
    """A whole run."""

    data: DataConfig
    embeddings: EmbeddingsConfig
    model: ModelConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _retries_end_before_the_watchdog(self) -> Config:
        retry, watchdog = self.data.retry_seconds, self.trainer.watchdog_seconds
        if retry != RETRY_SECONDS and retry >= watchdog:
            raise ValueError(
                f"data.retry_seconds={retry:g} is not shorter than trainer.watchdog_seconds={watchdog:g}, which would "
                "end the step that waits for the data; raise that, and trainer.timeout_seconds above it"
            )
        return self

    @model_validator(mode="after")
    def _kept_checkpoints_are_written(self) -> Config:
        checkpoint, evaluate_every = self.checkpoint, self.trainer.evaluate_every
        if checkpoint.keep_every is not None and (not checkpoint.every or checkpoint.keep_every % checkpoint.every):
            raise ValueError(
                f"checkpoint.keep_every={checkpoint.keep_every} is no multiple of checkpoint.every={checkpoint.every}, "
                "so that no save falls on it; set it to one"
            )
        if checkpoint.keep_best and not _meet(checkpoint.every, evaluate_every):
            raise ValueError(
                f"checkpoint.keep_best={checkpoint.keep_best} wants checkpoints of validated steps, but "
                f"checkpoint.every={checkpoint.every} and trainer.evaluate_every={evaluate_every} do not meet; set one "
                "to a multiple of the other"
            )
        return self

    @model_validator(mode="after")
    def _targets_train_where_they_are_scored(self) -> Config:
        num_targets, model = self.data.targets_per_sample, self.model
        place = f"data.targets_per_sample={num_targets}: later targets of a sample would train further from the history"
        if num_targets == 1 or self.objective.kind != "ranking":
            return self
        if model.relative_bias != "none":
            raise ValueError(
                f"{place} than they are scored, as model.relative_bias={model.relative_bias!r} counts targets too; use "
                "1 target, or relative_bias='none' with model.position_encoding and model.time_encoding"
            )
        if model.backbone == "fuxi_alpha":
            raise ValueError(
                f"{place} than they are scored, as model.backbone='fuxi_alpha' counts targets too; use 1 target, or "
                "another backbone"
            )
        return self

    def to_toml(self) -> str:
        """This configuration as a TOML text that `load_config` reads back to an equal value."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def training_hash(self) -> str:
        """Identity of what a checkpoint belongs to: model, tables, objective, and the order of the data."""
        return hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()[:16]

    def training_differences(self, other: Config) -> dict[str, tuple[Any, Any]]:
        """Of what `training_hash` is made of: the settings that differ, with the value here and the other's."""
        own, others = _flat(self._identity()), _flat(other._identity())
        names = sorted(own.keys() | others.keys())
        return {name: (own.get(name), others.get(name)) for name in names if own.get(name) != others.get(name)}

    def _identity(self) -> dict[str, Any]:
        identity = self.model_dump(mode="json", include={"data", "embeddings", "model", "objective"})
        for name in ("path", "evaluate_rows", "threads", "prefetch", "bad_data", "retry_seconds", "audit"):
            del identity["data"][name]
        for name in ("sharding", "hbm_gib"):
            del identity["embeddings"][name]
        return identity


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings by their names as `--set` takes them."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of a recipe name or of a TOML file.

    Args:
        recipe: name of a recipe, or path of a file that ends in `.toml`.
        overrides: `section.field=value` strings with TOML values; a bare word is taken as a string, and nothing after
            the `=` takes the setting out of the recipe, back to its default.

    Raises:
        UserError: nothing is found under that name, the TOML does not parse, or a value breaks a rule.
    """
    path = Path(recipe) if recipe.endswith(".toml") else _recipe_path(recipe)
    tree = _parse(_read(path), source=str(path))
    for override in overrides:
        _override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        # A default that is made of a value that is wrong is no further mistake of the user's.
        problems = [each for each in error.errors() if each["type"] != "default_factory_not_called"]
        raise UserError(f"{path}: " + "; ".join(_explain(problem) for problem in problems)) from None


def _recipe_path(name: str) -> Path:
    known = list_recipes()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"no recipe {name!r}; {hint}recipes: {', '.join(known)}; a file of your own must end in .toml")
    return RECIPES / f"{name}.toml"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); a configuration is TOML"
        ) from None


def _parse(text: str, *, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{source} is not valid TOML: {error}") from None


def _override(tree: dict[str, Any], override: str) -> None:
    """Set one `section.field=value` in the tree, in place, or remove it where there is no value."""
    name, separator, text = override.partition("=")
    parts = name.strip().split(".")
    if not separator or len(parts) < 2 or not all(parts):
        raise UserError(
            f"--set {redacted(repr(override))}: expected section.field=value, e.g. --set trainer.max_steps=100"
        )
    section = tree
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise UserError(f"--set {redacted(repr(override))}: {part!r} is a value, not a section")
    if text.strip():
        section[parts[-1]] = _toml_value(text.strip())
    elif section.pop(parts[-1], None) is None:
        raise UserError(f"--set {override!r}: the recipe does not set {name.strip()}, so there is nothing to remove")


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        # A shell eats quotes; names such as full_softmax or a path need none here.
        return text


def _explain(problem: Any) -> str:
    """One line for one pydantic problem: place, rule, value."""
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{place} is no known setting; {_known_names(problem['loc'])}"
    if problem["type"] == "missing":
        return f"{place} is missing; set it"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error":
        # A section's own rules name their settings in full; below it, the place says which feature is meant.
        return message if len(problem["loc"]) < 2 else f"{place}: {message}"
    return f"{place}={redacted(repr(problem['input']))}: {message[:1].lower()}{message[1:]}"


def _known_names(place: tuple[Any, ...]) -> str:
    """What could have stood at a place where an unknown name was found."""
    model: Any = Config
    for part in place[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        model = field.annotation if field is not None else None
    names = sorted(getattr(model, "model_fields", {}))
    close = difflib.get_close_matches(str(place[-1]), names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(names)}" if names else "remove it"
