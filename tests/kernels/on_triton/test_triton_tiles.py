"""Tiles of the Triton attention: what the mask hides is never read, and the sizes of every device's table are exact."""

import pytest
import torch
from attention_cases import MASKS, Case, assert_as_exact_as_plain_torch, attend, inputs_of
from triton_device import DEVICE, INTERPRETED, needs_triton

from ultrarec.kernels import AttentionMask
from ultrarec.kernels.hstu_attention import triton_blocks
from ultrarec.kernels.hstu_attention.operator import Problem
from ultrarec.kernels.hstu_attention.triton_blocks import INTERPRETER, target_of
from ultrarec.kernels.hstu_attention.triton_launch import blocks_for

pytestmark = needs_triton


def use_table_of(target: str, patch: pytest.MonkeyPatch) -> None:
    """Interpret kernels with the tiles that a device would run."""
    table_of = triton_blocks.table_of
    patch.setattr(
        triton_blocks,
        "table_of",
        lambda asked, dtype, biased: table_of(target if asked == INTERPRETER else asked, dtype, biased),
    )


@pytest.fixture(params=["its own", *(["sm_90"] if INTERPRETED else [])])
def largest_tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows or keys of the largest tile for a head of 8 in float32; all others divide it."""
    if request.param != "its own":
        use_table_of(request.param, monkeypatch)
    x = torch.zeros(1, 1, 8, device=DEVICE)
    problem = Problem(
        x, x, x, x.flatten()[:1], None, None, None, None, torch.tensor([0, 1]), None, 1, 0.3, [0, 0, 0, 0]
    )
    blocks = [blocks_for(name, problem, target_of(x.device)) for name in ("forward", "keys", "queries")]
    return max(max(each.rows, each.keys) for each in blocks)


def outputs_and_gradients_with_nan(
    names: tuple[str, ...], poisoned: slice, length: int, mask: AttentionMask
) -> dict[str, torch.Tensor]:
    case = Case(lengths=(length,), num_heads=1, dqk=8, dv=8, mask=mask, scale="tensor", device=DEVICE)
    inputs = inputs_of(case)
    for name in names:
        inputs[name][poisoned] = float("nan")
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    out = attend(case, inputs, "triton")
    return {
        "out": out.detach(),
        **dict(zip(inputs, torch.autograd.grad(out.sum(), list(inputs.values())), strict=True)),
    }


@pytest.mark.parametrize("prefix", [0, 20])
def test_tiles_that_the_mask_hides_are_never_read(largest_tile: int, prefix: int) -> None:
    """NaN reaches only those tiles that see some of it, though even hidden by a factor of 0 it would stay NaN.

    The fourth of eight tiles is NaN, and a query sees half a tile back.
    """
    tile, length = largest_tile, 8 * largest_tile
    poisoned, mask = slice(3 * tile, 4 * tile), AttentionMask(window=tile // 2, prefix=prefix)
    clean = outputs_and_gradients_with_nan((), poisoned, length, mask)
    poisoned_keys = outputs_and_gradients_with_nan(("k", "v"), poisoned, length, mask)
    poisoned_queries = outputs_and_gradients_with_nan(("q",), poisoned, length, mask)
    away_from_keys = torch.ones(length, dtype=torch.bool, device=DEVICE)
    away_from_keys[3 * tile : 5 * tile] = False
    away_from_queries = torch.ones(length, dtype=torch.bool, device=DEVICE)
    away_from_queries[2 * tile : 4 * tile] = False
    away_from_queries[: tile if prefix else 0] = False
    for name in ("out", "q"):
        assert torch.equal(poisoned_keys[name][away_from_keys], clean[name][away_from_keys]), name
    for name in ("k", "v"):
        assert torch.equal(poisoned_queries[name][away_from_queries], clean[name][away_from_queries]), name
    assert poisoned_keys["out"][poisoned].isnan().all()
    assert poisoned_queries["k"][poisoned].isnan().all()


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs its own tiles in all other tests")
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("biased", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize(
    ("target", "dtype", "width"),
    [
        ("sm_90", torch.float32, 16),
        ("sm_90", torch.bfloat16, 64),
        ("sm_90", torch.bfloat16, 256),
        ("sm_80", torch.bfloat16, 64),
        ("sm_100", torch.bfloat16, 128),
        ("gfx942", torch.float32, 16),
        ("gfx942", torch.bfloat16, 64),
        ("gfx942", torch.bfloat16, 256),
    ],
)
def test_the_tiles_of_every_device_are_exact(
    target: str, dtype: torch.dtype, width: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence of more than a tile; with all masks where there is a bias, which takes smaller tiles."""
    use_table_of(target, monkeypatch)
    mask, bias = (MASKS["all"], "position time query") if biased else (MASKS["causal"], "")
    case = Case((140,), 1, width, width, mask=mask, targets=biased, bias=bias, scale="tensor", dtype=dtype)
    assert_as_exact_as_plain_torch(case, "triton")
