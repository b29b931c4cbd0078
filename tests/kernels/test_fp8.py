"""FP8 products: what e4m3 keeps of a row, the error of a product, and that the backward does not see it."""

# T = tokens, K = columns of a token, N = rows of a weight

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch
from fused_ops import BACKENDS, DEVICE, INTERPRETED, outputs_and_gradients

from ultrarec.kernels import gated_output, norm_uvqk
from ultrarec.kernels.fp8 import check_native, multiply, quantize

if "triton" in BACKENDS:
    from ultrarec.kernels.fp8 import triton as fp8_triton
    from ultrarec.kernels.linear.triton import linear

E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
"""Every number of e4m3 that is not negative: 0 to 448."""


def quantized(x, backend):
    return (quantize if backend == "cpu" else fp8_triton.quantize)(x)


@pytest.mark.parametrize("backend", BACKENDS)
class TestRows:
    def test_what_e4m3_can_represent_comes_back_as_it_was(self, backend):
        # The largest element of a row is 448 times its scale; powers of two keep the others exact.
        rows = torch.stack([E4M3, -E4M3, E4M3.flip(0) * 2.0**-20, E4M3 * 2.0**30]).to(DEVICE)
        values, scale = quantized(rows, backend)
        assert scale.flatten().tolist() == [1, 1, 2.0**-20, 2.0**30]
        assert torch.equal(values.float() * scale, rows)

    def test_an_element_errs_by_a_sixteenth_of_itself_or_little_of_its_row(self, backend):
        generator = torch.Generator().manual_seed(0)
        # Over nine orders of magnitude, in a row and between rows.
        rows = torch.randn(50, 1500, generator=generator) * 10 ** torch.empty(50, 1500).uniform_(
            -6, 3, generator=generator
        )
        values, scale = quantized(rows.to(DEVICE), backend)
        error = (values.double() * scale - rows.to(DEVICE)).abs()
        # Besides e4m3's rounding, that of the division and of the scale itself.
        bound = (rows.abs().to(DEVICE) / 16).maximum(scale * 2.0**-10) * (1 + 1e-6)
        assert (error <= bound).all()
        assert (values.float().abs().amax(1) == 448).all()

    def test_largest_smallest_and_zero_rows_stay_finite(self, backend):
        largest = torch.finfo(torch.float32).max
        rows = torch.tensor([[largest, -largest, 1.0], [0.0, -0.0, 0.0], [1e-12, -1e-12, 0], [1e-30, 0, 0]])
        values, scale = quantized(rows.to(DEVICE), backend)
        assert values.float().tolist() == [[448, -448, 0], [0, 0, 0], [448, -448, 0], [0, 0, 0]]
        assert scale.isfinite().all()
        assert (scale > 0).all()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_not_hidden(self, backend, bad):
        rows = torch.ones(2, 5, device=DEVICE)
        rows[1, 3] = bad
        values, scale = quantized(rows, backend)
        assert (values.float() * scale).isfinite().all(1).tolist() == [True, False]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_rows_give_the_same_bits_on_every_backend(self, backend, dtype):
        rows = torch.randn(70, 1100, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
        for rows_of in (rows, rows[:, :3], rows[:0]):
            for got, want in zip(quantized(rows_of, backend), quantize(rows_of), strict=True):
                assert torch.equal(got.float(), want.float())


@pytest.mark.parametrize("backend", BACKENDS)
class TestProducts:
    @pytest.mark.parametrize(("num_tokens", "width", "num_columns"), [(70, 150, 90), (1, 16, 1), (130, 64, 200)])
    def test_a_product_sums_the_quantised_operands_in_float32(self, backend, num_tokens, width, num_columns):
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(num, width, generator=generator).to(DEVICE) for num in (num_tokens, num_columns))
        residual = torch.randn(num_tokens, num_columns, generator=generator).to(DEVICE)
        (x_fp8, x_scale), (weight_fp8, weight_scale) = quantize(x), quantize(weight)
        left, right = x_fp8.double() * x_scale, weight_fp8.double() * weight_scale
        if backend == "cpu":
            got = multiply(x, weight) + residual
        else:
            got = torch.full_like(residual, float("nan"))
            linear(x, weight, None, got, residual_TN=residual, fp8=True)
        # One rounding of float32 for each of `width` sums, and a few for the scales and the residual.
        bound = (width + 4) * 2.0**-24 * (left.abs() @ right.abs().t() + residual.abs())
        assert ((got - (left @ right.t() + residual)).abs() <= bound).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", ["norm_uvqk", "gated_output"])
    def test_operators_multiply_in_fp8_and_go_back_as_without_it(self, backend, name, dtype):
        op, inputs = CASES[name](dtype)
        inputs = {key: x.to(DEVICE) for key, x in inputs.items()}
        plain, fp8, defined = (
            outputs_and_gradients(lambda x, choices=choices: op(x, **choices), inputs)
            for choices in (
                {"fp8": False, "backend": backend},
                {"fp8": True, "backend": backend},
                {"fp8": True, "backend": "reference"},
            )
        )
        assert not torch.equal(fp8["out"], plain["out"])
        # An element next to the middle of two numbers of e4m3 may go either way: one of many roundings. Triton's
        # interpreter cuts bfloat16 off where a GPU rounds: there most elements do.
        cuts_off = backend == "triton" and INTERPRETED and dtype == torch.bfloat16
        largest = (defined["out"] - plain["out"]).abs().max()
        assert (fp8["out"] - defined["out"]).abs().max() <= largest / (1 if cuts_off else 4)
        for key in plain.keys() - {"out"}:
            assert torch.equal(fp8[key], plain[key]), key


def norm_uvqk_case(dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(37, 48, generator=generator),
        "weight": torch.randn(64, 48, generator=generator).to(dtype),
        "bias": torch.randn(64, generator=generator).to(dtype),
    }
    # Without SiLU, whose gradient depends on the product.
    return lambda x, **choices: norm_uvqk(x["x"], x["weight"], bias_N=x["bias"], num_activated=0, **choices), inputs


def gated_output_case(dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "u": torch.randn(37, 48, generator=generator).to(dtype),
        "a": torch.randn(37, 3, 16, generator=generator).to(dtype),
        "x": torch.randn(37, 40, generator=generator),
        "weight": torch.randn(40, 48, generator=generator).to(dtype),
    }
    return lambda x, **choices: gated_output(x["u"], x["a"], x["x"], x["weight"], **choices), inputs


CASES = {"norm_uvqk": norm_uvqk_case, "gated_output": gated_output_case}


@pytest.mark.parametrize(
    ("hip", "architecture", "is_native"),
    [
        (None, (8, 0), False),
        (None, (8, 9), True),
        (None, (9, 0), True),
        ("7.0", "gfx942:sramecc+", False),
        ("7.0", "gfx950:sramecc+", True),
    ],
)
def test_gpus_that_do_not_multiply_e4m3_are_refused(monkeypatch, hip, architecture, is_native):
    major, minor = architecture if hip is None else (9, 4)
    properties = SimpleNamespace(name="Accelerator 9", major=major, minor=minor, gcnArchName=architecture)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    name = f"sm_{major}{minor}" if hip is None else architecture
    refused = pytest.raises(ValueError, match=re.escape(f"fp8=True on Accelerator 9 ({name}), which does not"))
    with contextlib.nullcontext() if is_native else refused:
        check_native(torch.device("cuda", 0))
