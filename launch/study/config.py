"""What a study is, in one TOML file of `launch/studies/`: what it compares, and what of that is reported."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ...data.errors import UserError
from ...trainer.config import Config, load_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STUDIES = Path(__file__).parents[1] / "studies"
Name = Annotated[str, Field(pattern="^[a-z0-9_]+$")]
"""Also the name of a folder or file."""


class Part(BaseModel):
    """A frozen part of a study that knows all its names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Variant(Part):
    """One of the models that a study compares."""

    label: str
    """How the page calls it."""
    recipe: str
    set: tuple[str, ...] = ()
    """Settings over the recipe, as `--set` takes them."""
    series: str = ""
    """Variants of one series are joined by a line in pictures."""

    def overrides(self, *, data: str, seed: int) -> list[str]:
        """All settings over the recipe of one run of this variant."""
        return [*self.set, f"data.path={json.dumps(data)}", f"trainer.seed={seed}", f"data.seed={seed}"]

    def config(self, *, data: str, seed: int) -> Config:
        """The whole configuration of one run."""
        return load_config(self.recipe, self.overrides(data=data, seed=seed))


class Published(Part):
    """Figures of others, shown beside ours."""

    label: str
    source: str
    metrics: dict[str, float]


class PublishedTable(Part):
    """Figures of others in a setting that is not the study's: a table apart, so that nobody takes its rows for ours."""

    title: str
    setting: str
    """What differs from the study's own."""
    source: str
    columns: tuple[str, ...] = Field(min_length=2)
    rows: tuple[tuple[str, ...], ...] = Field(min_length=1)
    """As they are shown."""

    @model_validator(mode="after")
    def _rows_fill_the_columns(self) -> PublishedTable:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {list(row)} of {self.title!r} has {len(row)} cells for {len(self.columns)} columns; "
                    "give one per column, '' where nothing was published"
                )
        return self


class Picture(Part):
    """Quality of every variant against what it costs."""

    name: Name
    x: Literal["train_mflop", "inference_mflop", "max_history"]
    y: str
    """One of the study's `metrics`."""


class QualityStudy(Part):
    """Variants that are trained on one dataset and compared on its test split."""

    kind: Literal["quality"]
    title: str
    about: str
    """Shown in front of the table."""
    prepare: str
    """The commands that make its dataset."""
    seeds: int = Field(default=1, gt=0)
    """Runs of each variant, from seed 0 on."""
    checkpoint: Literal["latest", "best"] = "latest"
    """What is tested; the best one is chosen on the validation split."""
    metrics: tuple[str, ...] = Field(min_length=1)
    """Of the test split, in the order of columns."""
    variants: dict[Name, Variant] = Field(min_length=1)
    published: tuple[Published, ...] = ()
    published_tables: tuple[PublishedTable, ...] = ()
    pictures: tuple[Picture, ...] = ()

    @property
    def parts(self) -> list[str]:
        """What `--only` may name."""
        return list(self.variants)

    @model_validator(mode="after")
    def _pictures_show_metrics(self) -> QualityStudy:
        for picture in self.pictures:
            if picture.y not in self.metrics:
                raise ValueError(
                    f"picture {picture.name!r} shows y={picture.y!r}, which is not in metrics="
                    f"{list(self.metrics)}; name one of these, or add it"
                )
        return self


class ComputeStudy(Part):
    """Two variants whose steps are timed, side by side, on random histories of given lengths."""

    kind: Literal["compute"]
    title: str
    about: str
    lengths: tuple[Annotated[int, Field(gt=0)], ...] = Field(min_length=1)
    """Events of a user's history."""
    targets: int = Field(gt=0)
    """Items that are scored behind each history."""
    users: int = Field(default=1, gt=0)
    """Of a step."""
    repeats: int = Field(default=3, gt=0)
    """Timed steps of each variant, in turns, after one that warms up; the median counts."""
    variants: dict[Name, Variant] = Field(min_length=2, max_length=2)
    """The second is compared with the first."""
    published_tables: tuple[PublishedTable, ...] = ()

    @property
    def parts(self) -> list[str]:
        """What `--only` may name."""
        return [str(length) for length in self.lengths]

    @model_validator(mode="after")
    def _lengths_differ(self) -> ComputeStudy:
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"lengths={list(self.lengths)} names a length twice; name each once")
        return self


Study = QualityStudy | ComputeStudy


def list_studies() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(path.stem for path in STUDIES.glob("*.toml"))


def load_study(name: str) -> Study:
    """A study of the package by name, or a TOML file.

    Raises:
        UserError: nothing is found under that name, or the file breaks a rule.
    """
    path = Path(name) if name.endswith(".toml") else _path_of(name)
    try:
        return study_of(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"cannot read the study {path}: {error.strerror}; check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, each['loc']))}: {each['msg']} (value {each['input']!r})" for each in error.errors()
        )
        raise UserError(f"{path}: {'; '.join(problems)}") from None


def study_of(tree: object) -> Study:
    """The study that a tree of plain values describes; raises pydantic's ValidationError."""
    adapter: TypeAdapter[Study] = TypeAdapter(Annotated[Study, Field(discriminator="kind")])
    return adapter.validate_python(tree)


def chosen_parts(study: Study, only: Sequence[str]) -> list[str]:
    """The parts of the study that are named, or all of them."""
    for name in only:
        if name not in study.parts:
            raise UserError(f"--only {name}: this study has {', '.join(study.parts)}")
    return [name for name in study.parts if not only or name in only]


def _path_of(name: str) -> Path:
    known = list_studies()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"no study {name!r}; {hint}studies: {', '.join(known)}; a file of your own must end in .toml")
    return STUDIES / f"{name}.toml"
