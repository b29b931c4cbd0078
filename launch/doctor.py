"""`ultrarec doctor`: is this installation sound, and if not, what mends it. Imports the standard library only.

Whatever may crash when it is loaded is loaded in another process, so that a crash is a finding like any other.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MUST_MATCH = {
    "torch": "2.13.0",
    "torchrec": "1.8.0",
    "triton": "3.7.1",
    "torchx": "0.7.0",
    "torchmetrics": "1.0.3",
}
"""Versions that work together; torch, fbgemm and torchrec share compiled interfaces that change with every release."""
FBGEMM = "1.8.0"
TESTED = {"pyarrow": "26", "duckdb": "2", "pydantic": "2", "numpy": "2"}
"""Major versions that the tests ran with."""
NO_DEPS = ("torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")
PROBE_SECONDS = 180
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: str
    """OK, WARN (it works, with less) or FAIL (it does not)."""
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        """The line, and the remedy on one below."""
        return f"{self.level:<5}{self.text}" + (f"\n     -> {self.remedy}" if self.remedy else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`ultrarec doctor` takes no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print every finding as it is made; returns 1 when one of them is a FAIL."""
    failures = 0
    for check in CHECKS:
        for finding in check():
            print(finding, flush=True)
            failures += finding.level == "FAIL"
    print(f"\n{failures} fault(s)" if failures else "\nall is well")
    return int(failures > 0)


def check_python() -> Iterator[Finding]:
    """Interpreter and system."""
    text = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        yield Finding("FAIL", text, "use Python 3.10 to 3.12")
    elif (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        yield Finding("WARN", text, "only Linux on x86_64 is tested; fbgemm has builds for few other systems")
    else:
        yield Finding("OK", text)


def check_versions() -> Iterator[Finding]:
    """Installed versions against those that work together."""
    for name, wanted in MUST_MATCH.items():
        found = _version(name)
        if found is None:
            yield Finding("FAIL", f"{name} is not installed", _install(name, wanted))
        elif found.split("+")[0] != wanted:
            yield Finding("FAIL", f"{name} {found}; {wanted} is the version that works", _install(name, wanted))
        else:
            yield Finding("OK", f"{name} {found}")
    for name, major in TESTED.items():
        found = _version(name)
        if found is None:
            yield Finding("FAIL", f"{name} is not installed", f"pip install '{name}=={major}.*'")
        elif found.split(".")[0] != major:
            yield Finding("WARN", f"{name} {found}; tested with {major}.x", f"pip install '{name}=={major}.*'")
        else:
            yield Finding("OK", f"{name} {found}")


def check_fbgemm_builds() -> Iterator[Finding]:
    """Exactly one build of fbgemm: both lie in one folder, and the one installed last spoils the other."""
    found = {name: _version(name) for name in ("fbgemm-gpu", "fbgemm-gpu-cpu")}
    present = [name for name, value in found.items() if value is not None]
    wanted = "fbgemm-gpu" if _has_gpu() else "fbgemm-gpu-cpu"
    if len(present) == 2:
        yield Finding(
            "FAIL",
            "fbgemm-gpu and fbgemm-gpu-cpu are both installed, and have overwritten each other's files",
            f"pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && {_install(wanted, FBGEMM)}",
        )
    elif not present:
        yield Finding("FAIL", "fbgemm is not installed", _install(wanted, FBGEMM))
    elif found[present[0]] != FBGEMM:
        text = f"{present[0]} {found[present[0]]}; torch {MUST_MATCH['torch']} needs {FBGEMM}"
        yield Finding("FAIL", text, _install(present[0], FBGEMM))
    else:
        yield Finding("OK", f"{present[0]} {FBGEMM}")


def check_fbgemm_ops() -> Iterator[Finding]:
    """The compiled operators of fbgemm load and run."""
    code = (
        "import torch, fbgemm_gpu\n"
        "sums = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([2, 3]))\n"
        "assert sums.tolist() == [0, 2, 5], sums"
    )
    fault = _probe(code)
    if fault is None:
        yield Finding("OK", "fbgemm operators load and compute")
    elif "undefined symbol" in fault:
        remedy = f"{_install('torch', MUST_MATCH['torch'])} && {_install(_fbgemm_build(), FBGEMM)}"
        yield Finding("FAIL", f"fbgemm was built for another torch (ABI mismatch): {fault}", remedy)
    elif re.search(r"lib(cuda|cu|nv)\w*\.so\S*: cannot open shared object", fault):
        remedy = f"pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && {_install('fbgemm-gpu-cpu', FBGEMM)}"
        yield Finding("FAIL", f"the CUDA build of fbgemm cannot load here: {fault}", remedy)
    else:
        yield Finding("FAIL", f"fbgemm operators do not load: {fault}", _install(_fbgemm_build(), FBGEMM))


def check_torchrec() -> Iterator[Finding]:
    """TorchRec imports, the parts that training uses included."""
    fault = _probe(
        "import torchrec\nfrom torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist"
    )
    if fault is None:
        yield Finding("OK", "torchrec imports")
    else:
        remedy = f"{_install('torchrec', MUST_MATCH['torchrec'])}; `make env` installs all that it needs"
        yield Finding("FAIL", f"torchrec does not import: {fault}", remedy)


def check_triton() -> Iterator[Finding]:
    """Triton imports; on CPU too, where its interpreter runs the kernels."""
    fault = _probe("import triton, triton.language")
    if fault is None:
        yield Finding("OK", "triton imports")
    else:
        yield Finding("FAIL", f"triton does not import: {fault}", _install("triton", MUST_MATCH["triton"]))


def check_gpu() -> Iterator[Finding]:
    """Driver and devices, where there is a driver."""
    if not _has_gpu():
        yield Finding("OK", "no NVIDIA driver answers: CPU only")
        return
    fault = _probe("import torch\nassert torch.cuda.is_available(), f'torch {torch.__version__} sees no CUDA device'")
    if fault is not None:
        yield Finding("WARN", f"an NVIDIA driver answers, but {fault}", "install the CUDA stack: make clean env")
    elif _version("fbgemm-gpu") is None:
        remedy = f"pip uninstall -y fbgemm-gpu-cpu && {_install('fbgemm-gpu', FBGEMM)}"
        yield Finding("WARN", "torch sees CUDA devices, but fbgemm is the CPU build", remedy)
    else:
        devices = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        yield Finding("OK", f"{len(devices.splitlines())} CUDA device(s): {devices.split(' (')[0]}")


def check_gloo() -> Iterator[Finding]:
    """Two processes form a gloo group on the loopback interface and add a number."""
    code = (
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.tensor([dist.get_rank() + 1.0])\n"
        "dist.all_reduce(total)\n"
        "assert total.item() == 3, total\n"
        "dist.destroy_process_group()"
    )
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [_start(code, {**group, "RANK": str(rank)}) for rank in range(2)]
    faults = [fault for fault in map(_finish, ranks) if fault is not None]
    if faults:
        remedy = "check that localhost resolves to the loopback address, and that GLOO_SOCKET_IFNAME is right if set"
        yield Finding("FAIL", f"two processes cannot talk over gloo: {faults[0]}", remedy)
    else:
        yield Finding("OK", "two processes all-reduce over gloo")


def check_memory() -> Iterator[Finding]:
    """Free memory, shared memory, and a place for temporary files."""
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    free = int(available[1]) * 1024 if available else 0
    text = f"{free / GIB:.1f} GiB of memory free"
    yield Finding("OK", text) if free >= 2 * GIB else Finding("WARN", text, "the sample recipe needs about 2 GiB")
    shared = shutil.disk_usage("/dev/shm").free
    text = f"{shared / GIB:.1f} GiB free in /dev/shm"
    remedy = "processes exchange tensors there; in a container, start it with --shm-size=8g"
    yield Finding("OK", text) if shared >= GIB else Finding("WARN", text, remedy)
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
        yield Finding("OK", f"temporary files can be written ({tempfile.gettempdir()})")
    except OSError as error:
        yield Finding("FAIL", f"no temporary file can be written: {error}", "set TMPDIR to a writable folder")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_versions,
    check_fbgemm_builds,
    check_fbgemm_ops,
    check_torchrec,
    check_triton,
    check_gpu,
    check_gloo,
    check_memory,
)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _install(name: str, wanted: str) -> str:
    return f"pip install {'--no-deps ' if name in NO_DEPS else ''}{name}=={wanted}"


def _fbgemm_build() -> str:
    return "fbgemm-gpu" if _version("fbgemm-gpu") is not None else "fbgemm-gpu-cpu"


def _has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0


def _probe(code: str) -> str | None:
    """Run code in another interpreter; None when it succeeds, else what went wrong in one line."""
    return _finish(_start(code, {}))


def _start(code: str, variables: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str]) -> str | None:
    try:
        _, errors = process.communicate(timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"no answer within {PROBE_SECONDS} s"
    if process.returncode < 0:
        return f"crashed with {signal.Signals(-process.returncode).name}"
    lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
    return lines[-1] if process.returncode else None
