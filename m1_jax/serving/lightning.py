"""Lightning attention of serving: the state moves on at multiples of the chunk length alone.

A sequence has a state S, exact as of its last multiple of C tokens, and the keys and values of its
open chunk. With n = i + 1, the token at index i of the chunk has the output

    o_i = lambda^n q_i S + sum_{j <= i} lambda^(i - j) (q_i . k_j) v_j

The chunk's last token moves the state on:

    S <- lambda^C S + sum_j lambda^(C - 1 - j) k_j v_j^T

This happens at the same positions, by the same products of the same shapes, whether a prompt is
read or tokens are generated. A state taken at a multiple of C can therefore be kept and used again
bit-exactly. Tokens of the open chunk can be taken back, because no state has seen them.

On a TPU the kernel of `pallas_kernels/lightning_serving` does all of it in one call. Elsewhere XLA
goes tile after tile. Each is exact in itself, and they agree within rounding.
"""

import contextlib
import functools
import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1_jax import layer_stack, measured_choices, sharding
from m1_jax import lightning as model_lightning
from m1_jax.serving import ragged_batch
from m1_jax.serving import state as state_lib
from pallas_kernels.lightning_serving import tpu

_log = logging.getLogger(__name__)


def attend_slots(
    qkv: Float[Array, "M N3H"],
    slopes: Float[Array, "N"],
    batch: ragged_batch.RaggedBatch,
    group_state: state_lib.LightningSlots,
    stack_index: layer_stack.StackIndex,
    implementation: str | None = None,
) -> tuple[Float[Array, "M NH"], state_lib.LightningSlots]:
    """Append rows to their sequences' open chunks, and return what attention reads there.

    Args:
      batch: the tiles of a sequence are neighbours, in the order of their positions.
      stack_index: where the layer lies in the group's stack.
      implementation: as `ModelConfig.lightning_implementation`. "tpu" takes the kernel, which then
        runs or raises. None takes it where the program is lowered for a TPU, the sizes fit, and
        m1-selfcheck did not find it wanting there (`measured_choices.py`).
        Every other value takes XLA.

    Precision: all products and sums are float32. The open chunk and the output have qkv's dtype.

    Raises:
      ValueError: "tpu", and sizes that the kernel does not take.
    """
    arguments = qkv, slopes, batch, group_state, stack_index
    chunk, head_dim = group_state.keys.shape[4:]
    sizes = batch.attention_tile, chunk, head_dim, qkv.dtype
    # On a mesh the device is known while the program is traced, and need not be of this process.
    target = sharding.target_device()
    with contextlib.nullcontext() if target is None else model_lightning.choose_for(target):
        kernel_fits = qkv.dtype == group_state.keys.dtype and tpu.supports_sizes(*sizes)
        if implementation == "tpu":
            if not kernel_fits:
                raise ValueError(
                    f"lightning_implementation='tpu': got {qkv.dtype}, heads of {head_dim}, tiles "
                    f"of {batch.attention_tile} and chunks of {chunk} tokens; wanted {tpu.SIZES}. "
                    "None takes XLA for other sizes."
                )
            return _attend_by_kernel(*arguments)
        prefers_xla = measured_choices.find_choice("serving_lightning", target) == "xla"
        if implementation is not None or not kernel_fits or prefers_xla:
            return _attend_tile_by_tile(*arguments)
        if target is not None:
            is_tpu = model_lightning.kernel_platform(target) == "tpu"
            return (_attend_by_kernel if is_tpu else _attend_tile_by_tile)(*arguments)
        _log_choice()
        # Chosen when the program is lowered, so that a machine without a TPU can compile for one.
        return jax.lax.platform_dependent(
            *arguments, tpu=_attend_by_kernel, default=_attend_tile_by_tile
        )


# Cached, so that it is logged once.
@functools.cache
def _log_choice() -> None:
    _log.info("serving lightning attention: the Pallas kernel where lowered for TPU, else XLA")


def _attend_by_kernel(
    qkv: Float[Array, "M N3H"],
    slopes: Float[Array, "N"],
    batch: ragged_batch.RaggedBatch,
    group_state: state_lib.LightningSlots,
    stack_index: layer_stack.StackIndex,
) -> tuple[Float[Array, "M NH"], state_lib.LightningSlots]:
    """See `attend_slots`."""
    o, slot_arrays = tpu.attend_tiles(
        batch.to_tiles(qkv),
        slopes,
        batch.slots,
        batch.tile_positions(),
        tpu.SlotArrays(group_state.states, group_state.keys, group_state.values),
        stack_index,
    )
    return batch.to_rows(o), state_lib.LightningSlots(*slot_arrays)


def _attend_tile_by_tile(
    qkv: Float[Array, "M N3H"],
    slopes: Float[Array, "N"],
    batch: ragged_batch.RaggedBatch,
    group_state: state_lib.LightningSlots,
    stack_index: layer_stack.StackIndex,
) -> tuple[Float[Array, "M NH"], state_lib.LightningSlots]:
    """See `attend_slots`."""
    heads = qkv.reshape(qkv.shape[0], slopes.shape[0], 3, -1)
    chunk = group_state.keys.shape[4]
    # lambda^0 to lambda^C, [N, C + 1]
    powers = jnp.exp(-slopes[:, None] * jnp.arange(chunk + 1, dtype=jnp.float32)[None])
    # 1 - lambda^C by expm1: small slopes would lose digits in the difference.
    decay_loss = -jnp.expm1(-slopes * chunk)

    def attend_tile(slot, _, positions, heads, group_state):
        index = (*stack_index, slot)
        chunk_rows, start = positions % chunk, first_position(positions) % chunk
        q, k, v = jnp.moveaxis(heads, 0, 2).transpose(1, 0, 2, 3)  # [N, t, H] each
        keys = write_rows(group_state.keys, index, start, k, positions)
        values = write_rows(group_state.values, index, start, v, positions)
        # Rows that are not written yet hold anything, NaN too, and NaN times 0 is NaN.
        last = jnp.max(jnp.where(positions >= 0, chunk_rows, -1))
        is_written = (jnp.arange(chunk, dtype=jnp.int32) <= last)[None, :, None]
        k, v = (jnp.where(is_written, x[index].astype(jnp.float32), 0) for x in (keys, values))
        # In a sequence's first chunk the slot still holds the state of its previous owner.
        state = jnp.where(jnp.max(positions) < chunk, 0.0, group_state.states[index])
        q = q.astype(jnp.float32)
        gap = chunk_rows[:, None] - jnp.arange(chunk, dtype=jnp.int32)[None]
        weights = jnp.where((gap >= 0)[None], powers[:, jnp.maximum(gap, 0)], 0.0)
        scores = _einsum_highest("nik,njk->nij", q, k) * weights
        within_chunk = _einsum_highest("nij,njv->niv", scores, v)
        decay = powers[:, chunk_rows + 1][:, :, None]  # lambda^n
        o = within_chunk + decay * _einsum_highest("nik,nkv->niv", q, state)

        def close_chunk(state):
            ramp = powers[:, chunk - 1 :: -1][:, :, None]  # lambda^(C - 1 - j)
            state = state - decay_loss[:, None, None] * state
            return state + _einsum_highest("njk,njv->nkv", k * ramp, v)

        state = jax.lax.cond(last == chunk - 1, close_chunk, lambda state: state, state)
        states = group_state.states.at[index].set(state)
        o = jnp.moveaxis(o, 0, 1).astype(qkv.dtype).reshape(len(positions), -1)
        return o, state_lib.LightningSlots(states, keys, values)

    tiles = batch.to_tiles(heads)
    o, group_state = ragged_batch.scan_attention_tiles(attend_tile, batch, tiles, group_state)
    return batch.to_rows(o), group_state


def first_position(positions):
    """Return the position of a tile's first row, padding or not."""
    # A tile's positions are consecutive, so each real row tells the first one. 0 without any.
    order = jnp.arange(len(positions), dtype=jnp.int32)
    return jnp.maximum(jnp.max(jnp.where(positions >= 0, positions - order, -1)), 0)


def _einsum_highest(formula, a, b):
    return jnp.einsum(formula, a, b, precision="highest")


def write_rows(
    buffer: Float[Array, "R J n N C H"],
    index: tuple[*layer_stack.StackIndex, Int[Array, ""] | int],
    offset: Int[Array, ""],
    rows: Float[Array, "N t H"],
    positions: Int[Array, "t"],
) -> Float[Array, "R J n N C H"]:
    """Return a buffer of slots or pages with a tile's real rows written from row `offset` on."""
    start = (*index, 0, offset, 0)
    size = (*(1,) * len(index), *rows.shape)
    # Read, select and write one slice, which XLA does in place. Padding writes back what was there.
    old_rows = jax.lax.dynamic_slice(buffer, start, size)
    rows = jnp.where(
        (positions >= 0)[None, :, None], rows.astype(buffer.dtype), old_rows.reshape(rows.shape)
    )
    return jax.lax.dynamic_update_slice(buffer, rows.reshape(size), start)
