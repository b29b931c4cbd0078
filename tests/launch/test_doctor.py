"""Installations are broken for real here: other packages in front on the path, blocked modules, a driver that lies."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ultrarec.launch import doctor

CONSTRAINTS = Path(__file__).parents[2] / "constraints"


@pytest.fixture
def front(tmp_path, monkeypatch) -> Path:
    """A folder that is searched before the installed packages, here and in every process started from here."""
    folder = tmp_path / "front"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def add_distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def faults(check) -> list[doctor.Finding]:
    return [finding for finding in check() if finding.level == "FAIL"]


def test_a_sound_installation_is_called_sound(capsys):
    code = doctor.run(None)
    report = capsys.readouterr().out
    assert code == 0, report
    assert "OK   fbgemm operators load and compute\n" in report
    assert "OK   two processes all-reduce over gloo\n" in report
    assert report.endswith("all is well\n")


def test_a_broken_installation_exits_1_and_numbers_its_faults(front):
    (front / "torch.py").write_text("raise ImportError('libtorch.so: file too short')")
    command = [sys.executable, "-m", "ultrarec.launch.cli", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 1
    assert "FAIL fbgemm operators do not load: ImportError: libtorch.so: file too short" in done.stdout
    assert "FAIL two processes cannot talk over gloo: ImportError" in done.stdout
    assert re.search(r"\n[2-9] fault\(s\)\n", done.stdout)


def test_both_builds_of_fbgemm_are_told_apart(front):
    add_distribution(front, "fbgemm-gpu", "1.9.0")
    add_distribution(front, "fbgemm-gpu-cpu", "1.8.0")
    (fault,) = faults(doctor.check_fbgemm_builds)
    assert "both installed" in fault.text
    assert fault.remedy.startswith("pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && pip install --no-deps fbgemm-gpu")


def test_a_version_that_does_not_fit_is_named_with_the_one_that_does(front):
    add_distribution(front, "torch", "2.12.1")
    (fault,) = faults(doctor.check_versions)
    assert fault == doctor.Finding(
        "FAIL", "torch 2.12.1; 2.13.0 is the version that works", "pip install torch==2.13.0"
    )


def test_another_major_version_is_only_a_warning(front):
    add_distribution(front, "duckdb", "9.0.0")
    (warning,) = [finding for finding in doctor.check_versions() if finding.level == "WARN"]
    assert warning.text == "duckdb 9.0.0; tested with 2.x"


@pytest.mark.parametrize(
    ("module", "text", "remedy"),
    [
        (
            "raise OSError('fbgemm_gpu_py.so: undefined symbol: _ZN3c104impl')",
            "built for another torch (ABI mismatch)",
            "pip install torch==2.13.0 && pip install --no-deps fbgemm-gpu",
        ),
        (
            "raise OSError('libcudart.so.13: cannot open shared object file: No such file or directory')",
            "the CUDA build of fbgemm cannot load here",
            "pip install --no-deps fbgemm-gpu-cpu==1.8.0",
        ),
        ("import os; os.abort()", "crashed with SIGABRT", "pip install --no-deps fbgemm-gpu"),
    ],
)
def test_fbgemm_that_does_not_load_is_explained(front, module, text, remedy):
    (front / "torch.py").write_text("")
    (front / "fbgemm_gpu.py").write_text(module)
    (fault,) = faults(doctor.check_fbgemm_ops)
    assert text in fault.text
    assert remedy in fault.remedy


@pytest.mark.parametrize(("name", "check"), [("torchrec", doctor.check_torchrec), ("triton", doctor.check_triton)])
def test_a_module_that_does_not_import_is_named(front, name, check):
    (front / f"{name}.py").write_text("import no_such_module")
    (fault,) = faults(check)
    assert fault.text == f"{name} does not import: ModuleNotFoundError: No module named 'no_such_module'"
    assert f"{name}==" in fault.remedy


def test_a_network_interface_that_does_not_exist_breaks_gloo(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_if")
    (fault,) = faults(doctor.check_gloo)
    assert "GLOO_SOCKET_IFNAME" in fault.remedy


def test_a_driver_without_a_usable_device_is_a_warning(front, tmp_path, monkeypatch):
    (front / "torch.py").write_text(
        "__version__ = '2.13.0+cpu'\nclass cuda:\n    is_available = staticmethod(lambda: False)\n"
    )
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (warning,) = doctor.check_gpu()
    assert (warning.level, warning.remedy) == ("WARN", "install the CUDA stack: make clean env")
    assert "torch 2.13.0+cpu sees no CUDA device" in warning.text


@pytest.mark.parametrize("flavour", ["cpu", "cuda"])
def test_the_versions_checked_are_the_versions_installed(flavour):
    pins = re.findall(r"^([a-z0-9-]+)===?([^;\s]+)", (CONSTRAINTS / f"{flavour}.txt").read_text(), re.MULTILINE)
    fbgemm = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}[flavour]
    wanted = {**doctor.MUST_MATCH, fbgemm: doctor.FBGEMM}
    assert set(wanted.items()) <= set(pins)
    assert {name for name, _ in pins if name.startswith("fbgemm")} == {fbgemm}
    for name, major in doctor.TESTED.items():
        assert major in {version.split(".")[0] for pinned, version in pins if pinned == name}
