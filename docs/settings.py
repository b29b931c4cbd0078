"""Writes docs/settings.md from the configuration tree: `python docs/settings.py`; a test keeps the two equal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ultrarec.data.config import FeatureConfig, StochasticLengthConfig
from ultrarec.embeddings.config import EmbeddingOptimizerConfig
from ultrarec.model.config import ChannelConfig, RegressionConfig, TailConfig
from ultrarec.trainer.config import Config

TARGET = Path(__file__).with_suffix(".md")
HEAD = """# Every setting of a recipe

A recipe is one TOML file with these sections. `--set section.field=value` overrides any of them; the value is TOML,
and a bare word is taken as a string. Unknown names and values outside their rules are refused before anything starts.
This page is written from the code by `python docs/settings.py`.
"""
NESTED = {
    "data": {"features.<name>": FeatureConfig, "stochastic_length": StochasticLengthConfig},
    "embeddings": {"optimizer": EmbeddingOptimizerConfig},
    "model": {"tail": TailConfig, "channels.<name>": ChannelConfig},
    "objective": {"regressions.<column>": RegressionConfig},
}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, field in Config.model_fields.items():
        parts.append(_section(name, _model(field.annotation)))
        parts += [_section(f"{name}.{nested}", model) for nested, model in NESTED.get(name, {}).items()]
    return "\n".join(parts)


def _section(name: str, model: type[BaseModel]) -> str:
    lines = [
        f"## [{name}]",
        "",
        _one_line(model.__doc__ or ""),
        "",
        "| setting | type | default | meaning |",
        "|---|---|---|---|",
    ]
    lines += [_row(setting, field) for setting, field in model.model_fields.items()]
    return "\n".join(lines) + "\n"


def _row(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else "none" if field.default is None else f"`{field.default!r}`"
    if field.default_factory is not None:
        default = "derived"
    if isinstance(field.default, BaseModel) or field.default == {}:
        default = "see below" if isinstance(field.default, BaseModel) else "empty"
    kind = _type(field).replace("|", "\\|")
    return f"| `{name}` | {kind} | {default} | {_one_line(field.description or '')} |"


def _type(field: FieldInfo) -> str:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return " or ".join(f"`{value}`" for value in choices) or f"`{_name(field.annotation)}{_bounds(field.metadata)}`"


def _name(annotation: Any) -> str:
    """A type as a reader writes it: `tuple[float >= 0, ...]` where pydantic keeps a bound as metadata."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _name(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    names = ["..." if each is ... else _name(each) for each in arguments if each is not type(None)]
    if origin in (Union, UnionType):
        return " | ".join(names)
    own = getattr(origin or annotation, "__name__", str(annotation))
    return f"{own}[{', '.join(names)}]" if names else own


def _bounds(metadata: Iterable[Any]) -> str:
    rules = [rule for each in metadata for rule in (each.metadata if isinstance(each, FieldInfo) else [each])]
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [f"{sign} {getattr(rule, name)}" for rule in rules for name, sign in signs.items() if hasattr(rule, name)]
    return f" {' and '.join(found)}" if found else ""


def _model(annotation: Any) -> type[BaseModel]:
    assert issubclass(annotation, BaseModel)
    return annotation


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
