"""Windows hold whole conversations with little padding, each once in an epoch, in an order that the seed decides."""

from itertools import islice
from unittest import mock

import numpy as np
import pytest

from mlx_gpt.data import packing
from mlx_gpt.data.batches import Shard
from mlx_gpt.data.chat_tokens import BEGINS, COUNTS, MAY_END, NEW
from mlx_gpt.data.packing import PackedWindows, best_fit, fill, pack
from mlx_gpt.errors import UserError

SEQ_LEN = 63


def conversations(lengths, turn=1000):
    """Rows in which all tokens differ; the second half of each turn counts."""
    rows, first = [], 1
    for length in lengths:
        row = np.arange(first, first + length, dtype=np.uint32)
        place = np.arange(length) % min(turn, length)
        row |= np.where(place >= min(turn, length) // 2, COUNTS, np.uint32(0))
        row |= np.where(place == 0, MAY_END, np.uint32(0))
        row[0] |= BEGINS | NEW
        rows.append(row)
        first += length
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def lengths():
    return np.random.default_rng(0).lognormal(3, 0.7, 2000).astype(int).clip(4, 64)


@pytest.fixture(scope="module")
def packed(lengths):
    return PackedWindows(conversations(lengths), SEQ_LEN, seed=1)


def read(windows):
    """The tokens of each window and the tokens that count."""
    tokens = [token for window, _ in windows for token in window[window > 0].tolist()]
    counting = [token for window, weights in windows for token in window[1:][weights > 0].tolist()]
    return tokens, counting


def test_an_epoch_has_each_conversation_whole_and_once_with_little_padding(packed, lengths):
    batches = islice(packed.training(1, 0), packed.per_epoch)
    windows = [(window, weights) for ((window,), (weights,)) in batches]
    tokens, counting = read(windows)
    assert sorted(tokens) == list(range(1, lengths.sum() + 1))
    ends = np.cumsum(lengths)
    assert len(counting) == sum(length - length // 2 for length in lengths)
    begins = set((ends - lengths + 1).tolist())
    for window, weights in windows:
        used = window[window > 0]
        breaks = [0, *(np.flatnonzero(np.diff(used) != 1) + 1)]
        assert {int(used[at]) for at in breaks} <= begins
        assert weights.dtype == np.float32
        assert not weights[window[1:] == 0].any()
    assert 1 - lengths.sum() / (packed.per_epoch * (SEQ_LEN + 1)) < 0.05
    assert packed.warnings == []


@pytest.mark.parametrize("packed_by", [best_fit, fill, pack])
@pytest.mark.parametrize("seed", range(20))
def test_any_lengths_are_packed_whole_and_once(seed, packed_by):
    draw = np.random.default_rng(seed)
    room = int(draw.integers(2, 300))
    lengths = draw.integers(1, room + 1, size=int(draw.integers(1, 400)))
    windows = packed_by(lengths, room, seed)
    assert sorted(i for window in windows for i in window) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in window) <= room for window in windows)
    # No two windows would fit into one (any-fit: Johnson 1973).
    used = sorted(int(sum(lengths[i] for i in window)) for window in windows)
    assert len(used) < 2 or used[0] + used[1] > room
    assert windows == packed_by(lengths, room, seed)


@pytest.mark.parametrize(
    ("shortest", "longest", "room", "most"), [(27, 46, 257, 0.03), (60, 90, 513, 0.03), (20, 400, 513, 0.05)]
)
def test_lengths_that_hardly_vary_leave_little_padding_too(shortest, longest, room, most):
    lengths = np.random.default_rng(0).integers(shortest, longest, size=250)
    windows = pack(lengths, room)
    assert 1 - lengths.sum() / (room * len(windows)) < most
    assert len(windows) <= len(best_fit(lengths, room))


def epochs(packed, count, seed=0):
    batches = packed.training(1, seed)
    return [[next(batches)[0][0].tolist() for _ in range(packed.per_epoch)] for _ in range(count)]


def test_each_epoch_has_every_window_once_in_an_order_of_its_own():
    packed = PackedWindows(conversations([40] * 9), SEQ_LEN)
    first, second = epochs(packed, 2)
    assert sorted(first) == sorted(second)
    assert first != second
    assert epochs(packed, 1) == [first]
    assert epochs(packed, 1, seed=1) != [first]


def test_conversations_of_one_length_have_other_neighbours_in_each_epoch():
    packed = PackedWindows(conversations([30] * 8 + [20] * 8), SEQ_LEN)
    assert packed.per_epoch == 7
    neighbours = [
        {tuple(sorted(np.unique((np.array(w) - 1) // 10).tolist())) for w in epoch} for epoch in epochs(packed, 4)
    ]
    assert len({frozenset(each) for each in neighbours}) == 4


def test_each_conversation_is_the_first_of_its_window_in_some_epoch():
    """People begin with any question, so each question must sometimes stand first."""
    packed = PackedWindows(conversations([24, 22, 18, 14, 12, 10]), SEQ_LEN)
    assert packed.per_epoch == 2
    first = {window[0] for epoch in epochs(packed, 20) for window in epoch}
    assert first == {1, 25, 47, 65, 79, 91}


@pytest.mark.parametrize("start", [1, 17, 1000, 3333])
def test_starting_in_the_middle_equals_skipping_what_came_before(packed, start):
    skipped = [batch[0] for batch in islice(packed.training(1, 5), start, start + 20)]
    started = [batch[0] for batch in islice(packed.training(1, 5, start), 20)]
    assert np.array_equal(started, skipped)


def test_the_shards_of_all_ranks_make_the_windows_of_each_step(packed):
    whole = list(islice(packed.training(12, 3, 24), 4))
    shards = [list(islice(packed.training(4, 3, 24, Shard(rank, 3, 12)), 4)) for rank in range(3)]
    for step in range(4):
        for part in range(2):
            assert np.array_equal(np.concatenate([shard[step][part] for shard in shards]), whole[step][part])


def test_the_places_are_those_of_the_windows(packed):
    places = packed.places(5, 7, 10)
    windows = [windows[0] for windows, _ in islice(packed.training(1, 5, 7), 10)]
    assert [int(window[0]) - 1 for window in windows] == places


@pytest.mark.parametrize("ranks", [1, 3])
def test_validation_has_each_conversation_once(packed, lengths, ranks):
    shards = [list(packed.validation(8, 0, Shard(rank, ranks))) for rank in range(ranks)]
    windows = [pair for shard in shards for batch in shard for pair in zip(*batch, strict=True)]
    assert sorted(read(windows)[0]) == list(range(1, lengths.sum() + 1))
    assert sum(packed.validation_count(0, Shard(rank, ranks)) for rank in range(ranks)) == len(lengths)


def test_validation_reads_each_conversation_alone_in_a_window_that_is_not_much_longer(packed, lengths):
    begins = set((np.cumsum(lengths) - lengths + 1).tolist())
    widths = set()
    for windows, weights in packed.validation(8):
        assert windows.shape == (8, weights.shape[1] + 1)
        widths.add(weights.shape[1])
        used = [window[window > 0] for window in windows if window.any()]
        assert all(int(tokens[0]) in begins and (np.diff(tokens) == 1).all() for tokens in used)
        assert weights.shape[1] == SEQ_LEN or max(map(len, used)) <= weights.shape[1] + 1
    assert widths == {SEQ_LEN}  # an odd number can't be halved
    even = PackedWindows(conversations(lengths.clip(4, 61)), 60)
    assert {weights.shape[1] for _, weights in even.validation(8)} == {60, 30, 15}
    assert sorted(read([pair for batch in even.validation(8) for pair in zip(*batch, strict=True)])[0]) == list(
        range(1, lengths.clip(4, 61).sum() + 1)
    )


def test_a_long_conversation_keeps_its_first_turns_and_says_so():
    packed = PackedWindows(conversations([150, 10], turn=20), SEQ_LEN)
    tokens, _ = read([packed.window(number) for number in range(2)])
    assert sorted(tokens) == [*range(1, 61), *range(151, 161)]
    (line,) = packed.warnings
    assert line == (
        "WARNING: 1 of the 2 training conversations are longer than a window of 63 tokens: "
        "only their first turns count."
    )


def test_a_conversation_whose_first_answer_does_not_fit_is_left_out_and_counted():
    packed = PackedWindows(conversations([150, 10], turn=100), SEQ_LEN)
    tokens, _ = read([packed.window(0)])
    assert sorted(tokens) == [*range(151, 161)]
    assert packed.warnings == [
        "WARNING: left out 1 of 2 training conversations, in which not even one answer fits into a window of 63 "
        "tokens: raise --seq-len."
    ]


def test_parts_of_conversations_are_called_examples():
    rows = conversations([40, 40, 20, 100])
    begins = np.flatnonzero(rows & BEGINS)
    rows[begins[1]] &= ~NEW
    packed = PackedWindows(rows, SEQ_LEN)
    assert packed.facts == ["3 examples from 2 conversations packed into 2 windows, with 21.9% padding"]
    assert packed.warnings[0].startswith("WARNING: left out 1 of 4 training examples, in which not even one answer")


def test_a_longer_window_is_advised_only_if_the_model_has_one():
    rows = conversations([150, 10], turn=100)
    assert PackedWindows(rows, SEQ_LEN, context=SEQ_LEN).warnings[0].endswith("a window of 63 tokens.")
    assert PackedWindows(rows, SEQ_LEN, context=99).warnings[0].endswith("a window of 63 tokens: raise --seq-len.")


def test_packing_ends_early_where_nothing_could_be_tighter(monkeypatch):
    """Searching for a better fill takes a minute for a million conversations."""
    monkeypatch.setattr(packing, "fill", mock.Mock(side_effect=AssertionError))
    assert len(pack([34] * 9, 100)) == 5


def test_a_conversation_counts_whichever_of_its_examples_fit():
    rows = conversations([100, 40, 20], turn=100)
    begins = np.flatnonzero(rows & BEGINS)
    rows[begins[1]] &= ~NEW  # the first two are one conversation, and only its second example fits
    assert PackedWindows(rows, SEQ_LEN).facts[0].startswith("2 conversations packed into 1 window,")


def test_losing_only_the_end_of_text_is_no_shortening():
    rows = conversations([65, 10], turn=100)
    rows[64] |= MAY_END  # as `chat_tokens` marks it
    assert PackedWindows(rows, SEQ_LEN).warnings == []


def test_if_nothing_fits_the_sentence_names_a_length_that_does():
    rows = conversations([350, 250], turn=100)
    with pytest.raises(UserError, match=r"any of the 2 training conversations: use --seq-len 99 or more"):
        PackedWindows(rows, SEQ_LEN)
    assert PackedWindows(rows, 99).per_epoch == 2
    with pytest.raises(UserError, match="any of the 2"):
        PackedWindows(rows, 98)


def test_if_nothing_fits_into_the_context_the_sentence_says_so():
    rows = conversations([350, 250], turn=100)
    with pytest.raises(UserError, match=r"shortest needs 99 tokens, but the model's context has 98: shorten them.$"):
        PackedWindows(rows, SEQ_LEN, context=98)
    with pytest.raises(UserError, match="use --seq-len 99 or more"):
        PackedWindows(rows, SEQ_LEN, context=99)
