"""Which pairs share a batch: a function of (sizes, seed, epoch) alone."""

from __future__ import annotations

import pytest

from diffalign.batches import Order, epoch_batches

MIXED = ((64, 64),) * 11 + ((48, 96),) * 5 + ((96, 48),) * 2


@pytest.mark.parametrize("epoch", range(4))
def test_a_pair_comes_at_most_once_in_an_epoch_and_sizes_do_not_mix(epoch: int) -> None:
    batches = epoch_batches(MIXED, 2, seed=5, epoch=epoch)
    used = [index for batch in batches for index in batch]
    assert len(used) == len(set(used)) and set(used) <= set(range(len(MIXED)))
    assert len(batches) == 5 + 2 + 1 and all(len(batch) == 2 for batch in batches)
    assert all(len({MIXED[index] for index in batch}) == 1 for batch in batches)


def test_every_epoch_has_as_many_batches_so_a_number_alone_finds_one() -> None:
    lengths = {len(epoch_batches(MIXED, size, 0, epoch)) for size in (3,) for epoch in range(6)}
    assert lengths == {3 + 1 + 1}


def test_the_order_follows_from_seed_and_epoch() -> None:
    found = {(seed, epoch): epoch_batches(MIXED, 2, seed, epoch) for seed in (0, 7) for epoch in range(3)}
    assert all(epoch_batches(MIXED, 2, *key) == batches for key, batches in found.items())
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("chosen", [None, tuple(range(3, 17))])
def test_a_batch_follows_from_its_number_whatever_was_asked_before(chosen: tuple[int, ...] | None) -> None:
    order, count = Order(MIXED, 2, 7, chosen), 30
    forward = [tuple(order.at(number)) for number in range(count)]
    assert [tuple(order.at(number)) for number in reversed(range(count))] == forward[::-1]
    assert {i for batch in forward for i in batch} <= set(range(len(MIXED)) if chosen is None else chosen)
    kinds = [MIXED[i] for i in (chosen or range(len(MIXED)))]
    first = epoch_batches(kinds, 2, 7, 0)[0]
    assert forward[0] == (first if chosen is None else tuple(chosen[place] for place in first))


def test_what_an_epoch_leaves_out_comes_in_another() -> None:
    seen = {i for epoch in range(12) for batch in epoch_batches(MIXED, 2, 0, epoch) for i in batch}
    assert seen == set(range(len(MIXED)))


def test_a_size_with_too_few_pairs_fills_its_batch_with_repeats() -> None:
    [batch] = epoch_batches(((64, 64),) * 2, 5, 0, 0)
    assert len(batch) == 5 and set(batch) == {0, 1}
