"""The variants of the model that its tests run, and one of each, small and in float64."""

import pytest
import torch

from ultrarec.model.backbones import TARGET_ONLY
from ultrarec.model.config import ModelConfig, ObjectiveConfig
from ultrarec.model.recommender import build_model

E = 8
MAX_HISTORY, MAX_TARGETS = 12, 3
RESEARCH = {
    "width": E,
    "num_layers": 2,
    "num_heads": 2,
    "qk_dim": 3,
    "value_dim": 4,
    "relative_bias": "position_time",
    "position_encoding": "from_start",
}
INDUSTRIAL = {
    **RESEARCH,
    "relative_bias": "none",
    "activation": "u",
    "gating": "concat",
    "norm_affine": True,
    "projection_bias": True,
    "attention_alpha": "rsqrt",
    "position_encoding": "from_end",
    "time_encoding": "sqrt",
    "token_hidden": 7,
}
RANKING = ObjectiveConfig(kind="ranking", tasks=("long_view", "is_click"), task_weights=(1.0, 0.5), head_hidden=5)
NEXT_ITEM = ObjectiveConfig(kind="next_item", temperature=0.1)
NEXT_ITEM_LOSSES = {
    "full": NEXT_ITEM,
    "sampled": NEXT_ITEM.model_copy(update={"loss": "sampled_softmax"}),
    "per_sample": NEXT_ITEM.model_copy(update={"loss": "sampled_softmax", "negatives_shared_by": "sample"}),
    "bce": NEXT_ITEM.model_copy(update={"loss": "bce"}),
    "in_batch": NEXT_ITEM.model_copy(update={"loss": "sampled_softmax", "num_in_batch": 4}),
}
VARIANTS = pytest.mark.parametrize("settings", [RESEARCH, INDUSTRIAL], ids=["research", "industrial"])
PLAIN = {"width": E, "num_layers": 2, "num_heads": 2, "position_encoding": "from_start"}
ULTRA = {
    **INDUSTRIAL,
    "window": 2,
    "full_tail": 3,
    "tail": {"num_layers": 1, "num_events": 4},
    "target_action": "learned",
}
MIXTURE = {
    "engaged": {"actions": ["is_click", "is_like"], "num_events": 4, "num_layers": 1},
    "watched": {"actions": ["long_view"], "num_events": 8},
}
BY_NAME = {
    "research": RESEARCH,
    "industrial": INDUSTRIAL,
    "ultra": ULTRA,
    "softmax": {**RESEARCH, "attention": "softmax"},
    "no gate, rope": {**PLAIN, "gating": "none", "rope": True},
    "interleaved": {**RESEARCH, "tokens": "interleaved"},
    "interleaved ultra": {**ULTRA, "tokens": "interleaved", "target_action": "zero"},
    "sasrec": {**PLAIN, "backbone": "sasrec"},
    "llama": {**PLAIN, "backbone": "llama"},
    "fuxi_alpha": {**PLAIN, "backbone": "fuxi_alpha"},
    "din": {**PLAIN, "backbone": "din", "num_layers": 1},
    "stca": {**PLAIN, "backbone": "stca"},
    "mixture": {**ULTRA, "channels": MIXTURE},
}


def ranks_only(settings):
    """Whether the model encodes targets, and nothing where there are none."""
    return settings.get("backbone") in TARGET_ONLY or "channels" in settings


POSITIONS_SHARED_BY_TARGETS = (
    "industrial",
    "ultra",
    "interleaved ultra",
    "no gate, rope",
    "sasrec",
    "llama",
    "din",
    "stca",
    "mixture",
)
EVERY_BACKBONE = pytest.mark.parametrize("settings", BY_NAME.values(), ids=BY_NAME.keys())
CAUSAL_BACKBONES = pytest.mark.parametrize(
    "settings",
    [settings for settings in BY_NAME.values() if not ranks_only(settings)],
    ids=[name for name, settings in BY_NAME.items() if not ranks_only(settings)],
)


def causal(settings):
    """The same variant without what next_item refuses."""
    return {**settings, "position_encoding": "from_start", "time_encoding": "none"}


def make(settings, objective, features, actions, *, embedding_dim=E, seed=0, perturb=0.2):
    """A float64 model with no parameter at a value that hides it (scales of 1, biases of 0)."""
    torch.manual_seed(seed)
    model = build_model(
        ModelConfig(**settings),
        objective,
        features=features,
        actions=actions,
        embedding_dim=embedding_dim,
        max_history=MAX_HISTORY,
        max_targets=MAX_TARGETS if objective.kind == "ranking" else 0,
        popularity=torch.full((31,), 1 / 30) if objective.num_in_batch else None,
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(perturb * torch.randn_like(parameter))
    return model
