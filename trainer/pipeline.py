"""TorchRec's training pipeline with a check in its middle: nothing learns from numbers that went wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineContext, TrainPipelineSparseDist

from ..data.batch import Batch
from .config import TrainerConfig
from .cut import Cut
from .optimizer import Deferred
from .parallel import World, gather_objects, sum_over_ranks
from .signals import HANDLED, StopRequest
from .timing import Timer

NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Trained:
    """A batch after its backward pass, and this rank's summed loss on it."""

    batch: Batch
    loss_sum: Tensor


@dataclass(frozen=True, slots=True)
class Verdict:
    """What every rank knows of a batch before it reaches the tables; equal on all of them."""

    loss: float
    """Mean over the labels of all ranks."""
    faults: tuple[str, ...]
    """What was not finite, and on which rank; empty for a good batch."""
    signum: int
    """The signal that some rank has received, 0 without one."""

    @property
    def is_good(self) -> bool:
        """Whether the batch was trained."""
        return not self.faults


class GuardedPipeline(TrainPipelineSparseDist[Batch, Trained]):
    """Overlaps a step with the next batch's exchange of ids and the one after's way to the device.

    Backward is cut in two. The dense part runs first; then all ranks agree, with one small sum, whether its numbers
    are finite; only then does it continue into the tables, on every rank or on none. A batch that fails leaves no
    trace: not in the tables, nor in the dense gradients gathered so far.
    """

    def __init__(
        self,
        parallel: DistributedModelParallel,
        cut: Cut,
        dense: dict[str, nn.Parameter],
        *,
        config: TrainerConfig,
        world: World,
        timer: Timer,
        request: StopRequest,
        may_skip: bool,
    ) -> None:
        """`may_skip`: batches may lack samples that were damaged."""
        super().__init__(parallel, Deferred(), world.device, custom_model_fwd=self._scaled_loss)
        self.verdict = Verdict(0.0, (), 0)
        """On the batch that `progress` returned last."""
        self._parallel, self._cut, self._dense = parallel, cut, dense
        self._config, self._world = config, world
        self._timer, self._request, self._may_skip = timer, request, may_skip
        self._mean_loss = torch.zeros((), dtype=torch.float64)

    def _scaled_loss(self, batch: Batch | None) -> tuple[Tensor, Trained]:
        assert batch is not None
        config, labels = self._config, max(self._labels(batch), 1)
        with (
            self._timer.phase("forward"),
            torch.autocast(self._world.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"),
        ):
            loss_sum, _ = self._parallel(batch)
        self._mean_loss = loss_sum.detach().double() / labels
        # Gradients are averaged over ranks: times their number, they are those of the mean over the global batch.
        scale = self._world.size / (labels * config.accumulate)
        return loss_sum * scale, Trained(batch, loss_sum.detach())

    def _labels(self, batch: Batch) -> int:
        """Labels of the step over all ranks; ranks tell each other of damaged ones only where there may be some."""
        if not self._may_skip:
            return batch.num_labels
        return batch.num_labels - int(sum_over_ranks(torch.tensor([batch.num_skipped_labels])))

    def wait_sparse_data_dist(self, context: TrainPipelineContext) -> None:
        """Begin the exchange of the next batch's ids, once all ranks have told how many they send."""
        with self._timer.phase("exchange"):
            super().wait_sparse_data_dist(context)

    def _backward(self, losses: Tensor) -> None:
        """What the pipeline calls between forward and update."""
        kept = {name: p.grad.clone() for name, p in self._dense.items() if p.grad is not None}
        with self._timer.phase("backward"):
            torch.autograd.backward(losses)
        with self._timer.phase("agreement"):
            self.verdict = self._judge()
        if self.verdict.is_good:
            with self._timer.phase("tables"):
                self._cut.backward()
            return
        self._cut.drop()
        for name, parameter in self._dense.items():
            if name in kept and parameter.grad is not None:
                parameter.grad.copy_(kept[name])
            else:
                parameter.grad = None

    def _judge(self) -> Verdict:
        """One sum over all ranks carries everything they have to agree on."""
        gradients = [p.grad for p in self._dense.values() if p.grad is not None]
        norms = torch._foreach_norm([*gradients, *self._cut.gradients().values()])
        finite = torch.stack([self._mean_loss, *(norm.double() for norm in norms)]).isfinite().all()
        flags = torch.zeros(2 + len(HANDLED), dtype=torch.float64, device=self._mean_loss.device)
        flags[0] = self._mean_loss
        flags[1] = ~finite
        for place, signum in enumerate(HANDLED, start=2):
            flags[place].fill_(float(self._request.signum == signum))
        dist.all_reduce(flags)
        # The one place where the host waits for the device: it must know before it queues the tables' update.
        loss, bad, *signalled = flags.tolist()
        asked = [int(signum) for signum, ranks in zip(HANDLED, signalled, strict=True) if ranks]
        return Verdict(loss, self._faults() if bad else (), max(asked, default=0))

    def _faults(self) -> tuple[str, ...]:
        """What is not finite, by rank; only asked for when something is."""
        tables = {f"the gradient of embeddings of {key!r}": grad for key, grad in self._cut.gradients().items()}
        dense = {f"the gradient of {name}": p.grad for name, p in self._dense.items() if p.grad is not None}
        # A bad loss makes everything behind it bad, so the first of these tells most.
        own = _not_finite({"the loss": self._mean_loss}) or _not_finite(tables)
        found = gather_objects((own, _not_finite(dense)))
        # Averaged over ranks inside backward, the dense gradients do not tell where they went wrong.
        first = 0 if any(local for local, _ in found) else 1
        return tuple(f"rank {rank}: {', '.join(names[first])}" for rank, names in enumerate(found) if names[first])


def _not_finite(named: dict[str, Tensor]) -> list[str]:
    """The names of the tensors that are not finite, the first few of them."""
    names = [name for name, value in named.items() if not torch.isfinite(value.norm())]
    more = len(names) - NAMES_SHOWN
    return [*names[:NAMES_SHOWN], f"{more} more"] if more > 0 else names
