"""Samples packed into the rows that the trainer computes, and numbers taken out of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from m1_jax import sharding
from train.rl import row_packing
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


@dataclasses.dataclass(frozen=True)
class HostRows:
    """One microbatch on the host: the fields of `PackedRows` as numpy arrays."""

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


class RowWindow(NamedTuple):
    """A part of a microbatch's rows: rows and columns from the first to before the end."""

    first_row: int
    end_row: int
    first_column: int
    end_column: int

    @property
    def shape(self) -> row_packing.MicrobatchShape:
        """Return rows and columns."""
        return row_packing.MicrobatchShape(
            self.end_row - self.first_row, self.end_column - self.first_column
        )

    def overlaps(self, row: int, start: int, end: int) -> bool:
        """Return whether the window has one of the columns `start` to `end` - 1 of a row."""
        is_row_inside = self.first_row <= row < self.end_row
        return is_row_inside and start < self.end_column and end > self.first_column


class PackedSamples:
    """Samples and the rows that they lie in.

    Rows exist for a moment only: `make_rows` makes those of a microbatch from the samples' columns.
    The rows of a whole batch would take 40 bytes a place, and 160 more with routes.

    Attributes:
      samples: the samples, in the order in which they were given.
      plan: location of each sample, and shape of each microbatch.
      expert_ids_shape: (layers, experts of a token), or None without expert ids.
    """

    def __init__(
        self,
        samples: Sequence[sample_lib.Sample],
        plan: row_packing.RowPlan,
        expert_ids_shape: tuple[int, int] | None = None,
    ):
        """See `pack_samples`."""
        self.samples, self.plan = samples, plan
        self.expert_ids_shape = expert_ids_shape
        self._members: list[list[int]] = [[] for _ in plan.shapes]  # samples of each microbatch
        for i, location in enumerate(plan.locations):
            self._members[location.microbatch].append(i)
        # By field: of every sample one number for each token of its answer, or one for all.
        self._values: dict[str, Sequence[Any]] = {}

    @property
    def num_microbatches(self) -> int:
        """Return the number of microbatches."""
        return len(self.plan.shapes)

    @property
    def num_tokens(self) -> list[int]:
        """Return the tokens of each microbatch, prompts included and padding not."""
        return [sum(self.samples[i].num_tokens for i in members) for members in self._members]

    def fill(self, field_name: str, values: Sequence[Any]) -> None:
        """Set a field: for every sample one number per token of its answer, or one for all."""
        if len(values) != len(self.samples):
            raise ValueError(
                f"{field_name}: got {len(values)} for {len(self.samples)} samples; wanted one each"
            )
        self._values[field_name] = values

    def values(self, field_name: str) -> Sequence[Any]:
        """Return what `fill` set of a field."""
        return self._values[field_name]

    def make_rows(self, microbatch: int, window: RowWindow | None = None) -> HostRows:
        """Return the rows of a microbatch, with the fields that are filled so far.

        Args:
          window: the rows and columns to return, None for all. Only these are computed.
        """
        shape = self.plan.shapes[microbatch]
        window = window or RowWindow(0, shape.num_rows, 0, shape.row_tokens)
        rows = _zero_rows(window.shape, self.expert_ids_shape)
        num_segments = np.zeros(shape.num_rows, np.int32)
        for i in self._members[microbatch]:
            sample, (_, row, start) = self.samples[i], self.plan.locations[i]
            # Counted outside of the window, too: these are numbers within the whole row.
            num_segments[row] += 1
            if window.overlaps(row, start, start + sample.num_tokens):
                location = row - window.first_row, start - window.first_column
                self._write_sample(rows, i, *location, num_segments[row])
        return rows

    def _write_sample(self, rows: HostRows, i: int, row: int, start: int, segment: int) -> None:
        """Write a sample to a row of a window. Its columns from `start` on may lie outside."""
        sample = self.samples[i]
        size, first = sample.num_tokens, start + len(sample.prompt)
        _write_columns(rows.tokens[row], start, sample.prompt)
        _write_columns(rows.tokens[row], first, sample.tokens)
        _write_columns(rows.segment_ids[row], start, np.full(size, segment, np.int32))
        _write_columns(rows.positions[row], start, np.arange(size, dtype=np.int32))
        # The last token predicts nothing: its mask is 0, and any id would do.
        _write_columns(rows.targets[row], start, sample.prompt[1:])
        answer = _answer_columns(sample, start).start
        _write_columns(rows.targets[row], answer, sample.tokens)
        real = sample.mask > 0
        _write_columns(rows.mask[row], answer, real)
        # A `where`, not a product: what a caller has at masked tokens may be NaN.
        _write_columns(rows.logp_rollout[row], answer, np.where(real, sample.logprobs, 0))
        for name, values in self._values.items():
            _write_columns(getattr(rows, name)[row], answer, np.where(real, values[i], 0))
        if rows.expert_ids is not None and sample.routes is not None:
            # The sampler never computed the last tokens, so its record may end before them.
            # There the -1 of `_zero_rows` lets the router choose.
            _write_columns(rows.expert_ids[row], start, sample.routes)

    def extract(self, microbatch: int, array: np.ndarray) -> dict[int, np.ndarray]:
        """Return of an array [B, T] of a microbatch the part of each of its samples, by index.

        A part has one number for each token of the answer.
        """
        parts = {}
        for i in self._members[microbatch]:
            _, row, start = self.plan.locations[i]
            parts[i] = array[row, _answer_columns(self.samples[i], start)]
        return parts


def _write_columns(row: np.ndarray, start: int, values: np.ndarray) -> None:
    """Write values to a row from column `start` on, and leave out those that lie outside."""
    first, end = max(start, 0), min(start + len(values), len(row))
    if first < end:
        row[first:end] = values[first - start : end - start]


def _answer_columns(sample: sample_lib.Sample, start: int) -> slice:
    """Return the columns that predict a sample's answer: they begin at the prompt's last token."""
    first = start + len(sample.prompt) - 1
    return slice(first, first + len(sample.tokens))


def pack_samples(
    samples: Sequence[sample_lib.Sample],
    shapes: row_packing.RowShapes,
    expert_ids_shape: tuple[int, int] | None = None,
) -> PackedSamples:
    """Lay samples into rows, as `row_packing.plan_rows` finds.

    Args:
      shapes: shapes that microbatches may have. The last rows of one may be empty.
      expert_ids_shape: (layers, experts of a token) of the model, where the sampler's choices of
        experts are to be replayed, or None.

    Raises:
      ValueError: a sample that is longer than a row.
    """
    plan = row_packing.plan_rows([sample.num_tokens for sample in samples], shapes)
    return PackedSamples(samples, plan, expert_ids_shape)


def _zero_rows(
    shape: row_packing.MicrobatchShape, expert_ids_shape: tuple[int, int] | None
) -> HostRows:
    def zeros(dtype: type) -> np.ndarray:
        return np.zeros(shape, dtype)

    expert_ids = None
    if expert_ids_shape is not None:
        # int8 holds the ids of 128 experts, and these arrays are the largest of a batch.
        expert_ids = np.full((*shape, *expert_ids_shape), -1, np.int8)
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


def device_put_rows(rows: HostRows) -> PackedRows:
    """Put rows onto the one device."""
    fields: dict[str, Any] = {
        field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)
    }
    return PackedRows(**jax.tree.map(jax.numpy.asarray, fields))


def device_put_microbatch(
    packed: PackedSamples, microbatch: int, layout: sharding.MeshLayout | None
) -> PackedRows:
    """Put the rows of a microbatch onto the devices. Every process has the samples.

    A process makes only the windows that its own devices hold. With 128 hosts, a microbatch of 1.4M
    places of 200 bytes then costs each of them a 128th.
    """
    if layout is None:
        return device_put_rows(packed.make_rows(microbatch))
    shape = packed.plan.shapes[microbatch]
    windows: dict[RowWindow, HostRows] = {}

    def read_part(name: str, index: Any) -> np.ndarray:
        rows, columns = (part.indices(size) for part, size in zip(index[:2], shape, strict=True))
        window = RowWindow(rows[0], rows[1], columns[0], columns[1])
        # All fields of a window are made together, when the first one is asked for.
        if window not in windows:
            windows[window] = packed.make_rows(microbatch, window)
        return getattr(windows[window], name)

    def device_put(name: str, *inner_shape: int) -> jax.Array:
        spec = layout.activation_sharding("batch", "length", *(None,) * len(inner_shape))
        # Not `device_put`: each process takes only its own devices' parts.
        return jax.make_array_from_callback(
            (*shape, *inner_shape), spec, lambda index: read_part(name, index)
        )

    names = [field.name for field in dataclasses.fields(HostRows) if field.name != "expert_ids"]
    fields: dict[str, Any] = {name: device_put(name) for name in names}
    if packed.expert_ids_shape is not None:
        fields["expert_ids"] = device_put("expert_ids", *packed.expert_ids_shape)
    return PackedRows(**fields)
