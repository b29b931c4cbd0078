"""What ranks tell each other."""

import pytest
import torch
from process_group import run_ranks

from ultrarec.data.errors import UserError
from ultrarec.trainer.config import TrainerConfig
from ultrarec.trainer.parallel import World, gather_objects, gather_rows, join, on_main, sum_over_ranks


def gather_uneven() -> list[list[int]]:
    rank = torch.distributed.get_rank()
    return gather_rows(torch.full((rank, 2), rank)).tolist()


def fail_on_main() -> str:
    rank = torch.distributed.get_rank()
    world = World(rank=rank, size=3, device=torch.device("cpu"))

    def fail() -> None:
        raise UserError(f"said by rank {rank}")

    try:
        on_main(world, fail)
    except UserError as error:
        return str(error)
    return "nothing raised"


def sums_and_objects() -> tuple[list[float], list[int], int]:
    rank = torch.distributed.get_rank()
    world = World(rank=rank, size=3, device=torch.device("cpu"))
    return sum_over_ranks(torch.tensor([1.0, rank])).tolist(), gather_objects(rank), on_main(world, lambda: rank)


def test_rows_of_ranks_with_unequal_counts_arrive_whole_and_in_rank_order():
    assert run_ranks(gather_uneven, world_size=3) == [[[1, 1], [2, 2], [2, 2]]] * 3


def test_an_error_on_rank_0_is_raised_on_every_rank():
    assert run_ranks(fail_on_main, world_size=3) == ["said by rank 0"] * 3


def test_sums_objects_and_rank_0s_values_reach_every_rank():
    assert run_ranks(sums_and_objects, world_size=3) == [([3.0, 3.0], [0, 1, 2], 0)] * 3


def test_a_failing_rank_fails_the_test():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_ranks(divide_by_rank, world_size=2)


def divide_by_rank() -> float:
    return 1 / torch.distributed.get_rank()


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "first"), ("WORLD_SIZE", ""), ("MASTER_PORT", "abc"), ("MASTER_ADDR", None)]
)
def test_an_environment_that_no_launcher_makes_is_refused_by_name(monkeypatch, name, value):
    for known, number in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29500", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(known, number)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"environment variable {name}.*unset RANK"), join(TrainerConfig(epochs=1)):
        pass


def test_a_missing_cuda_device_is_said_with_the_remedy():
    if torch.cuda.is_available():
        pytest.skip("has a CUDA device")
    config = TrainerConfig(epochs=1, device="cuda")
    with pytest.raises(UserError, match=r"finds 0 CUDA device\(s\) for 1 process.*use 'auto' or 'cpu'"), join(config):
        pass
