"""jagged_concat and jagged_split against their definition, and against each other."""

import pytest
import torch
from fused_ops import BACKENDS, DEVICE, assert_compiles, outputs_and_gradients, saved_bytes_per_row
from torch import Tensor

from ultrarec.kernels import jagged_concat, jagged_split

LENGTHS = {
    "usual": ([3, 1, 4, 2], [5, 2, 6, 5]),
    "empty": ([0, 3, 0, 0, 2, 0], [4, 0, 0, 1, 3, 0]),
    "no left": ([0, 0], [2, 3]),
    "no rows": ([0, 0], [0, 0]),
    "no sequences": ([], []),
    "one of many tiles": ([700], [900]),
}


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0)


def case(lengths=LENGTHS["usual"], columns=(5,), dtype=torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(sum(side), *columns, generator=generator).mul(100).to(DEVICE, dtype) for side in lengths)
    return {
        "left": left,
        "right": right,
        "left_offsets": offsets_of(lengths[0]),
        "right_offsets": offsets_of(lengths[1]),
    }


def split_case(**choices) -> dict[str, Tensor]:
    inputs = case(**choices)
    return {"x": torch.cat([inputs.pop("left"), inputs.pop("right")]), **inputs}


def concat(right_prefix=0):
    return lambda inputs, backend="auto": jagged_concat(**inputs, right_prefix=right_prefix, backend=backend)


def split(right_prefix=0):
    """Both parts, and the second twice: so that a gradient that goes to the wrong one shows."""

    def op(inputs: dict[str, Tensor], backend: str = "auto") -> Tensor:
        left, right = jagged_split(**inputs, right_prefix=right_prefix, backend=backend)
        return torch.cat([left, 2 * right])

    return op


def assert_bit_equal(op, inputs, backend):
    differentiable = any(x.is_floating_point() for x in inputs.values())
    run = outputs_and_gradients if differentiable else lambda op, inputs: {"out": op(inputs)}
    got, exact = (run(lambda x, name=name: op(x, name), inputs) for name in (backend, "reference"))
    for name, value in exact.items():
        assert torch.equal(got[name], value), name


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", BACKENDS)
class TestAgainstTheDefinition:
    @pytest.mark.parametrize("right_prefix", [0, 1, 3])
    @pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
    def test_any_lengths(self, backend, lengths, right_prefix):
        assert_bit_equal(concat(right_prefix), case(lengths), backend)
        assert_bit_equal(split(right_prefix), split_case(lengths=lengths), backend)

    @pytest.mark.parametrize("columns", [(), (1,), (2, 3), (64,), (1030,), (0,)])
    def test_rows_of_any_shape(self, backend, columns):
        assert_bit_equal(concat(1), case(columns=columns), backend)
        assert_bit_equal(split(1), split_case(columns=columns), backend)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool])
    def test_any_dtype(self, backend, dtype):
        assert_bit_equal(concat(), case(dtype=dtype), backend)
        assert_bit_equal(lambda x, name: jagged_split(**x, backend=name)[1], split_case(dtype=dtype), backend)

    def test_strided_rows_and_32_bit_offsets(self, backend):
        inputs = case()
        inputs |= {"left": inputs["left"].t().contiguous().t(), "right": inputs["right"][:, :1].expand(-1, 5)}
        assert_bit_equal(concat(), inputs | {"left_offsets": inputs["left_offsets"].int()}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_left_rows_stand_behind_the_prefix_of_the_right_ones(backend):
    left, right = torch.tensor([10, 11, 20], device=DEVICE), torch.tensor([0, 1, 2, 3, 4, 5], device=DEVICE)
    joined = jagged_concat(left, right, offsets_of([2, 1, 0]), offsets_of([4, 1, 1]), right_prefix=2, backend=backend)
    assert joined.tolist() == [0, 1, 10, 11, 2, 3, 4, 20, 5]


@pytest.mark.parametrize("right_prefix", [0, 2])
def test_split_undoes_concat(right_prefix):
    inputs = case()
    offsets = (inputs["left_offsets"], inputs["right_offsets"])
    for num_left in (None, len(inputs["left"])):
        joined = concat(right_prefix)(inputs)
        left, right = jagged_split(joined, *offsets, num_left=num_left, right_prefix=right_prefix)
        assert torch.equal(left, inputs["left"])
        assert torch.equal(right, inputs["right"])


def test_gradients_match_finite_differences():
    offsets = (offsets_of([1, 0, 2]), offsets_of([2, 1, 0]))
    left, right = (torch.randn(3, 2, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(lambda left, right: jagged_concat(left, right, *offsets, right_prefix=1), (left, right))
    torch.autograd.gradcheck(lambda x: jagged_split(x, *offsets, num_left=3, right_prefix=1), torch.cat([left, right]))


def test_no_row_is_kept_for_the_backward():
    inputs = case()
    inputs["left"].requires_grad_()
    num_rows = len(inputs["left"]) + len(inputs["right"])
    assert saved_bytes_per_row(lambda: concat()(inputs), num_rows) == 0


def test_torch_compile_makes_one_graph_with_the_same_result():
    assert_compiles(concat(1), case())
    num_left = sum(LENGTHS["usual"][0])
    assert_compiles(lambda inputs: split(1)({**inputs, "num_left": num_left}), split_case())


def test_the_operators_pass_opcheck():
    inputs = case()
    offsets = (inputs["left_offsets"], inputs["right_offsets"])
    left, right = (inputs[name].requires_grad_() for name in ("left", "right"))
    torch.library.opcheck(torch.ops.ultrarec.jagged_concat.default, (left, right, *offsets, 1, "cpu"))
    x = torch.cat([left, right]).detach().requires_grad_()
    torch.library.opcheck(torch.ops.ultrarec.jagged_split.default, (x, *offsets, len(left), 1, "cpu"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"right": torch.zeros(18, 4)}, r"left is torch.float32 of shape \(10, 5\) but right .* rows of one shape"),
        ({"right": torch.zeros(18, 5).double()}, "but right torch.float64 .* rows of one shape and dtype"),
        ({"left_offsets": torch.tensor([0.0, 10.0])}, "left_offsets is torch.float32 .* int32 or int64 numbers"),
        ({"right_offsets": torch.tensor([0, 18])}, "left_offsets has 5 entries but right_offsets 2"),
        ({"left_offsets": torch.tensor([0, 3, 2, 8, 10])}, "left_offsets go from 0 to 10; they ascend from 0 to 10"),
        ({"right_offsets": torch.tensor([0, 3, 4, 8, 17])}, "right_offsets go from 0 to 17; they ascend from 0 to 18"),
    ],
)
def test_wrong_inputs_are_named(changed, message):
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=message):
            concat()({name: x.cpu() for name, x in case().items()} | changed, backend)


def test_wrong_numbers_are_named():
    with pytest.raises(ValueError, match="right_prefix=-1; it is a number of rows"):
        concat(-1)(case())
    with pytest.raises(ValueError, match="num_left=29; it is from 0 to 28, the rows of x"):
        jagged_split(**split_case(), num_left=29)
