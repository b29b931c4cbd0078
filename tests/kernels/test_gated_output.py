"""gated_output against its definition in float64: outputs, every gradient, what it keeps, and its registration."""

# T = tokens, H = heads, D = head width, V = H * D, E = model width

import pytest
import torch
from fused_ops import (
    BACKENDS,
    DEVICE,
    DTYPES,
    assert_as_exact_as_plain_torch,
    assert_compiles,
    saved_bytes_per_row,
)
from torch import Tensor

from ultrarec.kernels import gated_output

H, D, V, E = 3, 8, 24, 20


def inputs_of(
    num_tokens=37, dtype=torch.float32, token_dtype=torch.float32, bias=True, affine=True, concat=False, heads=H, dim=D
):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    columns = heads * dim
    inputs = {
        "u": randn(num_tokens, columns).to(dtype),
        "a": (randn(num_tokens, heads, dim) / 2 + 1).to(dtype),
        "x": randn(num_tokens, E).to(token_dtype),
        "weight": (randn(E, columns * (3 if concat else 1)) / columns**0.5).to(dtype),
        "seed": torch.tensor([2**40 + 7]),
    }
    if bias:
        inputs["bias"] = randn(E).to(token_dtype)
    if affine:
        inputs |= {"norm_weight": 1 + randn(columns) / 4, "norm_bias": randn(columns) / 4}
    return inputs


def gate(**options):
    def op(inputs: dict[str, Tensor], backend: str = "auto") -> Tensor:
        return gated_output(
            inputs["u"],
            inputs["a"],
            inputs["x"],
            inputs["weight"],
            bias_E=inputs.get("bias"),
            norm_weight_V=inputs.get("norm_weight"),
            norm_bias_V=inputs.get("norm_bias"),
            seed=inputs["seed"],
            **options,
            backend=backend,
        )

    return op


def test_tokens_in_columns_give_the_layout_that_compilation_expects():
    inputs = inputs_of()
    inputs["x"] = inputs["x"].t().contiguous().t()
    assert gate()(inputs).is_contiguous()
    assert_compiles(gate(), inputs)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("concat", [False, True], ids=["gated", "concat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_on_the_cpu(concat, dtype):
    """Of which 1024 are multiplied at once, by another routine than the rest."""
    inputs = inputs_of(1100, concat=concat, dtype=dtype, heads=4, dim=16)
    assert_as_exact_as_plain_torch(gate(concat=concat, dropout=0.3), inputs, "cpu")


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", BACKENDS)
class TestAgainstTheDefinition:
    @DTYPES
    @pytest.mark.parametrize("concat", [False, True], ids=["gated", "concat"])
    def test_every_dtype(self, backend, concat, dtype, token_dtype):
        inputs = inputs_of(dtype=dtype, token_dtype=token_dtype, concat=concat)
        assert_as_exact_as_plain_torch(gate(concat=concat, dropout=0.3), inputs, backend)

    @pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
    @pytest.mark.parametrize("affine", [False, True], ids=["", "affine"])
    @pytest.mark.parametrize("concat", [False, True], ids=["gated", "concat"])
    @pytest.mark.parametrize("per_head", [False, True], ids=["layer norm", "group norm"])
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_every_variant(self, backend, bias, affine, concat, per_head, dropout):
        inputs = inputs_of(bias=bias, affine=affine, concat=concat)
        assert_as_exact_as_plain_torch(gate(concat=concat, per_head=per_head, dropout=dropout), inputs, backend)

    @pytest.mark.parametrize("num_tokens", [0, 1, 63, 65, 130])
    def test_numbers_of_tokens_at_the_edges_of_tiles(self, backend, num_tokens):
        assert_as_exact_as_plain_torch(gate(dropout=0.3), inputs_of(num_tokens), backend)

    @pytest.mark.parametrize(("heads", "dim"), [(1, 1), (1, 50), (2, 16), (5, 13)])
    @pytest.mark.parametrize("per_head", [False, True], ids=["layer norm", "group norm"])
    def test_head_widths(self, backend, heads, dim, per_head):
        inputs = inputs_of(heads=heads, dim=dim, concat=True)
        assert_as_exact_as_plain_torch(gate(concat=True, per_head=per_head, dropout=0.2), inputs, backend)

    def test_repeated_calls_give_the_same_bits(self, backend):
        inputs = {name: x.to(DEVICE) for name, x in inputs_of(200).items()}
        results = []
        for _ in range(2):
            leaves = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
            out = gate(dropout=0.3)(leaves, backend)
            floats = [x for x in leaves.values() if x.requires_grad]
            results.append([out, *torch.autograd.grad(out.square().sum(), floats)])
        assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_gradients_match_finite_differences():
    inputs = inputs_of(4, heads=2, dim=3, concat=True)
    floats = {name: x.double().requires_grad_() for name, x in inputs.items() if name != "seed"}
    for per_head in (False, True):
        op = gate(concat=True, per_head=per_head, dropout=0.3)

        def of(*tensors: Tensor, op=op) -> Tensor:
            return op({**dict(zip(floats, tensors, strict=True)), "seed": inputs["seed"]})

        assert torch.autograd.gradcheck(of, tuple(floats.values()))


@pytest.mark.parametrize("concat", [False, True], ids=["gated", "concat"])
@pytest.mark.parametrize(("per_head", "num_statistics"), [(False, 2), (True, 2 * H)])
def test_the_backward_keeps_gate_attention_and_statistics(concat, per_head, num_statistics):
    inputs = inputs_of(101, concat=concat)
    inputs = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}
    op = gate(concat=concat, per_head=per_head, dropout=0.3)
    assert saved_bytes_per_row(lambda: op(inputs), 101) == 4 * (2 * V + num_statistics)


def test_dropout_follows_the_seed_alone():
    inputs = inputs_of()
    again, other = {**inputs}, {**inputs, "seed": inputs["seed"] + 1}
    op = gate(dropout=0.5)
    assert torch.equal(op(inputs), op(again))
    assert not torch.equal(op(inputs), op(other))
    assert torch.equal(gate()(inputs), gate()(other))


def test_a_wider_residual_stays_wide():
    inputs = inputs_of(dtype=torch.bfloat16)
    without = gate()({**inputs, "weight": torch.zeros_like(inputs["weight"])})
    assert torch.equal(without, inputs["x"] + inputs["bias"])


def test_torch_compile_makes_one_graph_with_the_same_result():
    assert_compiles(gate(dropout=0.3, concat=True), inputs_of(concat=True))


@pytest.mark.parametrize("affine", [False, True])
def test_the_operator_passes_opcheck(affine):
    inputs = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in inputs_of(affine=affine).items()}
    names = ("u", "a", "x", "weight", "bias", "norm_weight", "norm_bias", "seed")
    options = (True, False, 0.3, 1e-6, False, "cpu")
    torch.library.opcheck(torch.ops.ultrarec.gated_output.default, (*(inputs.get(name) for name in names), *options))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": torch.zeros(37, 3, 8, dtype=torch.float16)}, r"a is torch.float16 .* it takes \[T, H, D\]"),
        ({"u": torch.zeros(37, 23)}, r"u has shape \(37, 23\) but a \(37, 3, 8\)"),
        ({"weight": torch.zeros(20, 72)}, "with concat=False it takes 24 columns, H D"),
        ({"x": torch.zeros(36, 20)}, r"x has shape \(36, 20\); it takes a row per token"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, r"seed is torch.int64 of shape \(2,\); it takes one int64"),
        ({"norm_weight": None}, "norm_weight and norm_bias go together; give both or neither"),
    ],
)
def test_wrong_inputs_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        gate(dropout=0.3)(inputs_of() | changed)


@pytest.mark.parametrize(("shape", "per_head"), [((2, 1, 4097), True), ((2, 3, 2048), False)])
def test_triton_refuses_norms_wider_than_its_kernels(shape, per_head):
    attention = torch.zeros(shape)
    inputs = inputs_of() | {"a": attention, "u": attention.flatten(1), "x": torch.zeros(2, 5)}
    inputs |= {"weight": torch.zeros(5, attention.flatten(1).shape[1]), "bias": None}
    inputs |= {"norm_weight": None, "norm_bias": None}
    with pytest.raises(ValueError, match=r"at most 4096 columns together, not \d+; choose backend='cpu', plain torch"):
        gate(per_head=per_head)(inputs, "triton")
    assert gate(per_head=per_head)(inputs, "auto").shape == (2, 5)


def test_wrong_choices_are_named():
    with pytest.raises(ValueError, match=r"dropout=1\.0; it is a probability, from 0 to below 1"):
        gate(dropout=1.0)(inputs_of())
    with pytest.raises(ValueError, match="backend='gpu'; choose one of"):
        gate()(inputs_of(), "gpu")
