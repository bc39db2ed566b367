"""Training visits every token in an order that only the seed decides, and validation visits each exactly once."""

from itertools import islice

import numpy as np
import pytest

from mlx_gpt.data.batches import WHOLE, Shard, TextWindows

SEQ_LEN = 7
TEXT = np.arange(100, 203, dtype=np.uint16)  # 103 different ids: 14 windows an epoch, with 5 tokens left over


def batches(size, seed=0, start=0, shard=WHOLE, text=TEXT):
    return (windows for windows, _ in TextWindows(text, SEQ_LEN).training(size, seed, start, shard))


def training(seed=0, start=0):
    return (windows[0] for windows in batches(1, seed, start))


def validation(limit=0, shard=WHOLE, text=TEXT):
    return TextWindows(text, SEQ_LEN).validation(4, limit, shard)


def epochs(count, seed=0):
    windows = training(seed)
    return [list(islice(windows, TextWindows(TEXT, SEQ_LEN).per_epoch)) for _ in range(count)]


# ---- training -------------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_token_at_most_once_as_a_target_and_leaves_out_the_remainder():
    for epoch in epochs(5):
        targets = np.concatenate([window[1:] for window in epoch])
        assert len(set(targets)) == len(targets) == 14 * SEQ_LEN
        assert set(targets) <= set(TEXT)


def test_the_remainder_is_not_the_same_tokens_in_each_epoch():
    left_out = [frozenset(TEXT) - {i for window in epoch for i in window[1:]} for epoch in epochs(5)]
    assert all(len(tokens) == 103 - 14 * SEQ_LEN for tokens in left_out)
    assert len(set(left_out)) > 1


def test_a_window_that_reaches_the_end_of_the_text_continues_at_its_start():
    for window in epochs(1)[0]:
        assert window.dtype == np.int32
        assert np.array_equal(window, 100 + (window[0] - 100 + np.arange(SEQ_LEN + 1)) % 103)


def test_the_order_is_a_function_of_the_seed_and_the_epoch():
    first, second = epochs(2)
    starts = [[int(window[0]) for window in epoch] for epoch in (first, second)]
    assert [list(window) for window in epochs(1)[0]] == [list(window) for window in first]
    assert [window[0] for window in epochs(1, seed=1)[0]] != starts[0]
    assert [sorted(order) != order for order in starts] == [True, True]
    assert starts[0] != starts[1]


@pytest.mark.parametrize("start", [1, 13, 14, 15, 29, 1000])
def test_starting_at_a_window_equals_skipping_the_earlier_ones(start):
    skipped = islice(training(3), start, start + 20)
    started = islice(training(3, start), 20)
    assert np.array_equal(list(started), list(skipped))


def test_batches_are_the_windows_in_order_across_epochs():
    windows = list(islice(training(3, 5), 40))
    found = list(islice(batches(4, 3, 5), 10))  # 14 is not a multiple of 4
    assert {(batch.shape, batch.dtype) for batch in found} == {((4, SEQ_LEN + 1), np.dtype(np.int32))}
    assert np.array_equal(np.concatenate(found), windows)


@pytest.mark.parametrize("start", [0, 12, 24])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_shards_of_all_ranks_make_the_windows_of_each_step_in_order(ranks, start):
    per_step, steps = 12, 4
    whole = np.stack(list(islice(training(3, start), steps * per_step)))

    def read(rank):
        shard = Shard(rank, ranks, per_step)
        size = per_step // ranks
        return np.stack(list(islice(batches(size, 3, start, shard), steps)))

    steps_of_all = np.concatenate([read(rank) for rank in range(ranks)], axis=1)
    assert np.array_equal(steps_of_all.reshape(whole.shape), whole)


def test_a_text_of_one_window_and_the_largest_seed_work():
    text = np.arange(SEQ_LEN + 1, dtype=np.uint16)
    batch = next(batches(3, 2**63 - 1, text=text))
    assert batch.shape == (3, SEQ_LEN + 1)
    assert all(np.array_equal(np.diff(row) % (SEQ_LEN + 1), np.ones(SEQ_LEN)) for row in batch)


# ---- validation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, SEQ_LEN, SEQ_LEN + 1, SEQ_LEN + 2, 4 * SEQ_LEN, 4 * SEQ_LEN + 1, 103])
def test_validation_has_every_token_but_the_first_once_as_a_target(length):
    targets, inputs = [], []
    for windows, weights in validation(text=TEXT[:length]):
        assert windows.shape == (4, SEQ_LEN + 1)
        assert weights.shape == (4, SEQ_LEN)
        assert np.all((weights == 1) | (windows[:, 1:] == 0))  # padding has no weight
        targets += windows[:, 1:][weights == 1].tolist()
        inputs += windows[:, :-1][weights == 1].tolist()
    assert targets == TEXT[1:length].tolist()
    assert inputs == TEXT[: length - 1].tolist()


@pytest.mark.parametrize("limit", [1, 2, 5, 14, 15])
def test_a_limit_takes_that_many_windows_spread_evenly(limit):
    def starts():
        return [
            int(window[0])
            for windows, weights in validation(limit)
            for window, w in zip(windows, weights, strict=True)
            if w[0]
        ]

    gaps = np.diff(starts()) // SEQ_LEN
    assert len(starts()) == limit
    assert starts() == starts()
    assert gaps.max(initial=1) - gaps.min(initial=gaps.max(initial=1)) <= 1
    assert starts()[0] == 100
    assert limit == 1 or starts()[-1] == 100 + 14 * SEQ_LEN  # 102 targets fill 14 windows and begin another


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_the_ranks_divide_the_validation_windows_evenly(limit):
    def targets(shard):
        return sorted(int(i) for windows, weights in validation(limit, shard) for i in windows[:, 1:][weights > 0])

    shards = [Shard(rank, 4) for rank in range(4)]
    assert sorted(i for shard in shards for i in targets(shard)) == targets(WHOLE)
    counts = [TextWindows(TEXT, SEQ_LEN).validation_count(limit, shard) for shard in shards]
    assert sum(counts) == TextWindows(TEXT, SEQ_LEN).validation_count(limit)
    assert max(counts) - min(counts) <= 1


def test_no_limit_and_a_limit_above_the_number_of_windows_take_all():
    def everything(limit):
        return np.concatenate([windows for windows, _ in validation(limit)])

    assert np.array_equal(everything(0), everything(999))
