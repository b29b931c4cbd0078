"""What the operations around the attention accept: shapes, dtypes and devices, checked by their public functions."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_matrices(x: Tensor, weight: Tensor, *, names: tuple[str, str]) -> None:
    """Raise ValueError unless x `[T, K]` can be multiplied with weight `[N, K]`."""
    for name, matrix in zip(names, (x, weight), strict=True):
        if matrix.dim() != 2 or matrix.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {matrix.dtype} of shape {tuple(matrix.shape)}; it takes a matrix of {names_of(DTYPES)}"
            )
    if x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{names[1]} has {weight.shape[1]} columns but {names[0]} {x.shape[1]}; they take the same number"
        )
    check_device(x, {names[1]: weight})


def check_columns(x: Tensor, vectors: dict[str, Tensor | None], num_columns: int) -> None:
    """Raise ValueError unless each vector that is there has one floating point number per column."""
    for name, vector in vectors.items():
        if vector is None:
            continue
        if tuple(vector.shape) != (num_columns,) or vector.dtype not in DTYPES:
            shape = tuple(vector.shape)
            raise ValueError(f"{name} is {vector.dtype} of shape {shape}; it takes {num_columns} floats")
        check_device(x, {name: vector})


def check_device(x: Tensor, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless all tensors are on the device of x."""
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x on {x.device}; move it with .to({str(x.device)!r})")


def names_of(dtypes: tuple[torch.dtype, ...]) -> str:
    """As a message lists them: "float32, bfloat16"."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
