"""What all kernel tests share: memory that nobody wrote is NaN."""

import pytest
import torch


@pytest.fixture
def nan_filled_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make uninitialised floating point tensors NaN, so that an element left unwritten fails a comparison."""

    def filled(make):
        def empty(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.dtype.is_floating_point else x

        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
