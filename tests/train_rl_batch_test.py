"""Samples in rows: no token is lost or doubled, and every number is where it is predicted."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from m1_jax import ModelConfig, sharding
from train.rl import batch as rl_batch
from train.rl import row_packing
from train.rl import sample as sample_lib

TASK = sample_lib.Task("t", (), "s")
SEQ_LEN = 12


def make(prompt, answer, rng, routes=None):
    """Return a sample of distinct tokens, some of them a tool's."""
    tokens = rng.permutation(1000)[: prompt + answer]
    mask = rng.integers(0, 2, answer)
    sample = sample_lib.Sample(
        TASK, tokens[:prompt], tokens[prompt:], mask, -rng.random(answer) * mask
    )
    if routes:
        sample.routes = rng.integers(0, 8, (prompt + answer - 1, *routes)).astype(np.int8)
    return sample


def one_shape(rows, seq_len=SEQ_LEN):
    """Return shapes of which every microbatch has the one."""
    return row_packing.RowShapes((rows,), (seq_len,))


def all_rows(packed):
    return [packed.make_rows(i) for i in range(packed.num_microbatches)]


def extract(packed, arrays):
    """Return of arrays, one a microbatch, each sample's part."""
    parts = {}
    for i, array in enumerate(arrays):
        parts |= packed.extract(i, array)
    return [parts[i] for i in range(len(packed.samples))]


def samples(lengths, seed=0, routes=None):
    rng = np.random.default_rng(seed)
    return [make(prompt, answer, rng, routes) for prompt, answer in lengths]


LENGTHS = st.lists(
    st.tuples(st.integers(1, 5), st.integers(0, 7)).filter(lambda pair: sum(pair) <= SEQ_LEN),
    max_size=9,
)


SHAPES = st.sampled_from(
    [one_shape(1), one_shape(4), row_packing.RowShapes((1, 2, 4), (5, 8, SEQ_LEN))]
)


@hypothesis.given(LENGTHS, SHAPES, st.integers(0, 99))
def test_every_token_is_in_one_place(lengths, shapes, seed):
    all_samples = samples(lengths, seed)
    packed = rl_batch.pack_samples(all_samples, shapes)
    microbatches = all_rows(packed)
    assert [rows.tokens.shape for rows in microbatches] == packed.plan.shapes
    free = [np.ones(rows.tokens.shape, bool) for rows in microbatches]
    for sample, (index, row, start) in zip(all_samples, packed.plan.locations, strict=True):
        microbatch, token_ids = microbatches[index], [*sample.prompt, *sample.tokens]
        columns = slice(start, start + len(token_ids))
        assert free[index][row, columns].all()
        assert len(free[index][row, columns]) == len(token_ids)  # within one row
        free[index][row, columns] = False
        assert microbatch.tokens[row, columns].tolist() == token_ids
        assert microbatch.positions[row, columns].tolist() == list(range(len(token_ids)))
        (segment,) = set(microbatch.segment_ids[row, columns].tolist())
        assert (microbatch.segment_ids[row] == segment).sum() == len(token_ids) > 0 < segment
        assert microbatch.targets[row, columns].tolist() == [*token_ids[1:], 0]
        # The mask is where a token is predicted: one before the token.
        first = start + len(sample.prompt) - 1
        answer = slice(first, first + len(sample.tokens))
        assert microbatch.targets[row, answer].tolist() == sample.tokens.tolist()
        assert microbatch.mask[row, answer].tolist() == sample.mask.tolist()
        assert microbatch.logp_rollout[row, answer].tolist() == sample.logprobs.tolist()
        assert microbatch.mask[row, columns].sum() == sample.num_generated
    assert packed.num_tokens == [int((~empty).sum()) for empty in free]
    for microbatch, empty in zip(microbatches, free, strict=True):
        assert microbatch.expert_ids is None
        for name in ("tokens", "segment_ids", "positions", "targets", "mask", "logp_rollout"):
            assert not getattr(microbatch, name)[empty].any()
        for name in ("advantages", "coefficients", "logp_old", "logp_ref"):
            assert not getattr(microbatch, name).any()
    assert sum(rows.mask.sum() for rows in microbatches) == sum(
        sample.num_generated for sample in all_samples
    )


@hypothesis.given(LENGTHS, SHAPES, st.integers(0, 99))
def test_what_is_filled_in_can_be_taken_out(lengths, shapes, seed):
    all_samples = samples(lengths, seed)
    packed = rl_batch.pack_samples(all_samples, shapes)
    rng = np.random.default_rng(seed)
    values = [rng.standard_normal(len(sample.tokens)).astype(np.float32) for sample in all_samples]
    # What stands at masked tokens is never seen.
    dirty = [
        np.where(sample.mask, value, np.nan)
        for sample, value in zip(all_samples, values, strict=True)
    ]
    packed.fill("logp_old", dirty)
    packed.fill("advantages", list(range(1, len(all_samples) + 1)))
    microbatches = all_rows(packed)
    extracted = extract(packed, [rows.logp_old for rows in microbatches])
    numbers = extract(packed, [rows.advantages for rows in microbatches])
    for i, (sample, value) in enumerate(zip(all_samples, values, strict=True)):
        np.testing.assert_array_equal(extracted[i], np.where(sample.mask, value, 0))
        np.testing.assert_array_equal(numbers[i], sample.mask * (i + 1.0))
    with pytest.raises(ValueError, match="coefficients: got 10 for"):
        packed.fill("coefficients", [0.0] * 10)


def test_fuller_rows_come_first():
    packed = rl_batch.pack_samples(samples([(2, 2), (4, 6), (1, 1), (5, 3)]), one_shape(2))
    assert packed.plan.shapes == [(2, SEQ_LEN)]
    assert packed.plan.locations == [(0, 1, 8), (0, 0, 0), (0, 0, 10), (0, 1, 0)]
    # Numbered in the order of the samples: what counts is that neighbours differ.
    segment_ids = packed.make_rows(0).segment_ids.tolist()
    assert segment_ids == [[1] * 10 + [2] * 2, [2] * 8 + [1] * 4]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_microbatches_of_one_shape(rows):
    packed = rl_batch.pack_samples(samples([(4, 4)] * 4), one_shape(rows))
    assert packed.plan.shapes == [(rows, SEQ_LEN)] * -(-4 // rows)
    assert rl_batch.pack_samples([], one_shape(rows)).num_microbatches == 0


def test_a_sample_longer_than_a_row_is_an_error():
    rl_batch.pack_samples(samples([(5, 7)]), one_shape(1))
    with pytest.raises(ValueError, match="got a sample of 13 tokens; wanted at most 12"):
        rl_batch.pack_samples(samples([(2, 2), (5, 8)]), one_shape(1))


def test_routes_are_at_their_tokens_and_unknown_elsewhere():
    all_samples = samples([(3, 4), (2, 2), (1, 3)], routes=(2, 2))
    all_samples[1].routes = None
    packed = rl_batch.pack_samples(all_samples, one_shape(2), (2, 2))
    expert_ids = [rows.expert_ids for rows in all_rows(packed)]
    for sample, (index, row, start) in zip(all_samples, packed.plan.locations, strict=True):
        if sample.routes is not None:
            columns = slice(start, start + len(sample.routes))
            np.testing.assert_array_equal(expert_ids[index][row, columns], sample.routes)
            expert_ids[index][row, columns] = -1
    assert {x.dtype for x in expert_ids} == {np.dtype(np.int8)}
    assert all((x == -1).all() for x in expert_ids)
    # A trainer that does not replay has none.
    assert rl_batch.pack_samples(all_samples, one_shape(2)).make_rows(0).expert_ids is None


@hypothesis.given(LENGTHS, SHAPES, st.data())
def test_a_window_has_its_part_of_the_rows(lengths, shapes, data):
    all_samples = samples(lengths, routes=(2, 2))
    packed = rl_batch.pack_samples(all_samples, shapes, (2, 2))
    packed.fill("logp_old", [np.arange(1.0, len(x.tokens) + 1) for x in all_samples])
    packed.fill("coefficients", [float(i + 1) for i in range(len(all_samples))])
    for i, rows in enumerate(all_rows(packed)):
        num_rows, row_tokens = rows.tokens.shape
        first_row = data.draw(st.integers(0, num_rows - 1))
        end_row = data.draw(st.integers(first_row + 1, num_rows))
        first_column = data.draw(st.integers(0, row_tokens - 1))
        end_column = data.draw(st.integers(first_column + 1, row_tokens))
        window = rl_batch.RowWindow(first_row, end_row, first_column, end_column)
        for name, part in vars(packed.make_rows(i, window)).items():
            whole = getattr(rows, name)
            np.testing.assert_array_equal(
                part, whole[first_row:end_row, first_column:end_column], name, strict=True
            )


MESHES = [
    {"fsdp": 2, "expert": 2, "tensor": 2},  # two devices have each row
    {"expert": 2, "context": 4},  # rows are cut
    {"data": 2, "context": 2, "tensor": 2},
]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_a_microbatch_on_a_mesh_is_the_same(axes):
    all_samples = samples([(3, 4), (2, 2), (1, 3), (5, 6), (4, 4)], routes=(2, 2))
    packed = rl_batch.pack_samples(all_samples, one_shape(4), (2, 2))
    (rows,) = all_rows(packed)
    layout = sharding.make_layout(sharding.make_mesh(axes), ModelConfig.tiny())
    spread = rl_batch.device_put_microbatch(packed, 0, layout)
    for device_rows in (
        spread,
        rl_batch.device_put_microbatch(packed, 0, None),
        rl_batch.device_put_rows(rows),
    ):
        for name, expected in vars(rows).items():
            array = getattr(device_rows, name)
            assert isinstance(array, jax.Array)
            np.testing.assert_array_equal(
                rl_batch.gather_to_host(array), expected, name, strict=True
            )
    shape = (4 // layout.axis_size("batch"), SEQ_LEN // layout.axis_size("length"))
    assert {shard.data.shape for shard in spread.tokens.addressable_shards} == {shape}
    packed = rl_batch.pack_samples(all_samples, one_shape(4))
    assert rl_batch.device_put_microbatch(packed, 0, layout).expert_ids is None


def test_a_process_makes_its_own_devices_rows_alone(monkeypatch):
    """Each window once, although its devices ask for each field of it."""
    made = []
    real = rl_batch.PackedSamples.make_rows

    def make_rows(self, microbatch, window=None):
        made.append(window)
        return real(self, microbatch, window)

    monkeypatch.setattr(rl_batch.PackedSamples, "make_rows", make_rows)
    all_samples = samples([(3, 4), (2, 2)], routes=(2, 2))
    packed = rl_batch.pack_samples(all_samples, one_shape(4), (2, 2))
    layout = sharding.make_layout(sharding.make_mesh(MESHES[0]), ModelConfig.tiny())
    rl_batch.device_put_microbatch(packed, 0, layout)
    assert sorted(made) == [(row, row + 1, 0, SEQ_LEN) for row in range(4)]
