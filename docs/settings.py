"""Writes docs/settings.md from the configuration tree: `python docs/settings.py`; a test keeps the two equal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

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
    kind = _type(field.annotation).replace("|", "\\|")
    return f"| `{name}` | {kind} | {default} | {_one_line(field.description or '')} |"


def _type(annotation: Any) -> str:
    text = getattr(annotation, "__name__", None) if not get_args(annotation) else None
    text = text or str(annotation)
    text = re.sub(r"typing\.|ultrarec\.\w+\.config\.|pydantic\.fields\.", "", text).replace(" | None", "")
    if text.startswith("Literal["):
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    return f"`{text}`"


def _model(annotation: Any) -> type[BaseModel]:
    assert issubclass(annotation, BaseModel)
    return annotation


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
