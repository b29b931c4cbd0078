"""Compile the Triton kernels of HSTU attention for devices that need not be there; prints a JSON line for each kernel.

python tests/compile_attention.py                   each entry of the tables of tiles, with all that it can be asked
python tests/compile_attention.py --record          the same, compiled whatever the record says, and recorded
python tests/compile_attention.py --all [target …]  every dtype and many head widths and masks: most of an hour

Compiling takes a second for each kernel, and what it makes depends on nothing but its input. So what became of an input
is recorded in golden/attention_kernels.jsonl by a hash of all of it: the source of the kernel and of what it calls, its
constants, options, device, and the versions of Triton and ptxas. Compiled is what the record does not know, and a
sample of what it does, so that a test can tell whether it is right.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.amd.compiler import HIPOptions
from triton.runtime import driver
from triton.runtime.cache import triton_key

from ultrarec.kernels.hstu_attention.triton_blocks import table_of
from ultrarec.kernels.launching import Launch
from ultrarec.kernels.static_report import ALL_MASKS, NUM_PRODUCTS, NoDevice, Setting, describe, launches_of

RECORD = Path(__file__).parent / "golden" / "attention_kernels.jsonl"
CAUSAL, SEMI_LOCAL = (0, 0, 0, 0), (20, 10, 0, 0)
NVIDIA, AMD = ("sm_80", "sm_90", "sm_100"), ("gfx942", "gfx950")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TENSOR_INSTRUCTIONS = ("mma.sync", "wgmma", "tcgen05.mma", "v_mfma")
BACKWARD = ("keys", "queries")

Job = tuple[str, Setting, str]
"""A device, what is compiled for besides it, and the name of the kernel."""


def shipped() -> Iterator[Job]:
    """Each entry of the tables with all masks, targets and a scale per query; and kernels for which figures are
    promised.
    """
    for target in (*NVIDIA, *AMD):
        for dtype, biased in (*product((BF16, FP16), (False, True)), (FP32, True)):
            for name, sizes in table_of(target, dtype, biased).items():
                for width in sizes:
                    yield target, Setting(width, ALL_MASKS, True, biased, dtype), name
    # Narrow queries and keys beside wide values are padded.
    yield "sm_90", Setting(32, ALL_MASKS, True, value_width=256), "keys"
    # What the tables have no entry of its own for.
    yield "sm_90", Setting(256, ALL_MASKS, True, dtype=FP32), "keys"
    yield from promised()


def promised() -> Iterator[Job]:
    """Causal attention on sm_90 and on AMD devices, whose instructions per score are part of what is promised."""
    for target, width in product(("sm_90", *AMD), (64, 128)):
        yield from ((target, Setting(width), name) for name in NUM_PRODUCTS)
    yield from (("sm_90", Setting(128, CAUSAL, True), name) for name in BACKWARD)


SAMPLE = {
    *(job for job in promised() if job[0] == "sm_90"),
    ("sm_80", Setting(64, ALL_MASKS, True), "forward"),
    ("sm_100", Setting(128, ALL_MASKS, True), "forward"),
    ("gfx942", Setting(128), "keys"),
    ("gfx950", Setting(128), "queries"),
}
"""Shipped kernels that are compiled although they are recorded."""


def every(targets: list[str]) -> Iterator[Job]:
    """All widths that kernels are compiled for, and far more than the tables have entries; for some devices, or all."""
    masks = ((CAUSAL, False), (SEMI_LOCAL, False), (ALL_MASKS, True))
    for target in targets or (*NVIDIA, *AMD):
        for dtype, width, biased, (rule, general) in product(
            (BF16, FP32, FP16), (16, 32, 48, 64, 128, 256), (False, True), masks
        ):
            setting = Setting(width, rule, general, biased, dtype)
            yield from ((target, setting, name) for name in (*NUM_PRODUCTS, *(["bias"] if biased else [])))


def facts_of(job: Job, launch: Launch, compiled: Any) -> dict[str, Any]:
    """What tests ask about a compiled kernel."""
    target, setting, name = job
    code = compiled.asm["ptx"] if "ptx" in compiled.asm else compiled.asm["amdgcn"]
    facts = asdict(describe(target, setting, name, launch, compiled))
    facts |= {"width": setting.widest, "biased": setting.biased, "dtype": str(setting.dtype).removeprefix("torch.")}
    facts |= {"masked": any(setting.rule), "scale_per_query": setting.general}
    facts["tensor_instructions"] = [instruction for instruction in TENSOR_INSTRUCTIONS if instruction in code]
    facts["divides_exactly"] = "v_div_" in code
    facts["masked_values"] = masked_values_of(compiled.asm["ttir"])
    return facts


def masked_values_of(ttir: str) -> list[int]:
    """For each loop, in order, how many of its lines are about a tile of booleans, as those of a mask are."""
    loops = re.findall(r"^( *)[^\n]*\bscf\.for\b[^\n]*\n(.*?)^\1\}", ttir, re.MULTILINE | re.DOTALL)
    return [len(re.findall(r"x\d+xi1>[^\n]*\n", body)) for _, body in loops]


class Held(Executor):
    """Takes what Triton would compile and leaves it be."""

    held: Callable[[], Any]

    def submit(self, work: Callable[[], Any]) -> Future[Any]:  # type: ignore[override]
        self.held = work
        future: Future[Any] = Future()
        future.set_exception(RuntimeError("held, not compiled"))
        return future


def prepared(launch: Launch) -> tuple[str, Callable[[], Any]]:
    """A hash of all that the compiled kernel depends on, and the function that compiles it."""
    launch.kernel.device_caches.clear()
    executor = Held()
    with triton.AsyncCompileMode(executor, ignore_errors=True) as mode:
        launch.compile()
    (key,) = mode.future_kernels
    # Triton hashes itself, and its libraries differ from one version of Python to another.
    text = triton.__version__ + key.removeprefix(triton_key())
    return hashlib.sha256(text.encode()).hexdigest()[:32], executor.held


def make_hash_portable() -> None:
    """Let Triton's hash of options for AMD not depend on the folder that Triton is installed in."""

    def portable(options: HIPOptions) -> str:
        held = {**vars(options), "extern_libs": [name for name, _ in options.extern_libs]}
        return hashlib.sha256(repr(sorted(held.items())).encode()).hexdigest()

    HIPOptions.hash = portable


def launch_of(job: Job) -> Launch:
    """What runs the kernel, with the compiler set to its device."""
    target, setting, name = job
    driver.set_active(NoDevice(target))
    return launches_of(setting, target)[name]


def recorded() -> dict[str, dict[str, Any]]:
    """Facts by key."""
    if not RECORD.exists():
        return {}
    lines = (json.loads(line) for line in RECORD.read_text().splitlines())
    return {line["key"]: line for line in lines}


def main(arguments: list[str]) -> None:
    make_hash_portable()
    jobs = every(arguments[1:]) if arguments[:1] == ["--all"] else shipped()
    known, lines = {} if arguments else recorded(), []
    for job in jobs:
        launch = launch_of(job)
        key, compiled = prepared(launch)
        facts = None if job in SAMPLE else known.get(key)
        line = json.dumps(facts or {"key": key, **facts_of(job, launch, compiled())})
        lines.append(line)
        print(line, flush=True)
    if arguments == ["--record"]:
        RECORD.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
