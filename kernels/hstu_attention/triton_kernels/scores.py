"""What the Triton kernels of HSTU attention share: their arguments, loads of tiles, the bias, and SiLU."""

# T = events of all sequences, H = heads, D = head width, N = max_seq_len, R = queries and C = keys of a tile

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..bias import BUCKET_WIDTH
from ..mask import AttentionMask
from .mask import id_shift

LOG2_PER_BUCKET = tl.constexpr(0.6931471805599453 / BUCKET_WIDTH)
# With this tanh both SiLU and its derivative are 0 exactly: kernels hide a score by it.
HIDDEN_TANH = tl.constexpr(-1.0)
TWICE_LOG2_E = tl.constexpr(2.8853900817779268)
# The guess of a bucket errs by less than this, and never upwards: see bias.time_buckets.
GUESS_MARGIN = tl.constexpr(0.001)


@dataclass(frozen=True)
class Variant:
    """All that a kernel is compiled for, beside dtypes and alignment."""

    mask: AttentionMask
    has_targets: bool
    uniform_scale: bool
    """One scale for all queries."""
    tanh: str
    """ "hardware" for the instruction of NVIDIA's, "fast division" on AMD devices, or "portable": see tanh."""
    interpreted: bool
    dqk: int
    dv: int
    block_dqk: int
    """Columns of a tile of queries or keys: a power of 2, at least 16; those behind dqk are zeros."""
    block_dv: int
    rows: int
    """Queries of a tile."""
    keys: int
    """Keys of a tile."""
    edge_rows: int
    """Queries of a part of a tile at the edge, where a loop runs over queries."""
    edge_keys: int
    """Keys of a part of a tile at the edge, where a loop runs over keys."""


class Events(NamedTuple):
    """A tensor `[T, H, D]` whose last dimension is contiguous; strides in elements."""

    data: Any
    event_stride: Any
    head_stride: Any


class Scale(NamedTuple):
    """One number per query `[T]`."""

    data: Any
    event_stride: Any
    """0 if it is the same for all."""


class Sequences(NamedTuple):
    """Where sequences are, and the order to work on them, longest first."""

    offsets: Any
    num_targets: Any
    order: Any
    num_heads: Any
    num_tiles: Any
    """Tiles of a sequence of N events."""


class Sequence(NamedTuple):
    """The work of one program: a tile of one head of one sequence."""

    start: Any
    """The first event, int64."""
    length: Any
    history_end: Any
    head: Any
    tile: Any


class Bias(NamedTuple):
    """RelativeBias, with query_timestamps filled in; weights that are None are left out."""

    position_weight: Any
    time_weight: Any
    timestamps: Any
    query_timestamps: Any
    thresholds: Any
    last_threshold: Any
    """Index of the last of the thresholds."""
    max_seq_len: Any


@triton.jit
def load_sequence(sequences, MASK: tl.constexpr):
    """The work of this program: heads go fastest, then tiles, the last first, then sequences, the longest first."""
    program = tl.program_id(0)
    head, rest = program % sequences.num_heads, program // sequences.num_heads
    tile, rank = sequences.num_tiles - 1 - rest % sequences.num_tiles, rest // sequences.num_tiles
    return load_sequence_of(sequences, rank, head, tile, MASK)


@triton.jit
def load_sequence_of(sequences, rank, head, tile, MASK: tl.constexpr):
    """The sequence that comes at `rank` in the order of work."""
    index = tl.load(sequences.order + rank)
    start = tl.load(sequences.offsets + index).to(tl.int64)
    length = (tl.load(sequences.offsets + index + 1) - start).to(tl.int32)
    history_len = length
    if sequences.num_targets is not None:
        history_len = length - tl.load(sequences.num_targets + index).to(tl.int32)
    return Sequence(start, length, history_len - id_shift(MASK), head, tile)


@triton.jit
def row_pointers(events, sequence, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers `[ROWS, COLUMNS]` to the events from `first` on, for one head."""
    origin = (sequence.start + first) * events.event_stride + tl.cast(sequence.head, tl.int64) * events.head_stride
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return events.data + origin + rows[:, None] * events.event_stride + columns[None, :]


@triton.jit
def load_rows(
    events,
    sequence,
    first,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHECK_END: tl.constexpr,
):
    """`[ROWS, COLUMNS]`: the events from `first` on, for one head; zeros behind column D, and behind the sequence.

    Without CHECK_END all rows must be events of the sequence.
    """
    pointers = row_pointers(events, sequence, first, ROWS, COLUMNS)
    is_column = tl.arange(0, COLUMNS)[None, :] < D
    if CHECK_END:
        is_loaded = first + tl.arange(0, ROWS)[:, None] < sequence.length
        if D < COLUMNS:
            is_loaded = is_loaded & is_column
        return tl.load(pointers, mask=is_loaded, other=0.0)
    elif D < COLUMNS:
        return tl.load(pointers, mask=is_column, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_tile(
    events, descriptor, sequence, first, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EDGE: tl.constexpr
):
    """As load_rows; a tile that is not at an EDGE comes by its tensor descriptor, if there is one."""
    if EDGE or descriptor is None:
        return load_rows(events, sequence, first, D, ROWS, COLUMNS, EDGE)
    else:
        first_event = (sequence.start + first).to(tl.int32)
        return descriptor.load([first_event, sequence.head, 0]).reshape(ROWS, COLUMNS)


@triton.jit
def store_rows(
    events, x, sequence, first, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VARIANT: tl.constexpr
):
    """Store `[ROWS, COLUMNS]` as the events from `first` on, as far as the sequence goes, for one head."""
    pointers = row_pointers(events, sequence, first, ROWS, COLUMNS)
    is_row = first + tl.arange(0, ROWS)[:, None] < sequence.length
    is_column = tl.arange(0, COLUMNS)[None, :] < D
    tl.store(pointers, round_to(x, events.data.dtype.element_ty, VARIANT), mask=is_row & is_column)


@triton.jit
def dot(a, b, total, VARIANT: tl.constexpr):
    """`total + a @ b` in float32; float32 is not rounded to tf32."""
    if VARIANT.interpreted:
        # The interpreter of Triton 3.7 multiplies the bits of bfloat16 as integers.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr, VARIANT: tl.constexpr):
    """A float32 x in a dtype of the inputs, rounded to nearest."""
    if VARIANT.interpreted and dtype == tl.bfloat16:
        # The interpreter of Triton 3.7 cuts off the bits that bfloat16 lacks.
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`[ROWS, COLUMNS]` in float32."""
    return tl.zeros([ROWS, COLUMNS], dtype=tl.float32)


@triton.jit
def load_scale(scale, sequence, first, ROWS: tl.constexpr):
    """`[ROWS]` float32: the scale of the queries from `first` on; zeros behind the sequence."""
    rows = first + tl.arange(0, ROWS)
    pointers = scale.data + (sequence.start + rows) * scale.event_stride
    return tl.load(pointers, mask=rows < sequence.length, other=0.0).to(tl.float32)


@triton.jit
def half_scores(products, rows, keys, sequence, bias, half_alpha):
    """Half of `alpha * <q, k> + bias`; positions of queries and keys broadcast against the products."""
    if bias is None:
        return products * half_alpha
    else:
        return products * half_alpha + 0.5 * bias_of(rows, keys, sequence, bias)


@triton.jit
def bias_of(rows, keys, sequence, bias):
    """The relative bias of queries and keys at these positions; behind the sequence that of its last event."""
    rows, keys = tl.minimum(rows, sequence.length - 1), tl.minimum(keys, sequence.length - 1)
    value = 0.0
    if bias.position_weight is not None:
        value += tl.load(bias.position_weight + (rows - keys + (bias.max_seq_len - 1))).to(tl.float32)
    if bias.time_weight is not None:
        value += tl.load(bias.time_weight + time_bucket_of(rows, keys, sequence, bias)).to(tl.float32)
    return value


@triton.jit
def time_bucket_of(rows, keys, sequence, bias):
    """The time bucket of queries and keys at these positions, which are events: see bias.time_buckets."""
    query_time = tl.load(bias.query_timestamps + sequence.start + rows)
    key_time = tl.load(bias.timestamps + sequence.start + keys)
    elapsed = tl.abs(query_time - key_time)
    guess = tl.log2(tl.maximum(elapsed.to(tl.float32), 1.0)) * LOG2_PER_BUCKET - GUESS_MARGIN
    bucket = tl.minimum(tl.maximum(guess, 0.0).to(tl.int32), bias.last_threshold - 1)
    return bucket + (elapsed >= tl.load(bias.thresholds + bucket + 1)).to(tl.int32)


@triton.jit
def tanh(x, METHOD: tl.constexpr):
    """The hyperbolic tangent: by one special-function instruction to about 11 bits, or to those of float32."""
    if METHOD == "hardware":
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    elif METHOD == "fast division":
        # A division rounded correctly takes ten instructions on AMD devices; this one multiplies by v_rcp_f32.
        return 1.0 - libdevice.fast_dividef(2.0, 1.0 + tl.exp2(x * TWICE_LOG2_E))
    else:
        return 1.0 - 2.0 / (1.0 + tl.exp2(x * TWICE_LOG2_E))


@triton.jit
def silu_and_excess_slope(half, tanh):
    """silu(s), and by how much twice its derivative is above 1: with h = s / 2 and t = tanh(h), t + silu (1 - t).

    So the product of a gradient with twice the derivative is one multiplication and addition.
    """
    silu = half + half * tanh
    return silu, tanh + (silu - silu * tanh)
