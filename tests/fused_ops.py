"""What the tests of the operations around the attention share: their backends, and the bound of their error."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
BACKENDS = ["cpu", "triton"] if INTERPRETED or DEVICE == "cuda" else ["cpu"]

Inputs = dict[str, Tensor]


def outputs_and_gradients(op: Callable[[Inputs], Tensor], inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """The output of op and the gradients of its floating point inputs; computed in dtype, if given."""
    leaves = {
        name: x.to(dtype or x.dtype).requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()
    }
    out = op(leaves)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    names = [name for name, x in leaves.items() if x.requires_grad]
    grads = torch.autograd.grad(out, [leaves[name] for name in names], dout)
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(names, grads, strict=True)}}


def assert_as_exact_as_plain_torch(op: Callable[[Inputs, str], Tensor], inputs: Inputs, backend: str) -> None:
    """At most twice the error of the definition in the same dtypes, against the definition in float64."""
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    got = outputs_and_gradients(lambda x: op(x, backend), inputs)
    plain = outputs_and_gradients(lambda x: op(x, "reference"), inputs)
    exact = outputs_and_gradients(lambda x: op(x, "reference"), inputs, torch.float64)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds, which doubles the error of every result.
    cuts_off = backend == "triton" and INTERPRETED and any(x.dtype == torch.bfloat16 for x in inputs.values())
    for name, value in got.items():
        assert value.dtype == plain[name].dtype, name
        assert value.shape == exact[name].shape, name
        if value.numel() == 0:
            continue
        error = (value - exact[name]).abs().max()
        floor = 1e-6 * exact[name].abs().max()
        bound = (4 if cuts_off else 2) * (plain[name] - exact[name]).abs().max() + floor
        assert error <= bound, f"{name}: error {error:.1e} > {bound:.1e}, by the error of plain torch"


def assert_compiles(op: Callable[[Inputs], Tensor], inputs: Inputs) -> None:
    """torch.compile makes one graph of op, forward and backward, with the same bits."""
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    eager, traced = (outputs_and_gradients(function, inputs) for function in (op, compiled))
    for name in eager:
        assert torch.equal(eager[name], traced[name]), name


def saved_bytes_per_row(op: Callable[[], Tensor], num_rows: int) -> float:
    """Bytes per row that op keeps for its backward, in tensors with a row for each; what is shared counts once."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.dim() and x.shape[0] == num_rows:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = op()
    assert out.requires_grad
    return sum(storages.values()) / num_rows


DTYPES = pytest.mark.parametrize(
    ("dtype", "token_dtype"),
    [
        pytest.param(torch.float32, torch.float32, id="fp32"),
        pytest.param(torch.bfloat16, torch.float32, id="bf16 on fp32 tokens"),
        pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
        pytest.param(torch.float16, torch.float32, id="fp16 on fp32 tokens"),
    ],
)
