"""What hstu_attention accepts. Shapes are checked by the public function, values by each implementation, because
reading them would stop a device and cannot be traced by torch.compile.
"""

# T = events of all sequences, B = sequences, H = heads, D = head width, N = max_seq_len

from itertools import pairwise

import torch
from torch import Tensor

from ..checks import DTYPES, names_of
from .bias import RelativeBias

WRONG_VALUES = (
    "hstu_attention: offsets ascend from 0 to the number of events, by at most max_seq_len each; "
    "num_targets are from 0 to the length of their sequence"
)


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *, num_targets: Tensor | None, max_seq_len: int
) -> None:
    """Raise ValueError unless the tensors fit together: `[T, H, Dqk]` twice, `[T, H, Dv]`, `[B + 1]`, `[B]`."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] == 0:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it takes [events, heads, head width]")
    if q.shape != k.shape:
        raise ValueError(f"q has shape {tuple(q.shape)} but k {tuple(k.shape)}; they take the same")
    if v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v has shape {tuple(v.shape)} but q {tuple(q.shape)}; events and heads take the same")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one of {names_of(DTYPES)}")
    if max_seq_len < 1:
        raise ValueError(f"max_seq_len={max_seq_len}; it is at least 1 and no less than the longest sequence")
    if offsets.dim() == 1 and offsets.shape[0] == 0:
        raise ValueError("offsets is empty; it starts with 0 and has one entry more than there are sequences")
    _check_integers("offsets", offsets)
    tensors = {"k": k, "v": v, "offsets": offsets}
    if num_targets is not None:
        _check_integers("num_targets", num_targets)
        if num_targets.shape[0] != offsets.shape[0] - 1:
            num_sequences = offsets.shape[0] - 1
            raise ValueError(
                f"num_targets has {num_targets.shape[0]} entries; it takes one per sequence, {num_sequences}"
            )
        tensors["num_targets"] = num_targets
    _check_devices(q, tensors)


def check_scale(scale: Tensor, *, q: Tensor) -> None:
    """Raise ValueError unless scale has one floating point number per event of q."""
    if tuple(scale.shape) != (q.shape[0],) or not scale.dtype.is_floating_point:
        shape, wanted = tuple(scale.shape), (q.shape[0],)
        raise ValueError(f"scale is {scale.dtype} of shape {shape}; it takes a number, or a tensor of floats {wanted}")
    _check_devices(q, {"scale": scale})


def check_bias(bias: RelativeBias, *, q: Tensor, max_seq_len: int) -> None:
    """Raise ValueError unless the bias has 2 N - 1 position weights and a time for every event of q."""
    num_offsets = 2 * max_seq_len - 1
    if bias.position_weight is not None and bias.position_weight.shape[0] != num_offsets:
        given = bias.position_weight.shape[0]
        raise ValueError(f"position_weight has {given} entries; max_seq_len={max_seq_len} takes {num_offsets}")
    tensors = {}
    for name in ("position_weight", "time_weight", "timestamps", "query_timestamps"):
        x = getattr(bias, name)
        if x is None:
            continue
        if name.endswith("timestamps") and x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has {x.shape[0]} entries; it takes one per event, {q.shape[0]}")
        tensors[name] = x
    _check_devices(q, tensors)


def check_values(
    offsets: Tensor, num_targets: Tensor | None, *, num_events: int, max_seq_len: int
) -> tuple[list[int], list[int]]:
    """Offsets `[B + 1]` and numbers of targets `[B]` as lists; ValueError unless they describe num_events events."""
    bounds: list[int] = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != num_events:
        raise ValueError(
            f"offsets go from {bounds[0]} to {bounds[-1]}; they go from 0 to the number of events, {num_events}"
        )
    lengths = [end - start for start, end in pairwise(bounds)]
    targets: list[int] = [0] * len(lengths) if num_targets is None else num_targets.tolist()
    for b, (length, num) in enumerate(zip(lengths, targets, strict=True)):
        if not 0 <= length <= max_seq_len:
            remedy = "make offsets ascend" if length < 0 else "raise max_seq_len or shorten the sequence"
            raise ValueError(f"sequence {b} has {length} events, outside 0..{max_seq_len}=max_seq_len; {remedy}")
        if not 0 <= num <= length:
            raise ValueError(
                f"num_targets[{b}]={num} is outside 0..{length}, the events it has; targets are part of their sequence"
            )
    return bounds, targets


def assert_values(offsets: Tensor, num_targets: Tensor | None, *, num_events: int, max_seq_len: int) -> None:
    """What check_values checks, by the device and without waiting for it; a RuntimeError on a CPU.

    On a GPU a device-side assertion ends the process at the next call that waits: without it, events that no sequence
    holds would stay unwritten, and sequences behind the end be written over what lies there.
    That takes nine small kernels, or eleven with targets.
    """
    first, last, lengths = offsets[:1], offsets[-1:], offsets.diff()
    rest = [] if num_targets is None else [num_targets, lengths - num_targets]
    slack = torch.cat([first, -first, last - num_events, num_events - last, lengths, max_seq_len - lengths, *rest])
    # CUDA takes a message of at most 254 bytes.
    torch._assert_async((slack >= 0).all(), WRONG_VALUES)


def _check_integers(name: str, x: Tensor) -> None:
    if x.dim() != 1 or x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {x.dtype} of shape {tuple(x.shape)}; it takes an int32 or int64 vector")


def _check_devices(q: Tensor, tensors: dict[str, Tensor]) -> None:
    for name, x in tensors.items():
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q on {q.device}; move it with .to({str(q.device)!r})")
