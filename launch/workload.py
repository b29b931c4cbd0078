"""What a training step consists of, from a dataset's statistics or from a guess at them."""

# K = kinds: of users of like length, or of samples of like length

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.errors import UserError
from ..trainer.config import Config

if TYPE_CHECKING:
    from ..data.samples import Integers, Numbers
    from ..data.schema import DatasetInfo
    from ..model.flops import Amount, Count


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """What a plan must know of the data."""

    num_items: int
    actions: tuple[str, ...]
    lengths: Integers
    """[K] training events of a user."""
    users: Numbers
    """[K] users of this length, or their share."""


def catalogue_of(info: DatasetInfo) -> Catalogue:
    """What `dataset.json` says, each bucket of lengths taken at its mean.

    Buckets are at most a factor of two wide, so that a mean of squares comes out too small by at most an eighth.
    Lengths are those of all parts of the split; each is scaled by the share of events that train.
    """
    import numpy as np

    if info.lengths is None:
        raise UserError(
            f"{info.root} was prepared before datasets held their lengths; prepare it again, or give --items and "
            "--mean-length"
        )
    users, events = np.array(info.lengths.bucket_users, np.float64), np.array(info.lengths.bucket_events, np.float64)
    scale = info.counts.train_events / max(info.counts.events, 1)
    lengths = np.rint(scale * events[users > 0] / users[users > 0]).astype(np.int64)
    return Catalogue(num_items=info.num_items, actions=info.roles.actions, lengths=lengths, users=users[users > 0])


def catalogue_like(config: Config, *, num_items: int, mean_length: int) -> Catalogue:
    """A dataset that is not there: every user has as many training events, and the actions are those predicted."""
    import numpy as np

    channels = [action for channel in config.model.channels.values() for action in channel.actions]
    actions = tuple(dict.fromkeys([*config.objective.tasks, *channels]))
    return Catalogue(num_items=num_items, actions=actions, lengths=np.array([mean_length], np.int64), users=np.ones(1))


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The samples of a step: K kinds of them, with their shares, and how many a step has over all ranks."""

    history: Integers
    """[K] events."""
    targets: Integers
    """[K] of the K kinds' events, those predicted and read by the model."""
    share: Numbers
    """[K], 1 in all."""
    samples: float

    def mean(self, values: Amount | Count) -> float:
        """Of [K] values per sample."""
        return float((self.share * values).sum())

    def longest_of(self, samples: float) -> tuple[int, int]:
        """Events of the history, and targets, of the longest of so many samples drawn by their shares, on average."""
        import numpy as np

        tokens, most_targets = self.history + self.targets, int(self.targets.max())
        order = np.argsort(tokens)
        all_at_most = np.cumsum(self.share[order]) ** max(samples, 1.0)
        longest = float((np.diff(all_at_most, prepend=0.0) * tokens[order]).sum())
        return max(round(longest) - most_targets, 0), most_targets


def workload_of(config: Config, catalogue: Catalogue) -> Workload:
    """Cut the users' histories as training does; a step holds what `data.batch_*` says, of the mean sample.

    Under stochastic length a sample is two kinds, whole and cut, each as likely as the loader has it.
    """
    import numpy as np

    from ..data.cost import UNITS_PER_TOKEN
    from ..data.loader import stochastic_length_of
    from ..data.samples import RowCounts
    from ..trainer.build import sampler_of
    from ..trainer.costs import cost_model_of

    sampler = sampler_of(config)
    lengths = catalogue.lengths.astype(np.int32)
    counts = RowCounts(lengths, lengths, np.zeros_like(lengths))
    per_user = sampler.num_samples(counts, "train")
    if not per_user.sum():
        raise UserError("no user has enough training events for a sample; give a longer --mean-length, or other data")
    kinds = np.repeat(np.arange(len(lengths)), per_user)
    numbers = np.arange(len(kinds)) - np.repeat(np.cumsum(per_user) - per_user, per_user)
    slices = sampler.slices(counts.take(kinds), numbers, "train")
    targets = sampler.num_targets(slices)
    history = sampler.num_tokens(slices) - targets
    share = catalogue.users[kinds] / catalogue.users[kinds].sum()
    if (stochastic_length := stochastic_length_of(config.data, sampler)) is not None:
        whole = stochastic_length.probabilities(history)
        share = np.concatenate([share * whole, share * (1 - whole)])
        history = np.concatenate([history, np.minimum(history, stochastic_length.threshold)])
        history, targets, share = (each[share > 0] for each in (history, np.tile(targets, 2), share))
    if config.data.batch_rows is not None:
        samples = float(config.data.batch_rows)
    elif config.data.batch_tokens is not None:
        samples = config.data.batch_tokens / float((share * (history + targets)).sum())
    else:
        assert config.data.batch_cost is not None
        cost_model = cost_model_of(config, num_items=catalogue.num_items, num_actions=len(catalogue.actions))
        tokens = cost_model.units(history, targets) / UNITS_PER_TOKEN
        samples = config.data.batch_cost / float((share * tokens).sum())
    return Workload(history=history, targets=targets, share=share, samples=samples)
