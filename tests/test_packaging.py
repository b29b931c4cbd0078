"""The wheel: complete, and the same from any folder."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("data", "embeddings", "kernels", "launch", "model", "trainer")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the checkout: setuptools leaves its build folder beside what it builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    (built,) = out.glob("ultrarec-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    return target


def test_the_wheel_holds_every_module_recipe_and_the_sample(wheel):
    shipped = set(zipfile.ZipFile(wheel).namelist())
    modules = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    others = [
        *ROOT.glob("trainer/recipes/*.toml"),
        *ROOT.glob("launch/studies/*.toml"),
        *(path for path in ROOT.glob("data/sample/*") if path.is_file()),
    ]
    assert others
    expected = {f"ultrarec/{path.relative_to(ROOT)}" for path in modules + others if "__pycache__" not in path.parts}
    assert expected - shipped == set()


def test_the_wheel_puts_nothing_beside_ultrarec(wheel):
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ultrarec"}


def test_the_wheel_works_in_a_folder_that_has_packages_of_the_same_names(installed, tmp_path):
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('imported the wrong {name}')\n")
    code = (
        f"import sys; sys.path.insert(1, {str(installed)!r})\n"
        "import ultrarec.data.schema, ultrarec.kernels, ultrarec.model.config, ultrarec.launch.cli as cli\n"
        f"assert cli.__file__.startswith({str(installed)!r}), cli.__file__\n"
        "cli.main(['launch', 'hstu_kuairand_sample', '--scheduler', 'slurm', '--dryrun'])\n"
    )
    # -S keeps the checkout, which is installed here too, from answering instead of the wheel.
    site = next(path for path in sys.path if path.endswith("site-packages"))
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.append({site!r})\n{code}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "-m ultrarec.trainer hstu_kuairand_sample" in done.stdout
