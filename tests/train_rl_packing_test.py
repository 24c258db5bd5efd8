"""Which rows samples lie in: all of them whole, in few shapes, with little padding."""

import importlib.util
import pathlib
import types

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from train.rl import row_packing

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def make_layout(batch=1, length=1):
    """Return what of a layout decides on rows."""
    sizes = {"batch": batch, "length": length}
    return types.SimpleNamespace(axis_size=sizes.__getitem__, mesh=AxisSizes(expert=batch))


class AxisSizes(dict):
    """Sizes of a mesh's axes, as a mesh has them."""

    @property
    def shape(self):
        return {"data": 1, "fsdp": 1} | self


def test_shapes_of_a_run():
    shapes = row_packing.make_row_shapes(16, 86_016, make_layout(16, 32))
    assert shapes.row_counts == (16,)
    assert (shapes.row_lengths[0], shapes.row_lengths[-1]) == (5_376, 86_016)
    assert len(shapes.row_lengths) == 33
    assert all(tokens % 128 == 0 for tokens in shapes.row_lengths)
    assert shapes.largest == (16, 86_016)
    assert row_packing.make_row_shapes(4, 100, None) == row_packing.RowShapes((1, 2, 4), (128,))
    assert row_packing.make_row_shapes(12, 100, make_layout(2)).row_counts == (6, 12)


@pytest.mark.parametrize(
    ("longest", "length", "rounded"), [(37, 2, 128), (300, 3, 384), (385, 3, 768), (1000, 32, 1024)]
)
def test_row_lengths_are_rounded_up_to_what_the_layout_splits(longest, length, rounded):
    shapes = row_packing.make_row_shapes(2, longest, make_layout(2, length))
    assert shapes.row_lengths[-1] == rounded
    assert all(n % 128 == n % length == 0 for n in shapes.row_lengths)


@pytest.mark.parametrize(("rows", "batch"), [(3, 2), (2, 4), (24, 16)])
def test_rows_that_a_layout_cannot_split_are_refused(rows, batch):
    with pytest.raises(ValueError, match=f"batch: got {rows} rows over expert={batch}"):
        row_packing.make_row_shapes(rows, 100, make_layout(batch))


@hypothesis.given(
    st.lists(st.integers(1, 1000), max_size=60),
    st.sampled_from([(1, 1), (2, 1), (4, 4), (8, 2)]),
    st.integers(1, 3),
)
def test_every_sample_lies_whole_in_a_row(lengths, rows_and_split, length_split):
    rows, split = rows_and_split
    shapes = row_packing.make_row_shapes(rows, 1000, make_layout(split, length_split))
    plan = row_packing.plan_rows(lengths, shapes)
    used = [np.zeros(shape, bool) for shape in plan.shapes]
    for size, (microbatch, row, start) in zip(lengths, plan.locations, strict=True):
        place = used[microbatch][row, start : start + size]
        assert place.size == size
        assert not place.any()
        place[:] = True
    assert all(x.any() for x in used)
    for shape in plan.shapes:
        assert shape.num_rows in shapes.row_counts
        assert shape.num_rows % split == 0
        assert shape.row_tokens in shapes.row_lengths
    assert plan.num_places == sum(x.size for x in used)
    # As good as rows of the longest length alone, which need so many microbatches at least.
    assert plan.num_places <= max(len(lengths), 1) * shapes.largest.num_places
    assert row_packing.plan_rows(lengths, shapes) == plan


def cispo_m1():
    spec = importlib.util.spec_from_file_location("cispo_m1", CONFIGS / "cispo_m1.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def draw_lengths(rng, mean, num, longest):
    """Return lengths of answers: gamma-distributed, of shape 4, cut off by the window."""
    return np.minimum(rng.gamma(4, mean / 4, num).astype(int) + 1, longest)


@pytest.mark.parametrize("mean", [4096, 8192, 16_384, 30_000, 60_000])
def test_three_quarters_of_the_places_hold_a_token(mean):
    """At the sizes of configs/cispo_m1.py: 512 answers, 16 minibatches, 16 rows over expert=16."""
    config = cispo_m1()
    rollout, update = config.rollout, config.update
    mesh = dict(config.mesh)
    layout = make_layout(mesh["expert"], mesh["context"])
    shapes = row_packing.make_row_shapes(update.rows, rollout.max_sample_tokens, layout)
    rng, num = np.random.default_rng(0), rollout.groups * rollout.group_size
    tokens, scored_places, trained_places, used = 0, 0, 0, set()
    for _ in range(4):
        lengths = draw_lengths(rng, mean, num, rollout.windows.tokens[-1]).tolist()
        scoring = row_packing.plan_rows(lengths, shapes)
        size = num // update.minibatches
        updates = [
            row_packing.plan_rows(lengths[first : first + size], shapes)
            for first in range(0, num, size)
        ]
        tokens += sum(lengths)
        scored_places += scoring.num_places
        trained_places += sum(plan.num_places for plan in updates)
        used |= {shape for plan in (scoring, *updates) for shape in plan.shapes}
    assert tokens / scored_places >= 0.9
    assert tokens / trained_places >= 0.75
    assert len(used) <= 16
