"""From a configuration to the parts of a run; the only place that knows every folder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from ..data.batch import Batch
from ..data.config import DataConfig
from ..data.errors import UserError
from ..data.items import read_items
from ..data.loader import Loader, LoaderState
from ..data.locations import shown
from ..data.samples import NextItemSampler, RankingSampler, Split
from ..data.schema import DatasetInfo
from ..data.storage import Storage
from ..data.storage import load_dataset as load_info
from ..embeddings.lookup import Lookup, init_tables
from ..embeddings.plan import describe_plan, make_plan
from ..embeddings.tables import build_tables
from ..model.recommender import NextItemModel, NextItemOutput, RankingModel, RankingOutput, build_model
from .config import Config
from .costs import candidates_of, cost_model_of
from .cut import Cut
from .parallel import World, seed_rank


class Recommender(nn.Module):
    """Lookup, cut and model; kept to such calls, which the training pipeline traces to find the lookup's input."""

    def __init__(self, lookup: Lookup, model: RankingModel | NextItemModel) -> None:
        super().__init__()
        self.lookup = lookup
        self.cut = Cut()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, RankingOutput | NextItemOutput]:
        """Summed loss over this rank's labels, and what it was made of."""
        return self.model(batch, self.cut(self.lookup(batch.ids)))


@dataclass(frozen=True, slots=True)
class Sharded:
    """A recommender whose tables are spread over the ranks."""

    parallel: DistributedModelParallel
    recommender: Recommender
    plan: str


def build_loader(
    config: Config, info: DatasetInfo, world: World, *, split: Split, state: LoaderState | None = None
) -> Loader:
    """Batches of one split for this rank: shuffled epochs of the training split, one ordered pass of the others."""
    data = config.data
    return Loader(
        data,
        sampler_of(config),
        split=split,
        rank=world.rank,
        world_size=world.size,
        epochs=config.trainer.epochs if split == "train" else 1,
        state=state or LoaderState(),
        pin_memory=world.device.type == "cuda",
        candidates=candidates_of(config.objective, info.num_items),
        cost_model=cost_model_of(config, num_items=info.num_items, num_actions=len(info.roles.actions)),
        numbers=tuple(config.objective.regressions),
    )


def sampler_of(config: Config) -> RankingSampler | NextItemSampler:
    """What cuts users' histories into samples."""
    data = config.data
    if config.objective.kind == "ranking":
        return RankingSampler(data.max_history, data.targets_per_sample, data.train_targets)
    return NextItemSampler(data.max_history, data.train_targets)


def build_recommender(config: Config, info: DatasetInfo) -> Recommender:
    """The whole model with tables on the meta device, its dense weights drawn from `trainer.seed`."""
    popularity = item_shares(config.data, info) if config.objective.num_in_batch else None
    return recommender_of(config, num_items=info.num_items, actions=info.roles.actions, popularity=popularity)


def recommender_of(
    config: Config, *, num_items: int, actions: tuple[str, ...], popularity: Tensor | None
) -> Recommender:
    """As `build_recommender`, of what the dataset says.

    Args:
        actions: the dataset's, in the order of their bits.
        popularity: [items + 1] share of the training events, where `objective.num_in_batch` asks for it.
    """
    features = config.data.features
    candidates = candidates_of(config.objective, num_items)
    item_keys: tuple[str, ...] = ("item",)
    if candidates is not None:
        item_keys += ("candidate",) if candidates.kind == "catalogue" else ("positive", "candidate")
    torch.manual_seed(config.trainer.seed)
    try:
        model = build_model(
            config.model,
            config.objective,
            features=dict(features),
            actions=actions,
            embedding_dim=config.embeddings.dim,
            max_history=config.data.max_history,
            max_targets=config.data.targets_per_sample if config.objective.kind == "ranking" else 0,
            popularity=popularity,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    tables = build_tables(config.embeddings, num_items=num_items, features=features, item_keys=item_keys)
    return Recommender(Lookup(tables, config.embeddings), model)


def item_shares(data: DataConfig, info: DatasetInfo) -> Tensor:
    """Each item's share of the training events by dense id, [items + 1] float32; the unknown item has none."""
    counts = read_items(Storage(data.path, retry_seconds=data.retry_seconds), info, ["id", "count"])
    shares = torch.zeros(info.num_items + 1)
    ids, times = (torch.from_numpy(counts[name].to_numpy().copy()) for name in ("id", "count"))
    shares[ids] = times.float()
    return shares / info.counts.train_events


def shard(recommender: Recommender, config: Config, world: World) -> Sharded:
    """Spread the tables over the ranks, replicate the rest, and give the tables their initial rows."""
    if config.embeddings.optimizer.kind == "adam" and world.device.type == "cpu":
        raise UserError(
            "embeddings.optimizer.kind='adam' needs CUDA: fbgemm's CPU tables have no fused Adam; "
            "use 'rowwise_adagrad' on the CPU"
        )
    plan, sharder = make_plan(recommender, config.embeddings, device=world.device)
    parallel = DistributedModelParallel(recommender, device=world.device, plan=plan, sharders=[sharder])
    init_tables(parallel, std=config.embeddings.init_std, seed=config.trainer.seed)
    # Ranks drop out different units; initial weights came from the common seed.
    seed_rank(config.trainer.seed, rank=world.rank)
    return Sharded(parallel, recommender, describe_plan(plan, config.embeddings))


def load_dataset(config: Config) -> DatasetInfo:
    """What `ultrarec prepare` wrote, checked against what the recipe asks of it."""
    info = load_info(config.data.path, retry_seconds=config.data.retry_seconds)
    path = shown(config.data.path)
    if info.counts.train_events == 0:
        raise UserError(f"{path} has no training events; prepare it with another split")
    if config.trainer.evaluate_every is not None and info.counts.validation_events == 0:
        raise UserError(
            f"trainer.evaluate_every={config.trainer.evaluate_every}, but {path} has no validation events; "
            "prepare it with --leave-last or --validation-time, or remove the setting"
        )
    return info
