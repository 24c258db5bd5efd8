"""Samples in rows: nothing lost, nothing twice, every number at the place that predicts it."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from m1_jax import ModelConfig, sharding
from train.rl import batch as rl_batch
from train.rl import sample as sample_lib

TASK = sample_lib.Task("t", (), "s")
SEQ_LEN = 12


def make(prompt, answer, rng, routes=None):
    """Return a sample of distinct tokens; some are a tool's."""
    tokens = rng.permutation(1000)[: prompt + answer].tolist()
    mask = rng.integers(0, 2, answer).tolist()
    logprobs = [float(np.float32(-rng.random())) * m for m in mask]
    sample = sample_lib.Sample(TASK, tuple(tokens[:prompt]), tokens[prompt:], mask, logprobs)
    if routes:
        sample.routes = rng.integers(0, 8, (prompt + answer - 1, *routes)).astype(np.int8)
    return sample


def samples(lengths, seed=0, routes=None):
    rng = np.random.default_rng(seed)
    return [make(prompt, answer, rng, routes) for prompt, answer in lengths]


LENGTHS = st.lists(
    st.tuples(st.integers(1, 5), st.integers(0, 7)).filter(lambda pair: sum(pair) <= SEQ_LEN),
    max_size=9,
)


@hypothesis.given(LENGTHS, st.integers(1, 4), st.integers(0, 99))
def test_every_token_is_in_one_place(lengths, rows, seed):
    some = samples(lengths, seed)
    packed = rl_batch.pack_samples(some, rows, SEQ_LEN)
    free = [np.ones((rows, SEQ_LEN), bool) for _ in packed.microbatches]
    for one, (micro, row, start) in zip(some, packed.locations, strict=True):
        here, whole = packed.microbatches[micro], [*one.prompt, *one.tokens]
        part = slice(start, start + len(whole))
        assert free[micro][row, part].all()
        assert len(free[micro][row, part]) == len(whole)  # within one row
        free[micro][row, part] = False
        assert here.tokens[row, part].tolist() == whole
        assert here.positions[row, part].tolist() == list(range(len(whole)))
        (segment,) = set(here.segment_ids[row, part].tolist())
        assert (here.segment_ids[row] == segment).sum() == len(whole) > 0 < segment
        assert here.targets[row, part].tolist() == [*whole[1:], 0]
        # The mask is where a token is predicted: one before the token.
        first = start + len(one.prompt) - 1
        answer = slice(first, first + len(one.tokens))
        assert here.targets[row, answer].tolist() == one.tokens
        assert here.mask[row, answer].tolist() == one.mask
        assert here.logp_rollout[row, answer].tolist() == one.logprobs
        assert here.mask[row, part].sum() == sum(one.mask)
    for here, empty in zip(packed.microbatches, free, strict=True):
        assert here.expert_ids is None
        for name in ("tokens", "segment_ids", "positions", "targets", "mask", "logp_rollout"):
            assert not getattr(here, name)[empty].any()
        for name in ("advantages", "coefficients", "logp_old", "logp_ref"):
            assert not getattr(here, name).any()
    assert sum(one.mask.sum() for one in packed.microbatches) == sum(sum(one.mask) for one in some)


@hypothesis.given(LENGTHS, st.integers(1, 4), st.integers(0, 99))
def test_what_is_filled_in_can_be_taken_out(lengths, rows, seed):
    some = samples(lengths, seed)
    packed = rl_batch.pack_samples(some, rows, SEQ_LEN)
    rng = np.random.default_rng(seed)
    values = [rng.standard_normal(len(one.tokens)).astype(np.float32) for one in some]
    # What stands at masked tokens is never seen.
    dirty = [np.where(one.mask, value, np.nan) for one, value in zip(some, values, strict=True)]
    packed.fill("logp_old", dirty)
    packed.fill("advantages", list(range(1, len(some) + 1)))
    taken = packed.extract([one.logp_old for one in packed.microbatches])
    numbers = packed.extract([one.advantages for one in packed.microbatches])
    for i, (one, value) in enumerate(zip(some, values, strict=True)):
        np.testing.assert_array_equal(taken[i], np.where(one.mask, value, 0))
        np.testing.assert_array_equal(numbers[i], np.array(one.mask) * (i + 1.0))


def test_rows_are_filled_longest_first():
    packed = rl_batch.pack_samples(samples([(2, 2), (4, 6), (1, 1), (5, 3)]), 2, SEQ_LEN)
    assert len(packed.microbatches) == 1
    assert packed.locations == [(0, 1, 8), (0, 0, 0), (0, 0, 10), (0, 1, 0)]
    # Numbered in the order of the samples: what counts is that neighbours differ.
    assert packed.microbatches[0].segment_ids.tolist() == [[1] * 10 + [2] * 2, [2] * 8 + [1] * 4]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_microbatches_have_one_shape(rows):
    packed = rl_batch.pack_samples(samples([(4, 4)] * 4), rows, SEQ_LEN)
    assert len(packed.microbatches) == -(-4 // rows)
    assert {one.tokens.shape for one in packed.microbatches} == {(rows, SEQ_LEN)}
    assert rl_batch.pack_samples([], rows, SEQ_LEN).microbatches == []


def test_a_sample_longer_than_a_row_is_an_error():
    rl_batch.pack_samples(samples([(5, 7)]), 1, SEQ_LEN)
    with pytest.raises(ValueError, match="got a sample of 13 tokens; wanted at most 12"):
        rl_batch.pack_samples(samples([(2, 2), (5, 8)]), 1, SEQ_LEN)


def test_routes_are_at_their_tokens_and_unknown_elsewhere():
    some = samples([(3, 4), (2, 2), (1, 3)], routes=(2, 2))
    some[1].routes = None
    packed = rl_batch.pack_samples(some, 2, SEQ_LEN, (2, 2))
    left = [one.expert_ids.copy() for one in packed.microbatches]
    for one, (micro, row, start) in zip(some, packed.locations, strict=True):
        if one.routes is not None:
            part = slice(start, start + len(one.routes))
            np.testing.assert_array_equal(
                packed.microbatches[micro].expert_ids[row, part], one.routes
            )
            left[micro][row, part] = -1
    assert {x.dtype for x in left} == {np.dtype(np.int8)}
    assert all((x == -1).all() for x in left)
    # A trainer that does not replay has none.
    assert rl_batch.pack_samples(some, 2, SEQ_LEN).microbatches[0].expert_ids is None


def test_a_microbatch_on_a_mesh_is_the_same():
    some = samples([(3, 4), (2, 2), (1, 3), (5, 6), (4, 4)], routes=(2, 2))
    (rows,) = rl_batch.pack_samples(some, 4, SEQ_LEN, (2, 2)).microbatches
    mesh = sharding.make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    layout = sharding.make_layout(mesh, ModelConfig.tiny())
    for placed in (rl_batch.device_put_rows(rows, layout), rl_batch.device_put_rows(rows, None)):
        for name, wanted in vars(rows).items():
            got = getattr(placed, name)
            assert isinstance(got, jax.Array)
            np.testing.assert_array_equal(rl_batch.gather_to_host(got), wanted)
    spread = rl_batch.device_put_rows(rows, layout).tokens
    assert {piece.data.shape for piece in spread.addressable_shards} == {(1, SEQ_LEN)}
    assert (
        rl_batch.device_put_rows(
            rl_batch.pack_samples(some, 4, SEQ_LEN).microbatches[0], layout
        ).expert_ids
        is None
    )
