"""Packing: every token once, no needless cut, targets and weights, and little padding."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from train.data import packing


def document(length: int, number: int = 0) -> packing.TokenizedDocument:
    """Tokens that are different everywhere."""
    return packing.TokenizedDocument(
        np.arange(length, dtype=np.int32) + 10_000 * (number + 1), np.ones(length, bool)
    )


def pack(lengths, seq_len, lookahead=8, pack=True, documents=None):
    documents = documents or [document(length, i) for i, length in enumerate(lengths)]
    numbers = iter(range(len(documents)))

    def draw():
        i = next(numbers, None)
        return [] if i is None else packing.split_document(f"s:{i}:0", 0, documents[i], seq_len)

    rows, waiting = [], []
    while (row := packing.pack_next_row(waiting, draw, seq_len, lookahead, pack)) is not None:
        rows.append(row)
    assert not waiting
    return rows


def pieces(row):
    """Yield (sample, start in its document, slice of the row)."""
    for i, name in enumerate(row.sample_ids):
        sample, _, start = name.partition("@")
        places = np.flatnonzero(row.arrays.segment_ids == i + 1)
        assert (np.diff(places) == 1).all()
        yield sample, int(start or 0), slice(places[0], places[-1] + 1)


LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@hypothesis.given(LENGTHS, st.integers(2, 20), st.integers(1, 9), st.booleans())
def test_every_token_is_in_exactly_one_place(lengths, seq_len, lookahead, together):
    found = {}
    for row in pack(lengths, seq_len, lookahead, together):
        real = row.arrays.segment_ids > 0
        assert not row.arrays.weights[~real].any()
        assert not row.source_ids[~real].any()
        assert (row.source_ids[real] == 1).all()
        assert together or len(row.sample_ids) == 1
        for sample, start, here in pieces(row):
            np.testing.assert_array_equal(
                row.arrays.positions[here], np.arange(here.stop - here.start)
            )
            for place, token in enumerate(row.arrays.tokens[here]):
                assert (sample, start + place) not in found
                found[sample, start + place] = token
    wanted = {
        (f"s:{i}:0", place): token
        for i, length in enumerate(lengths)
        for place, token in enumerate(document(length, i).tokens)
    }
    assert found == wanted


@hypothesis.given(LENGTHS, st.integers(2, 20), st.integers(1, 9))
def test_only_documents_longer_than_a_row_are_cut(lengths, seq_len, lookahead):
    count = dict.fromkeys(range(len(lengths)), 0)
    for row in pack(lengths, seq_len, lookahead):
        for sample, _, _ in pieces(row):
            count[int(sample.split(":")[1])] += 1
    assert count == {i: -(-length // seq_len) for i, length in enumerate(lengths)}


@hypothesis.given(LENGTHS, st.integers(2, 20))
def test_a_document_of_n_tokens_gives_n_minus_1_predictions_even_if_cut(lengths, seq_len):
    total = 0
    for row in pack(lengths, seq_len):
        for _, _, here in pieces(row):
            learnt = row.arrays.weights[here] > 0
            # These documents count upwards, so that the next token is known.
            np.testing.assert_array_equal(
                row.arrays.targets[here][learnt], row.arrays.tokens[here][learnt] + 1
            )
            assert learnt[:-1].all()
        total += row.arrays.weights.sum()
    assert total == sum(length - 1 for length in lengths)


def test_weights_follow_what_is_to_be_learnt():
    learn = np.array([True, False, True, False, False, True])
    (row,) = pack([], 8, documents=[packing.TokenizedDocument(np.arange(6, dtype=np.int32), learn)])
    np.testing.assert_array_equal(row.arrays.weights, [0, 1, 0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(row.arrays.targets, [1, 2, 3, 4, 5, 0, 0, 0])
    assert {
        a.dtype.name for a in (row.arrays.tokens, row.arrays.segment_ids, row.arrays.targets)
    } == {"int32"}
    assert row.arrays.weights.dtype == np.float32


def test_the_longest_that_fits_is_taken_and_none_waits_for_ever():
    rows = pack([6, 5, 3, 4, 9, 1], 10)
    assert [row.sample_ids for row in rows] == [
        ["s:0:0", "s:3:0"],
        ["s:1:0", "s:2:0", "s:5:0"],
        ["s:4:0"],
    ]


@pytest.mark.parametrize("mean", [0.05, 0.3, 0.8, 3.0])
def test_little_is_padding(mean):
    lengths = np.random.default_rng(0).lognormal(np.log(mean * 512), 1.0, 600).astype(int) + 2
    rows = pack(lengths, 512, lookahead=64)
    used = np.mean([np.mean(row.arrays.segment_ids != 0) for row in rows[:-3]])
    print(mean, used)
    assert used > 0.95
