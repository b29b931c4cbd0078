"""The formulas of activations against what autograd saves."""

import itertools

import numpy as np
import pytest
import torch
from model_variants import BY_NAME

from ultrarec.model.activations import activation_bytes
from ultrarec.model.backbones import build_backbone
from ultrarec.model.config import ModelConfig
from ultrarec.model.flops import Sample
from ultrarec.model.sequences import Limits, Sequences

ACTIONS = ("is_click", "is_like", "long_view")
CONTEXTUAL, HISTORIES, TARGETS = 2, (150, 40, 90), (6, 3, 1)
WIDTHS = {"width": 24, "num_heads": 2, "qk_dim": 16, "value_dim": 16, "ffn_width": 40}


def saved_bytes(backbone, x, seqs, *, autocast):
    """Bytes of all memory that autograd holds on to, weights and their rounded copies apart."""
    kept = {}
    shapes = {shape for p in backbone.parameters() for shape in (p.shape, p.T.shape if p.dim() == 2 else p.shape)}

    def pack(tensor):
        if tensor.shape not in shapes:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        backbone(x, seqs)
    return sum(storage.nbytes() for storage in kept.values())


def not_counted(config, longest):
    """The most bytes of what a batch has once.

    The numbers of position biases, where padded attention adds them; and as integers, four for each sample and each
    target of each set of sequences, of which truncation and channels make new ones: offsets, counts, rows.
    """
    sets = (1 + (config.tail is not None)) * (1 + len(config.channels))
    numbers = 4 * 8 * (len(HISTORIES) + 1 + sum(TARGETS)) * sets
    by_position = config.backbone == "fuxi_alpha" or config.attention == "softmax"
    return numbers, 8 * longest**2 * config.num_layers if by_position else 0


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", BY_NAME.values(), ids=BY_NAME.keys())
def test_every_variant_keeps_what_the_formula_says(settings, autocast):
    torch.manual_seed(0)
    config = ModelConfig(**{**settings, **WIDTHS})
    per_event = 1 + (config.tokens == "interleaved")
    limits = Limits(
        num_contextual=CONTEXTUAL,
        max_history=max(HISTORIES),
        max_targets=max(TARGETS),
        tokens_per_event=per_event,
        actions=ACTIONS,
        context_sees_history=True,
    )
    lengths = [CONTEXTUAL + per_event * history + targets for history, targets in zip(HISTORIES, TARGETS, strict=True)]
    times = torch.arange(sum(lengths))
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    seqs = Sequences(offsets, torch.tensor(TARGETS), times, times.clone(), torch.full_like(times, 0b111))
    # Tokens are the result of encoders, which autocast rounds anew for each that reads them.
    x = torch.randn(len(times), config.width, requires_grad=True) * 1.0
    saved = saved_bytes(build_backbone(config, limits), x, seqs, autocast=autocast)
    formula = activation_bytes(
        config,
        Sample(contextual=CONTEXTUAL, history=np.array(HISTORIES), targets=np.array(TARGETS)),
        longest=Sample(contextual=CONTEXTUAL, history=max(HISTORIES), targets=max(TARGETS)),
        bytes_per_value=2 if autocast else 4,
    ).sum()
    numbers, by_position = not_counted(config, max(lengths))
    assert 0 <= saved - formula - by_position <= numbers
