"""The seeded dropout: its rate, its independence, and that it depends on seed, row and column only."""

import pytest
import torch

from ultrarec.kernels import new_seed
from ultrarec.kernels.dropout import CHUNK, drop_, kept

SEED = torch.tensor([-(2**50) + 12345])


@pytest.mark.parametrize("probability", [0.001, 0.2, 0.5, 0.99])
def test_each_element_is_dropped_with_the_probability(probability):
    mask = kept(SEED, 1000, 1000, probability)
    deviation = (probability * (1 - probability) / mask.numel()) ** 0.5
    assert abs(1 - mask.double().mean().item() - probability) < 5 * deviation


def test_no_row_column_neighbour_or_seed_tells_of_another():
    mask = kept(SEED, 2000, 500, 0.5).double() - 0.5
    other = kept(SEED + 1, 2000, 500, 0.5).double() - 0.5
    negated = kept(~SEED, 2000, 500, 0.5).double() - 0.5
    pairs = {
        "next row": (mask[1:], mask[:-1]),
        "next column": (mask[:, 1:], mask[:, :-1]),
        "diagonal": (mask[1:, 1:], mask[:-1, :-1]),
        "next seed": (mask, other),
        "negated seed": (mask, negated),
        "transposed": (mask[:500], mask[:500].T),
    }
    for name, (x, y) in pairs.items():
        correlation = (4 * x * y).mean().item()
        assert abs(correlation) < 5 / x.numel() ** 0.5, name
    rectangles = mask[:-1, :-1] * mask[1:, :-1] * mask[:-1, 1:] * mask[1:, 1:]
    assert abs(16 * rectangles.mean().item()) < 5 / rectangles.numel() ** 0.5
    for dim, name in ((0, "columns"), (1, "rows")):
        spread = mask.sum(dim).var().item() / (mask.shape[dim] / 4)
        assert abs(spread - 1) < 5 * (2 / mask.shape[1 - dim]) ** 0.5, name


def test_all_tensors_lose_what_kept_leaves_out_across_chunks():
    num_rows = 2 * CHUNK // 100 + 7
    x, y = torch.ones(num_rows, 100), torch.ones(num_rows, 100, dtype=torch.bfloat16)
    drop_(SEED, 0.3, x, y)
    mask = kept(SEED, num_rows, 100, 0.3)
    assert torch.equal(x, mask.float())
    assert torch.equal(y, mask.bfloat16())


def test_an_element_does_not_depend_on_how_many_there_are():
    assert torch.equal(kept(SEED, 50, 40, 0.4)[:20, :30], kept(SEED, 20, 30, 0.4))


def test_the_mask_of_a_seed_never_changes():
    # Written down from the first version: a run resumed by a later release drops what it would have dropped.
    assert kept(torch.tensor([1]), 2, 8, 0.5).tolist() == [[1, 1, 0, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1]]


def test_no_rows_and_no_columns_are_legal():
    assert kept(SEED, 0, 5, 0.5).shape == (0, 5)
    drop_(SEED, 0.5, torch.empty(0, 5))


def test_seeds_are_drawn_from_torchs_generator():
    torch.manual_seed(0)
    first, second = new_seed(torch.device("cpu")), new_seed(torch.device("cpu"))
    torch.manual_seed(0)
    assert torch.equal(first, new_seed(torch.device("cpu")))
    assert not torch.equal(first, second)
