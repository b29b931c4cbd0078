"""Tiles that were measured on a device, in a file of the user's: the launcher takes them before those of the tables.

`ultrarec bench attention --tune` writes the file; nothing is ever measured while a model trains. It is read once in a
process, so the kernels of a run stay the same until it is started again, and the same file gives the same kernels.
"""

import hashlib
import json
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from .triton_blocks import INTERPRETER, Blocks

FORMAT = 1
KERNELS = ("forward", "keys", "queries", "bias")
DTYPES = ("bfloat16", "float16", "float32")
TILES, WARPS, STAGES = (16, 32, 64, 128, 256), (1, 2, 4, 8, 16), range(1, 9)


@dataclass(frozen=True)
class Shape:
    """What tiles are measured for."""

    kernel: str
    """One of KERNELS."""
    dtype: str
    """One of DTYPES."""
    width: int
    """Columns that a tile has for the heads: a power of 2 from 16 to 256."""
    biased: bool
    """With a relative bias."""

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS or self.dtype not in DTYPES or self.width not in TILES:
            raise ValueError(f"there is no kernel {self.kernel!r} for heads of {self.width} in {self.dtype!r}")


Choices = dict[Shape, Blocks]


def default_path() -> Path:
    """Under the user's cache directory, as the XDG base directory specification has it.

    Raises:
        RuntimeError: the user has none, as a user id of a container that no password file knows and without HOME.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ultrarec" / "attention_tiles.json"


def device_name_of(device: torch.device, target: str) -> str | None:
    """What tiles are filed under; None if kernels are only compiled, for a device that need not be there."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return INTERPRETER if target == INTERPRETER else None


@cache
def choices_for(device_name: str) -> Choices:
    """What the user's file has for a device, read when it is first asked for; warns of a file that cannot be used."""
    try:
        path = default_path()
    except RuntimeError:
        return {}
    return read(path, device_name)


def digest_of(choices: Choices) -> str:
    """Eight hexadecimal digits that differ for other choices; the order of the file does not matter."""
    entries = sorted(json.dumps([asdict(shape), asdict(blocks)]) for shape, blocks in choices.items())
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()[:8]


def read(path: Path, device_name: str) -> Choices:
    """What a file has for a device; with a warning nothing if it is damaged, or made with another Triton."""
    try:
        devices = _devices(json.loads(path.read_text()))
        found = devices.get(device_name, {"triton": triton.__version__, "tiles": []})
        choices = dict(_choice(each) for each in found["tiles"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _warn(path, f"cannot be used ({error!r})")
        return {}
    if found["triton"] != triton.__version__:
        _warn(path, f"was made with Triton {found['triton']}, but this is {triton.__version__}")
        return {}
    return choices


def write(path: Path, device_name: str, choices: Choices) -> None:
    """Add choices to a file, in one step: what it has for other devices and shapes stays, as far as it can be used."""
    try:
        devices = _devices(json.loads(path.read_text()))
    except (OSError, ValueError):
        devices = {}
    choices = (read(path, device_name) if device_name in devices else {}) | choices
    tiles = [asdict(shape) | asdict(blocks) for shape, blocks in choices.items()]
    devices[device_name] = {"triton": triton.__version__, "tiles": tiles}
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own goes away with what a write that failed left in it.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.name) as folder:
        file = Path(folder) / path.name
        file.write_text(json.dumps({"format": FORMAT, "devices": devices}, indent=2) + "\n")
        file.replace(path)


def _devices(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content["devices"], dict):
        raise ValueError(f"it is not of format {FORMAT}")
    return content["devices"]


def _choice(entry: dict[str, Any]) -> tuple[Shape, Blocks]:
    """An entry of the file, if a kernel can be launched with it."""
    shape = Shape(**{name: entry[name] for name in ("kernel", "dtype", "width", "biased")})
    blocks = Blocks(**{name: entry[name] for name in ("rows", "keys", "num_warps", "num_stages")})
    # The pass of the bias gradient goes along diagonals of square tiles.
    is_square = blocks.rows == blocks.keys or shape.kernel != "bias"
    is_tile = {blocks.rows, blocks.keys} <= {*TILES} and is_square
    if not is_tile or blocks.num_warps not in WARPS or blocks.num_stages not in STAGES:
        raise ValueError(f"no {shape.kernel} kernel runs with {blocks}")
    return shape, blocks


def _warn(path: Path, what: str) -> None:
    warnings.warn(
        f"{path} {what}; the built-in tiles are used instead. Delete it, or run ultrarec bench attention --tune",
        stacklevel=2,
    )
