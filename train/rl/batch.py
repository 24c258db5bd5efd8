"""Samples packed into the fixed rows that the trainer computes, and numbers taken out of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from m1_jax import sharding
from train.rl import sample as sample_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """One microbatch: B rows of T tokens, several samples in a row, none over two.

    tokens, segment_ids, positions: as `data.batch.TrainBatch`. What follows is at the place that
      predicts a
    token: targets: the token. mask: 1 where the model wrote it. advantages, coefficients,
    logp_old, logp_rollout, logp_ref: as `objective.TokenTerms`; 0 where mask is 0.
    routes: the experts that the sampler chose for each place's own token, -1 where unknown; None
    lets the trainer choose.
    """

    tokens: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    mask: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    coefficients: Float[Array, "B T"]
    logp_old: Float[Array, "B T"]
    logp_rollout: Float[Array, "B T"]
    logp_ref: Float[Array, "B T"]
    expert_ids: Int[Array, "B T L A"] | None = None


@dataclasses.dataclass(frozen=True)
class PackedSamples:
    """Where samples lie: microbatch, row and first place of each; `rows` are the microbatches."""

    samples: Sequence[sample_lib.Sample]
    locations: list[tuple[int, int, int]]
    microbatches: list[Any]

    def fill(self, field_name: str, values: Sequence[Any]) -> None:
        """Write a field: for every sample one number per token of its answer, or one for all."""
        for one, (micro, row, start), value in zip(
            self.samples, self.locations, values, strict=True
        ):
            first = start + len(one.prompt) - 1
            field = getattr(self.microbatches[micro], field_name)
            field[row, first : first + len(one.tokens)] = np.where(one.mask, value, 0)

    def extract(self, arrays: Sequence[Any]) -> list[np.ndarray]:
        """Return of arrays [B, T], one a microbatch, each sample's part: one per answer token."""
        found = []
        for one, (micro, row, start) in zip(self.samples, self.locations, strict=True):
            first = start + len(one.prompt) - 1
            found.append(np.asarray(arrays[micro])[row, first : first + len(one.tokens)])
        return found


def pack_samples(
    samples: Sequence[sample_lib.Sample],
    num_rows: int,
    seq_len: int,
    expert_ids_shape: tuple[int, int] | None = None,
) -> PackedSamples:
    """Lay samples into as few rows as first fit finds, longest first, `rows` rows a microbatch.

    routes: layers and choices of the model, where the samples' routes are to be replayed.

    Raises:
      ValueError: a sample that is longer than a row.
    """
    lengths = [len(one.prompt) + len(one.tokens) for one in samples]
    if max(lengths, default=0) > seq_len:
        raise ValueError(
            f"got a sample of {max(lengths)} tokens; wanted at most {seq_len} (seq_len)"
        )
    room: list[int] = []
    spots: list[tuple[int, int]] = [(0, 0)] * len(samples)
    for i in sorted(range(len(samples)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(room))
        if row == len(room):
            room.append(seq_len)
        spots[i] = (row, seq_len - room[row])
        room[row] -= lengths[i]
    places = [(row // num_rows, row % num_rows, start) for row, start in spots]
    made = [
        _empty_rows(num_rows, seq_len, expert_ids_shape) for _ in range(-(-len(room) // num_rows))
    ]
    packed = PackedSamples(samples, places, made)
    segments = np.zeros(len(room), np.int32)
    for one, (row, start), (micro, at, _) in zip(samples, spots, places, strict=True):
        segments[row] += 1
        whole = np.array([*one.prompt, *one.tokens], np.int32)
        part = slice(start, start + len(whole))
        made[micro].tokens[at, part] = whole
        made[micro].segment_ids[at, part] = segments[row]
        made[micro].positions[at, part] = np.arange(len(whole))
        made[micro].targets[at, part] = [*whole[1:], 0]
        if expert_ids_shape is not None and one.routes is not None:
            made[micro].expert_ids[at, start : start + len(one.routes)] = one.routes
    packed.fill("mask", [1.0] * len(samples))
    packed.fill("logp_rollout", [one.logprobs for one in samples])
    return packed


def _empty_rows(rows: int, seq_len: int, routes: tuple[int, int] | None) -> Any:
    make: Any = PackedRows
    ints = {n: np.zeros((rows, seq_len), np.int32) for n in _INT_FIELDS}
    floats = {n: np.zeros((rows, seq_len), np.float32) for n in _FLOAT_FIELDS}
    shape = None if routes is None else (rows, seq_len, *routes)
    return make(**ints, **floats, expert_ids=None if shape is None else np.full(shape, -1, np.int8))


_INT_FIELDS = ("tokens", "segment_ids", "positions", "targets")
_FLOAT_FIELDS = ("mask", "advantages", "coefficients", "logp_old", "logp_rollout", "logp_ref")


def gather_to_host(array: Any) -> np.ndarray:
    """Return all of an array, wherever it lies."""
    if getattr(array, "is_fully_addressable", True):
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def device_put_rows(rows: Any, layout: sharding.MeshLayout | None) -> PackedRows:
    """Put a microbatch that every process has onto the devices."""
    if layout is None:
        return jax.tree.map(jax.numpy.asarray, rows)

    def one(value):
        where = layout.activation_sharding("batch", "length", *(None,) * (value.ndim - 2))
        return jax.make_array_from_callback(value.shape, where, lambda index: value[index])

    return jax.tree.map(one, rows)
