"""norm_uvqk against its definition in float64: outputs, every gradient, what it keeps, and its registration."""

# T = tokens, E = model width, N = columns of u, v, q and k together

import pytest
import torch
from fused_ops import (
    BACKENDS,
    DEVICE,
    DTYPES,
    INTERPRETED,
    assert_as_exact_as_plain_torch,
    assert_compiles,
    saved_bytes_per_row,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ultrarec.kernels import norm_uvqk
from ultrarec.kernels.backends import WIDEST_NORM, backend_for

MANY = 1100
"""Tokens of which the CPU multiplies 1024 at once, by another routine than the rest."""


def inputs_of(
    num_tokens=37, width=24, num_columns=40, dtype=torch.float32, token_dtype=torch.float32, bias=True, affine=True
):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = {
        "x": (2 * randn(num_tokens, width) + 1).to(token_dtype),
        "weight": (randn(num_columns, width) / width**0.5).to(dtype),
    }
    if bias:
        inputs["bias"] = randn(num_columns).to(dtype)
    if affine:
        inputs |= {"norm_weight": 1 + randn(width) / 4, "norm_bias": randn(width) / 4}
    return inputs


def project(num_activated):
    def op(inputs: dict[str, Tensor], backend: str = "auto") -> Tensor:
        return norm_uvqk(
            inputs["x"],
            inputs["weight"],
            bias_N=inputs.get("bias"),
            norm_weight_E=inputs.get("norm_weight"),
            norm_bias_E=inputs.get("norm_bias"),
            num_activated=num_activated,
            backend=backend,
        )

    return op


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(("width", "num_columns"), [(64, 128), (128, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_on_the_cpu(width, num_columns, dtype):
    inputs = inputs_of(MANY, width, num_columns, dtype=dtype)
    assert_as_exact_as_plain_torch(project(num_columns // 4), inputs, "cpu")


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", BACKENDS)
class TestAgainstTheDefinition:
    @DTYPES
    @pytest.mark.parametrize("num_activated", [40, 10], ids=["all", "u only"])
    def test_every_dtype(self, backend, num_activated, dtype, token_dtype):
        inputs = inputs_of(dtype=dtype, token_dtype=token_dtype)
        assert_as_exact_as_plain_torch(project(num_activated), inputs, backend)

    @pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
    @pytest.mark.parametrize("affine", [False, True], ids=["", "affine"])
    @pytest.mark.parametrize("num_activated", [0, 10, 40])
    def test_every_variant(self, backend, bias, affine, num_activated):
        assert_as_exact_as_plain_torch(project(num_activated), inputs_of(bias=bias, affine=affine), backend)

    @pytest.mark.parametrize("num_tokens", [0, 1, 63, 65, 130])
    def test_numbers_of_tokens_at_the_edges_of_tiles(self, backend, num_tokens):
        assert_as_exact_as_plain_torch(project(10), inputs_of(num_tokens=num_tokens), backend)

    @pytest.mark.parametrize(("width", "num_columns"), [(1, 4), (50, 200), (64, 64), (129, 65)])
    def test_widths(self, backend, width, num_columns):
        inputs = inputs_of(width=width, num_columns=num_columns)
        assert_as_exact_as_plain_torch(project(num_columns // 4), inputs, backend)

    def test_repeated_calls_give_the_same_bits(self, backend):
        inputs = {name: x.to(DEVICE) for name, x in inputs_of(num_tokens=200).items()}
        results = []
        for _ in range(2):
            leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
            out = project(10)(leaves, backend)
            results.append([out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))])
        assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_gradients_match_finite_differences():
    inputs = {name: x.double().requires_grad_() for name, x in inputs_of(5, 4, 8).items()}
    for num_activated in (8, 2):
        op = project(num_activated)
        assert torch.autograd.gradcheck(
            lambda *tensors, op=op: op(dict(zip(inputs, tensors, strict=True))), tuple(inputs.values())
        )


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes what this refuses")
def test_triton_says_what_it_does_not_take():
    with pytest.raises(ValueError, match="got tensors on cpu; move them to a GPU, choose backend='cpu', or set TRITON"):
        project(10)(inputs_of(), "triton")
    doubles = {name: x.double() for name, x in inputs_of().items()}
    with pytest.raises(ValueError, match="takes no float64; choose backend='cpu'"):
        project(10)(doubles, "triton")


@pytest.mark.parametrize(("num_activated", "kept"), [(40, 24 + 40), (10, 24 + 10), (0, 24)])
def test_the_backward_keeps_tokens_statistics_and_what_silu_needs(num_activated, kept):
    inputs = {name: x.requires_grad_() for name, x in inputs_of(num_tokens=101).items()}
    per_token = saved_bytes_per_row(lambda: project(num_activated)(inputs), 101)
    assert per_token == 4 * (kept + 2)


def test_autocast_chooses_the_dtype_of_the_product_but_not_of_the_norm():
    inputs = inputs_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = project(10)(inputs)
    halved = {name: x.bfloat16() if name in ("weight", "bias") else x for name, x in inputs.items()}
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast, project(10)(halved))


def test_torch_compile_makes_one_graph_with_the_same_result():
    assert_compiles(project(10), inputs_of())


@pytest.mark.parametrize("affine", [False, True])
def test_the_operator_passes_opcheck(affine):
    inputs = {name: x.requires_grad_() for name, x in inputs_of(affine=affine).items()}
    tensors = (inputs["x"], inputs["weight"], inputs["bias"], inputs.get("norm_weight"), inputs.get("norm_bias"))
    torch.library.opcheck(torch.ops.ultrarec.norm_uvqk.default, (*tensors, 10, 1e-6, False, "cpu"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(3, 2, 24)}, r"x is torch.float32 of shape \(3, 2, 24\); it takes a matrix"),
        ({"weight": torch.zeros(40, 23)}, "weight has 23 columns but x 24"),
        ({"bias": torch.zeros(39)}, r"bias is torch.float32 of shape \(39,\); it takes 40 floats"),
        ({"norm_bias": None}, "norm_weight and norm_bias go together; give both or neither"),
    ],
)
def test_wrong_inputs_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        project(10)(inputs_of() | changed)


def test_norms_wider_than_the_kernels_are_plain_torch_unless_triton_is_asked_for():
    tokens, weight = torch.zeros(2, WIDEST_NORM + 1), torch.zeros(4, WIDEST_NORM + 1)
    with pytest.raises(ValueError, match="at most 4096 columns together, not 4097; choose backend='cpu', plain torch"):
        norm_uvqk(tokens, weight, num_activated=4, backend="triton")
    with FakeTensorMode():
        on_gpu = torch.empty(2, device="cuda")
    assert backend_for(on_gpu, "auto", norm_width=WIDEST_NORM) == "triton"
    assert backend_for(on_gpu, "auto", norm_width=WIDEST_NORM + 1) == "cpu"


def test_wrong_choices_are_named():
    with pytest.raises(ValueError, match="num_activated=41; it is from 0 to 40"):
        project(41)(inputs_of())
    with pytest.raises(ValueError, match="backend='gpu'; choose one of"):
        project(10)(inputs_of(), "gpu")
