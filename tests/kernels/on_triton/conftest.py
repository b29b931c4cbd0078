"""A faster interpreter for the tests of this folder."""

from collections.abc import Iterator

import pytest
from triton_device import INTERPRETED


@pytest.fixture(scope="session", autouse=True)
def replace_the_language_once_per_launch() -> Iterator[None]:
    """The interpreter of Triton 3.7 replaces all of triton.language again for each function that a kernel calls, which
    took half the time. Here only the launch does; what its own library calls is replaced for all launches.
    """
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    library = interpreter._patch_lang(tl.cdiv.fn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            interpreter.InterpretedFunction, "__call__", lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
        )
        yield
    library.restore()
