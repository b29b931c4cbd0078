"""A faster interpreter for the tests of this folder: less bookkeeping, the same arithmetic."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from triton_device import INTERPRETED


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter() -> Iterator[None]:
    """What Triton 3.7 does again for every call or operation is done once: that took two thirds of the time."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    # It replaces all of triton.language for each function that a kernel calls. Here only the launch does; what its own
    # library calls is replaced for all launches.
    library = interpreter._patch_lang(tl.cdiv.fn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            interpreter.InterpretedFunction, "__call__", lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
        )
        patch.setattr(tl.block_type, "__init__", remembering_blocks(tl.block_type.__init__, tl.constexpr))
        patch.setattr(tl.tensor, "__init__", remembering_types(tl.tensor.__init__))
        patch.setattr(interpreter, "_get_np_dtype", remembered_by_name(interpreter._get_np_dtype))
        yield
    library.restore()


def remembering_blocks(make: Callable[..., None], constexpr: type) -> Callable[..., None]:
    """The constructor of the type of a block, which formats its name: equal ones share all they hold."""
    seen: dict[Any, dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(size.value if isinstance(size, constexpr) else size for size in shape))
        if key in seen:
            self.__dict__.update(seen[key])
        else:
            make(self, element_ty, shape)
            seen[key] = self.__dict__

    return init


def remembering_types(make: Callable[..., None]) -> Callable[..., None]:
    """The constructor of a tensor: what follows from its type is kept with the type."""

    def init(self: Any, handle: Any, dtype: Any) -> None:
        known = dtype.__dict__.get("of_tensors")
        if known is None:
            make(self, handle, dtype)
            dtype.of_tensors = {name: self.__dict__[name] for name in ("numel", "dtype", "shape")}
        else:
            self.handle, self.type = handle, dtype
            self.__dict__.update(known)

    return init


def remembered_by_name(numpy_dtype_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same function of a type, computed once for each name of one."""
    seen: dict[str, Any] = {}

    def remembered(dtype: Any) -> Any:
        if dtype.name not in seen:
            seen[dtype.name] = numpy_dtype_of(dtype)
        return seen[dtype.name]

    return remembered
