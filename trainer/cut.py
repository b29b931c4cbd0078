"""The cut between tables and model: backward stops there until all ranks have found the batch's numbers good."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Cut(nn.Module):
    """Hands embeddings to the model as leaves of a graph of its own, and their gradients back to the tables later.

    fbgemm updates the tables inside their backward pass. One pass through model and tables would thus have changed
    them before anybody could look at the gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self._looked_up: dict[str, Tensor] = {}
        self._leaves: dict[str, Tensor] = {}

    def forward(self, embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same vectors by key; where gradients are wanted, cut off from what computed them."""
        if not torch.is_grad_enabled():
            return embeddings
        self._looked_up = embeddings
        self._leaves = {key: vectors.detach().requires_grad_() for key, vectors in embeddings.items()}
        # Views, since autocast casts a leaf once for all its uses, and their gradients would then be added in bfloat16.
        return {key: leaf.view_as(leaf) for key, leaf in self._leaves.items()}

    def gradients(self) -> dict[str, Tensor]:
        """By key, the gradients that have arrived; keys that the loss does not depend on are missing."""
        return {key: leaf.grad for key, leaf in self._leaves.items() if leaf.grad is not None}

    def backward(self) -> None:
        """Continue into the tables, which exchange and apply the gradients; every rank must take part."""
        gradients = self.gradients()
        keys = list(self._looked_up)
        # A key without a gradient takes part with zeros: another rank may have one for it.
        torch.autograd.backward(
            [self._looked_up[key] for key in keys],
            [gradients.get(key, torch.zeros_like(self._leaves[key])) for key in keys],
        )
        self.drop()

    def drop(self) -> None:
        """Forget the batch; the tables never hear of it."""
        self._looked_up, self._leaves = {}, {}
