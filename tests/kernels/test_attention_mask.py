"""Which keys a query sees, against a loop that follows the rule word by word; and the tiles that may be skipped."""

import itertools
import re

import numpy as np
import pytest
import torch

from ultrarec.kernels import AttentionMask, hstu_attention
from ultrarec.kernels.hstu_attention.tiles import strips_of, tile_visibility

MASKS = [
    AttentionMask(*values)
    for values in itertools.product(
        (0, 1, 3), (0, 2), (0, 2, 5), (0, 1, 3)
    )  # window, full_tail, prefix, num_contextual
]


def sees(mask: AttentionMask, i: int, j: int, length: int, num_targets: int) -> bool:
    """The rule for one query and one key, with none of the code under test."""
    contextual = mask.num_contextual
    end = length - num_targets if contextual == 0 else length - num_targets - contextual + 1

    def token_id(p: int) -> int:
        own = p if contextual == 0 else max(p - contextual + 1, 0)
        return min(own, end) if num_targets else own

    if i == j:
        return True
    if token_id(i) > token_id(j):
        if mask.window == 0 or token_id(i) - token_id(j) <= mask.window:
            return True
        if mask.full_tail > 0 and token_id(i) >= end - mask.full_tail:
            return True
        if mask.prefix > 0 and (j < max(mask.prefix, contextual) or token_id(i) == end):
            return True
    return contextual > 0 and token_id(i) == 0 and token_id(j) < end


def seen_by(mask: AttentionMask, length: int, num_targets: int) -> torch.Tensor:
    return torch.tensor([[sees(mask, i, j, length, num_targets) for j in range(length)] for i in range(length)])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("num_targets", [None, 0, 1, 4])
def test_a_key_has_weight_exactly_where_the_rule_lets_the_query_see_it(backend: str, num_targets: int | None) -> None:
    length = 12
    ones, one_hot = torch.ones(length, 1, 1), torch.eye(length)[:, None, :]
    targets = None if num_targets is None else torch.tensor([num_targets])
    for mask in MASKS:
        weights = hstu_attention(
            ones,
            ones,
            one_hot,
            torch.tensor([0, length]),
            max_seq_len=length,
            num_targets=targets,
            mask=mask,
            backend=backend,
        )
        assert torch.equal(weights[:, 0] > 0, seen_by(mask, length, num_targets or 0)), mask


def test_padding_behind_a_sequence_is_hidden_from_all_its_queries() -> None:
    padded, position = 9, torch.arange(9)
    for mask, length, num_targets in itertools.product(MASKS, range(1, 9), (0, 1, 3)):
        if num_targets <= length:
            end = torch.tensor(mask.history_end(length, num_targets))
            visible = mask.visible(position[:, None], position[None, :], end)
            assert visible.shape == (padded, padded)
            assert not visible[:length, length:].any(), (mask, length, num_targets)


@pytest.mark.parametrize(("length", "num_targets"), [(14, 0), (14, 3), (13, 13), (2, 1)])
def test_tiles_called_hidden_or_visible_are_so_in_every_element(length: int, num_targets: int) -> None:
    blocks = [slice(start, min(start + 3, length)) for start in range(0, length, 3)]
    for mask in MASKS:
        seen = seen_by(mask, length, num_targets)
        some, every = tile_visibility(mask, blocks, [mask.history_end(length, num_targets)])
        for (i, rows), (j, keys) in itertools.product(enumerate(blocks), repeat=2):
            assert seen[rows, keys].all() or not every[i, j], (mask, rows, keys)
            assert not seen[rows, keys].any() or some[i, j], (mask, rows, keys)


def tiles_of(mask: AttentionMask, *, tile: int) -> tuple[int, int]:
    """How many tiles of 1024 x 1024 scores are computed, and how many of them are masked."""
    strips = list(strips_of(mask, 1024, [1024], tile=tile, most_keys=4 * tile))
    assert all(strip.keys.stop - strip.keys.start <= 4 * tile for strip in strips)
    computed = sum(strip.keys.stop - strip.keys.start for strip in strips)
    masked = sum(keys.stop - keys.start for strip in strips for keys in strip.masked)
    return computed // tile, masked // tile


def test_a_causal_mask_computes_half_of_the_tiles_and_masks_only_the_diagonal() -> None:
    assert tiles_of(AttentionMask(), tile=64) == (16 * 17 // 2, 16)


def test_a_windowed_mask_computes_tiles_in_proportion_to_the_window() -> None:
    assert tiles_of(AttentionMask(window=64), tile=64)[0] == 16 + 15
    assert tiles_of(AttentionMask(window=64, full_tail=64), tile=64)[0] == 16 + 15 + 14
    assert tiles_of(AttentionMask(window=64, prefix=64), tile=64)[0] == 16 + 15 + 14


def check_strips(mask: AttentionMask, lengths: list[int], *, num_targets: int, tile: int, most_keys: int) -> None:
    """No score twice, none that a query sees left out, and none that it does not see left unmasked."""
    longest = max(lengths)
    computed, unmasked = torch.zeros(2, longest, longest, dtype=torch.bool)
    ends = [mask.history_end(n, num_targets) for n in lengths]
    for strip in strips_of(mask, longest, ends, tile=tile, most_keys=most_keys):
        assert not computed[strip.rows, strip.keys].any(), "each score once"
        computed[strip.rows, strip.keys] = True
        unmasked[strip.rows, strip.keys] = True
        for keys in strip.masked:
            unmasked[strip.rows, keys] = False
    for n in lengths:
        seen = seen_by(mask, n, num_targets)
        assert not (seen & ~computed[:n, :n]).any(), mask
        assert not (unmasked[:n, :n] & ~seen).any(), mask


def test_the_strips_of_a_group_serve_each_of_its_sequences() -> None:
    for mask in MASKS:
        check_strips(mask, [20, 14], num_targets=2, tile=4, most_keys=12)


LONG_MASKS = [
    AttentionMask(*values) for values in itertools.product((0, 5, 40), (0, 3, 30), (0, 7, 90), (0, 1, 20))
]  # tails, prefixes and contextual tokens shorter and longer than a tile and the window


@pytest.mark.parametrize("num_targets", [0, 2, 25])
def test_the_strips_of_one_sequence_cover_what_its_queries_see_and_mask_the_rest(num_targets: int) -> None:
    for mask in (*MASKS, *LONG_MASKS):
        check_strips(mask, [30], num_targets=num_targets, tile=8, most_keys=16)
    for mask in LONG_MASKS[::2]:
        check_strips(mask, [150], num_targets=num_targets, tile=16, most_keys=64)


def test_one_sequence_computes_little_more_than_its_queries_see() -> None:
    length, targets, window = 4113, 16, 129 * 4113
    extra = {
        AttentionMask(window=128): 0,
        AttentionMask(window=128, full_tail=128): (128 + targets) * length,
        AttentionMask(window=128, prefix=128): 128 * length + targets * length,
        AttentionMask(window=128, num_contextual=1): length,
    }
    for mask, more in extra.items():
        strips = list(strips_of(mask, length, [mask.history_end(length, targets)], tile=256, most_keys=1024))
        masked = sum((s.rows.stop - s.rows.start) * (keys.stop - keys.start) for s in strips for keys in s.masked)
        computed = sum((s.rows.stop - s.rows.start) * (s.keys.stop - s.keys.start) for s in strips)
        assert window + more < 1.1 * computed, "about as many as are visible, or more"
        assert computed < 3.1 * window + more, "a block of 256 queries sees 128 + 256 keys within the window"
        assert masked < 3.1 * window, "what lies beyond the window is masked nowhere"


def test_what_is_alike_along_a_sequence_depends_on_the_distance_alone() -> None:
    length, num_targets = 20, 2
    for mask in MASKS:
        seen, end = seen_by(mask, length, num_targets), mask.history_end(length, num_targets)
        by_distance: dict[tuple[int, int, int], torch.Tensor] = {}
        for row, key, size in itertools.product(range(17), range(17), (2, 4)):
            rows, keys = slice(row, row + size), slice(key, key + 3)
            if mask.is_alike_along(rows, keys, end):
                known = by_distance.setdefault((row - key, size, 3), seen[rows, keys])
                assert torch.equal(known, seen[rows, keys]), (mask, rows, keys)
        assert by_distance or mask.num_contextual or mask.prefix or mask.full_tail, mask


@pytest.mark.parametrize("name", ["window", "full_tail", "prefix", "num_contextual"])
@pytest.mark.parametrize("value", [-1, 2.0, None, True, np.int64(-1), np.float32(2)])
def test_a_mask_refuses_what_is_not_a_count(name: str, value: object) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"AttentionMask {name}={value!r} is not a count; 0 switches it off")
    ):
        AttentionMask(**{name: value})


@pytest.mark.parametrize("value", [np.int64(3), np.uint8(3), torch.tensor(3)])
def test_a_mask_takes_integers_of_other_libraries_and_keeps_ints(value: object) -> None:
    mask = AttentionMask(window=value)
    assert mask == AttentionMask(window=3)
    assert type(mask.window) is int
