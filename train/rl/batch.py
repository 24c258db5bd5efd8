"""Samples packed into the fixed rows that the trainer computes, and numbers taken out of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from m1_jax import sharding
from train.rl import sample as sample_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """One microbatch on the devices: B rows of T tokens. A row has several samples, each whole.

    The fields from `targets` to `logp_ref` stand at the position that predicts a token, which is
    one before the token itself. Those of floats are 0 where mask is 0.

    Attributes:
      tokens: token ids, 0 in padding.
      segment_ids: number of the sample within its row, from 1, and 0 in padding.
      positions: position of the token within its sample, from 0.
      targets: id of the token that the position predicts.
      mask: 1 where the model wrote that token, else 0.
      advantages: what that token is worth, see `advantages`.
      coefficients: what it counts in the loss, see `loss.token_coefficients`.
      logp_old: its log-probability by the trainer, before the batch's updates.
      logp_rollout: its log-probability by the sampler.
      logp_ref: its log-probability by the reference model, 0 without one.
      expert_ids: for each of L layers the A experts that the sampler sent the position's own token
        to, int8, -1 where unknown. None lets the trainer's router choose.
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


@dataclasses.dataclass
class HostRows:
    """One microbatch on the host: the fields of `PackedRows` as numpy arrays, filled in place.

    They are filled one after another. Advantages may need the log-probabilities that the trainer
    computes from the tokens.
    """

    tokens: Int[np.ndarray, "B T"]
    segment_ids: Int[np.ndarray, "B T"]
    positions: Int[np.ndarray, "B T"]
    targets: Int[np.ndarray, "B T"]
    mask: Float[np.ndarray, "B T"]
    advantages: Float[np.ndarray, "B T"]
    coefficients: Float[np.ndarray, "B T"]
    logp_old: Float[np.ndarray, "B T"]
    logp_rollout: Float[np.ndarray, "B T"]
    logp_ref: Float[np.ndarray, "B T"]
    expert_ids: Int[np.ndarray, "B T L A"] | None = None


class RowLocation(NamedTuple):
    """Where a sample lies.

    Attributes:
      microbatch: index in the step.
      row: index in the microbatch, 0 to B - 1.
      start: column of the sample's first token, 0 to T - 1.
    """

    microbatch: int
    row: int
    start: int


@dataclasses.dataclass(frozen=True)
class PackedSamples:
    """Samples and the rows that they lie in.

    Attributes:
      samples: the samples, in the order in which they were given.
      locations: location of each sample.
      microbatches: the rows, in microbatches of one shape.
    """

    samples: Sequence[sample_lib.Sample]
    locations: list[RowLocation]
    microbatches: list[HostRows]

    def fill(self, field_name: str, values: Sequence[Any]) -> None:
        """Write a field: for every sample one number per token of its answer, or one for all."""
        for sample, location, value in zip(self.samples, self.locations, values, strict=True):
            field = getattr(self.microbatches[location.microbatch], field_name)
            # A `where`, not a product: what a caller has at masked tokens may be NaN.
            field[location.row, _answer_columns(sample, location)] = np.where(sample.mask, value, 0)

    def extract(self, arrays: Sequence[Any]) -> list[np.ndarray]:
        """Return of arrays [B, T], one a microbatch, each sample's part: one per answer token."""
        return [
            np.asarray(arrays[location.microbatch])[location.row, _answer_columns(sample, location)]
            for sample, location in zip(self.samples, self.locations, strict=True)
        ]


def _answer_columns(sample: sample_lib.Sample, location: RowLocation) -> slice:
    """Return the columns that predict a sample's answer: they begin at the prompt's last token."""
    first = location.start + len(sample.prompt) - 1
    return slice(first, first + len(sample.tokens))


def pack_samples(
    samples: Sequence[sample_lib.Sample],
    num_rows: int,
    seq_len: int,
    expert_ids_shape: tuple[int, int] | None = None,
) -> PackedSamples:
    """Lay samples into as few rows as first fit finds, longest first.

    Args:
      num_rows: B, rows in a microbatch. The last microbatch may have empty rows.
      seq_len: T, tokens in a row.
      expert_ids_shape: (layers, experts of a token) of the model, where the sampler's choices of
        experts are to be replayed, or None.

    Raises:
      ValueError: a sample that is longer than a row.
    """
    lengths = [len(sample.prompt) + len(sample.tokens) for sample in samples]
    if max(lengths, default=0) > seq_len:
        raise ValueError(
            f"got a sample of {max(lengths)} tokens; wanted at most {seq_len} (seq_len)"
        )
    locations, total_rows = _first_fit(lengths, num_rows, seq_len)
    microbatches = [
        _zero_rows(num_rows, seq_len, expert_ids_shape) for _ in range(-(-total_rows // num_rows))
    ]
    packed = PackedSamples(samples, locations, microbatches)
    num_segments = np.zeros((len(microbatches), num_rows), np.int32)
    for sample, (microbatch, row, start) in zip(samples, locations, strict=True):
        num_segments[microbatch, row] += 1
        rows, token_ids = microbatches[microbatch], [*sample.prompt, *sample.tokens]
        columns = slice(start, start + len(token_ids))
        rows.tokens[row, columns] = token_ids
        rows.segment_ids[row, columns] = num_segments[microbatch, row]
        rows.positions[row, columns] = np.arange(len(token_ids))
        # The last token predicts nothing: its mask is 0, and any id would do.
        rows.targets[row, columns] = [*token_ids[1:], 0]
        if rows.expert_ids is not None and sample.routes is not None:
            # The sampler never computed the last tokens, so its record may end before them. There
            # the -1 of `_zero_rows` lets the router choose.
            rows.expert_ids[row, start : start + len(sample.routes)] = sample.routes
    packed.fill("mask", [1.0] * len(samples))
    packed.fill("logp_rollout", [sample.logprobs for sample in samples])
    return packed


def _first_fit(
    lengths: Sequence[int], num_rows: int, seq_len: int
) -> tuple[list[RowLocation], int]:
    """Return where samples of these lengths go, and how many rows they take."""
    free_tokens: list[int] = []  # in each row that was begun
    locations = [RowLocation(0, 0, 0)] * len(lengths)
    # Equal lengths keep their order, so that the same samples always lie in the same rows.
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, free in enumerate(free_tokens) if free >= lengths[i]), None)
        if row is None:
            row = len(free_tokens)
            free_tokens.append(seq_len)
        locations[i] = RowLocation(*divmod(row, num_rows), seq_len - free_tokens[row])
        free_tokens[row] -= lengths[i]
    return locations, len(free_tokens)


def _zero_rows(num_rows: int, seq_len: int, expert_ids_shape: tuple[int, int] | None) -> HostRows:
    def zeros(dtype: type) -> np.ndarray:
        return np.zeros((num_rows, seq_len), dtype)

    expert_ids = None
    if expert_ids_shape is not None:
        # int8 holds the ids of 128 experts, and these arrays are the largest of a batch.
        expert_ids = np.full((num_rows, seq_len, *expert_ids_shape), -1, np.int8)
    return HostRows(
        tokens=zeros(np.int32),
        segment_ids=zeros(np.int32),
        positions=zeros(np.int32),
        targets=zeros(np.int32),
        mask=zeros(np.float32),
        advantages=zeros(np.float32),
        coefficients=zeros(np.float32),
        logp_old=zeros(np.float32),
        logp_rollout=zeros(np.float32),
        logp_ref=zeros(np.float32),
        expert_ids=expert_ids,
    )


def gather_to_host(array: jax.Array) -> np.ndarray:
    """Return all of an array, also where other processes hold parts of it."""
    # Numpy arrays do not have the attribute.
    if getattr(array, "is_fully_addressable", True):
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def device_put_rows(rows: HostRows, layout: sharding.MeshLayout | None) -> PackedRows:
    """Put a microbatch that every process has onto the devices, as it is filled so far."""

    def device_put(array: np.ndarray | None) -> jax.Array | None:
        if array is None:
            return None
        if layout is None:
            return jax.numpy.asarray(array)
        # Rows and tokens are split, layers and experts of a token are not.
        spec = layout.activation_sharding("batch", "length", *(None,) * (array.ndim - 2))
        # Not `device_put`: each process takes only its own devices' parts.
        return jax.make_array_from_callback(array.shape, spec, lambda index: array[index])

    fields: dict[str, Any] = {
        field.name: device_put(getattr(rows, field.name)) for field in dataclasses.fields(rows)
    }
    return PackedRows(**fields)
