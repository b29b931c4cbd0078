"""The arrows between the folders: who may import whom, each violation named by file and line."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("data", "embeddings", "kernels", "launch", "model", "trainer")
SHARED_DATA = ("data.schema", "data.batch", "data.config", "data.errors")
EVERYWHERE = ("data", "embeddings", "kernels", "model", "trainer")

MAY_IMPORT = {
    "kernels": (),
    "data": (),
    "embeddings": ("kernels", *SHARED_DATA),
    "model": ("kernels", *SHARED_DATA),
    "trainer": ("data", "embeddings", "kernels", "model"),
    "launch": ("trainer.config", "data.errors"),
}
"""What a folder may import at module level, itself apart; a folder's name stands for all of its modules."""
MAY_IMPORT_IN_FUNCTIONS = {**MAY_IMPORT, "launch": EVERYWHERE}
LIGHT_FILES = ("config.py", "schema.py")
LIGHT_PACKAGES = ("pydantic", "tomli", "tomli_w")
LIGHT_OWN = ("config", "schema", "errors", "locations")
DOCSTRING_ONLY = tuple(folder for folder in FOLDERS if folder != "kernels")


@dataclass(frozen=True)
class Import:
    """One imported module: `data.schema` for ours, its full name for others'."""

    file: str
    line: int
    module: str
    is_ours: bool
    is_relative: bool
    in_function: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def imports_of(source: str, file: str) -> list[Import]:
    return list(_imports_below(ast.parse(source), file, in_function=False))


def _imports_below(node: ast.AST, file: str, *, in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for level, module in _modules(child):
            resolved = _resolve(file, level, module) if level else module
            ours = bool(level) or module.split(".")[0] in ("ultrarec", *FOLDERS)
            yield Import(file, child.lineno, resolved.removeprefix("ultrarec."), ours, bool(level), in_function)
        is_type_checking = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        # What only the type checker reads costs nothing at run time.
        yield from _imports_below(child, file, in_function=in_function or is_function or is_type_checking)


def _modules(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Every module that one statement imports; `from . import x` and `from ..data import x` name x as a module."""
    if isinstance(node, ast.Import):
        yield from ((0, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level and base in ("", *FOLDERS):
            yield from ((node.level, f"{base}.{alias.name}".lstrip(".")) for alias in node.names)
        else:
            yield node.level, base


def _resolve(file: str, level: int, module: str) -> str:
    package = list(Path(file).parent.parts)
    base = package[: len(package) - level + 1]
    return ".".join([*base, module])


def arrow_violations(imported: list[Import]) -> list[str]:
    violations = []
    for each in (each for each in imported if each.is_ours):
        folder = Path(each.file).parts[0]
        allowed = (MAY_IMPORT_IN_FUNCTIONS if each.in_function else MAY_IMPORT)[folder]
        if not any(f"{each.module}.".startswith(f"{start}.") for start in (folder, *allowed)):
            violations.append(f"{each}; {folder} may import {', '.join(allowed) or 'nothing of ours'}")
    return violations


def relative_violations(imported: list[Import]) -> list[str]:
    return [f"{each}; write it relative" for each in imported if each.is_ours and not each.is_relative]


def light_violations(imported: list[Import]) -> list[str]:
    violations = []
    for each in (each for each in imported if Path(each.file).name in LIGHT_FILES):
        first, last = each.module.split(".")[0], each.module.split(".")[-1]
        light = (
            any(name in each.module.split(".")[1:] for name in LIGHT_OWN)
            if each.is_ours
            else (first in sys.stdlib_module_names or first in LIGHT_PACKAGES)
        )
        if not light:
            violations.append(f"{each}; {last} is more than the standard library, pydantic and other configuration")
    return violations


@pytest.fixture(scope="module")
def all_imports() -> list[Import]:
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found += imports_of(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    assert len(found) > 50, "the checkout holds no source"
    return found


def test_folders_import_only_along_the_arrows(all_imports):
    assert arrow_violations(all_imports) == []


def test_the_package_imports_itself_relatively(all_imports):
    assert relative_violations(all_imports) == []


def test_configuration_and_schema_are_light(all_imports):
    assert light_violations(all_imports) == []


@pytest.mark.parametrize("folder", DOCSTRING_ONLY)
def test_init_is_one_docstring(folder):
    tree = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))
    assert len(tree.body) == 1
    assert ast.get_docstring(tree)


@pytest.mark.parametrize(
    ("file", "source", "named"),
    [
        ("kernels/ops/cpu.py", "\nfrom ...data import schema", "kernels/ops/cpu.py:2 imports data.schema"),
        ("data/reader.py", "from ..model import hstu", "data/reader.py:1 imports model.hstu"),
        ("embeddings/plan.py", "from ..data.loader import Loader", "embeddings/plan.py:1 imports data.loader"),
        ("model/hstu.py", "def f():\n    from ..embeddings import lookup", "model/hstu.py:2 imports embeddings.lookup"),
        ("launch/cli.py", "from ..data import prepare", "launch/cli.py:1 imports data.prepare"),
    ],
)
def test_a_wrong_arrow_is_named_by_file_and_line(file, source, named):
    (violation,) = arrow_violations(imports_of(source, file))
    assert violation.startswith(named)


@pytest.mark.parametrize(
    "statement", ["import ultrarec.data.schema", "from ultrarec.data import schema", "import data"]
)
def test_an_absolute_import_of_ourselves_is_found(statement):
    assert relative_violations(imports_of(statement, "trainer/loop.py"))


@pytest.mark.parametrize("statement", ["import torch", "import numpy as np", "from .batch import Batch"])
def test_a_heavy_import_in_a_configuration_is_found(statement):
    assert light_violations(imports_of(statement, "data/config.py"))
