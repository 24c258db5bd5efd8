"""The engine's lightning attention against the oracle: prefill, decoding, and other slots.

Memory begins as NaN everywhere. Two sequences are read in parts and then decoded token by token
across the borders of chunks, side by side. What they return, the states that they leave at a
chunk's end, and that no other slot was written are compared.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infer.selfcheck import check, lightning_checks, oracles
from m1_jax.serving import lightning, ragged_batch
from m1_jax.serving import state as state_lib
from pallas_kernels.lightning_serving import tpu

# Absolute, over the head's largest number, as in the kernel's tests. float32: the order of sums.
# bfloat16: the rounding of o. States are float32 in both.
OUTPUT_TOLERANCES, STATE_TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-8}, 2e-6
TILE, NUM_SLOTS, PREFILL_TILES = 8, 5, 16
STACK, STACK_INDEX = (2, 2), (1, 0)
HEAD_DIM = 128  # the kernel takes multiples of it
# (heads, tokens of a chunk) on a device, and in small.
DEVICE_SIZES, SMALL_SIZES = (8, 64), (2, 16)


@dataclasses.dataclass
class ServedSequence:
    """A sequence under way: q, k and v of its tokens [T, N3H], its slot, and outputs so far."""

    qkv: np.ndarray
    slot: int
    outputs: list[np.ndarray] = dataclasses.field(default_factory=list)


class SlotServer:
    """Slots of one layer in a stack, and the program that appends tokens to them."""

    def __init__(self, implementation: str, dtype: str, setting: check.DeviceSetting):
        self.num_heads, self.chunk = SMALL_SIZES if setting.is_small else DEVICE_SIZES
        self.slopes = lightning_checks.choose_slopes(self.num_heads)
        lead = (*STACK, NUM_SLOTS, self.num_heads)
        rows = (*lead, self.chunk, HEAD_DIM)
        self.memory = state_lib.LightningSlots(
            jnp.full((*lead, HEAD_DIM, HEAD_DIM), jnp.nan, jnp.float32),
            *(jnp.full(rows, jnp.nan, dtype) for _ in range(2)),
        )
        if implementation == "tpu":
            attend = functools.partial(_attend_by_kernel, setting.interpret_kernel("tpu"))
        else:
            attend = _attend_by_xla
        slopes = jnp.asarray(self.slopes)
        self._attend = jax.jit(
            lambda qkv, batch, memory: attend(qkv, slopes, batch, memory), donate_argnums=2
        )

    def append(self, parts: list[tuple[ServedSequence, int]]) -> None:
        """Append so many tokens of each sequence, in tiles from its next position on."""
        num_rows = PREFILL_TILES * TILE
        qkv = np.zeros((num_rows, parts[0][0].qkv.shape[1]), parts[0][0].qkv.dtype)
        positions = np.full(num_rows, -1, np.int32)
        slots = np.zeros(PREFILL_TILES, np.int32)
        first_tile, row_ids = 0, []
        for sequence, count in parts:
            done = len(sequence.outputs)
            rows = np.arange(count) + first_tile * TILE + done % TILE
            qkv[rows] = sequence.qkv[done : done + count]
            positions[rows] = np.arange(done, done + count)
            end_tile = first_tile - (-(done % TILE + count) // TILE)
            slots[first_tile:end_tile], first_tile = sequence.slot, end_tile
            row_ids.append(rows)
        pages = np.zeros((PREFILL_TILES, 1), np.int32)  # lightning attention has none
        batch = ragged_batch.RaggedBatch(
            jnp.asarray(positions), jnp.asarray(slots), jnp.asarray(pages), TILE
        )
        o, self.memory = self._attend(jnp.asarray(qkv), batch, self.memory)
        o = oracles.to_float64(o)
        for (sequence, _), rows in zip(parts, row_ids, strict=True):
            sequence.outputs += list(o[rows])


def _attend_by_kernel(interpret, qkv, slopes, batch, memory) -> tuple[Any, Any]:
    o, arrays = tpu.attend_tiles(
        batch.to_tiles(qkv),
        slopes,
        batch.slots,
        batch.tile_positions(),
        tpu.SlotArrays(memory.states, memory.keys, memory.values),
        STACK_INDEX,
        interpret=interpret,
    )
    return batch.to_rows(o), state_lib.LightningSlots(*arrays)


def _attend_by_xla(qkv, slopes, batch, memory) -> tuple[Any, Any]:
    return lightning.attend_slots(qkv, slopes, batch, memory, STACK_INDEX, "chunked")


def check_slots(
    implementation: str, dtype: str, setting: check.DeviceSetting
) -> check.CheckFindings:
    """Compare a form of serving's lightning attention in a dtype with the oracle."""
    server = SlotServer(implementation, dtype, setting)
    length = 2 * server.chunk
    sequences = [
        _make_sequence(seed, slot, length, server.num_heads, dtype)
        for seed, slot in ((0, 3), (1, 1))
    ]
    first, second = sequences
    with check.compute_in_float32(dtype):
        server.append([(first, server.chunk - 3)])
        # The first sequence goes past the chunk's end in a prefill with the other one.
        server.append([(second, 5), (first, 6)])
        while len(first.outputs) < length:
            server.append([(second, 1), (first, 1)])
    errors = []
    for label, sequence in (("first sequence", first), ("second sequence", second)):
        errors += _compare_sequence(server, sequence, label, dtype)
    return check.CheckFindings(errors, _find_foreign_writes(server, sequences))


def _make_sequence(seed: int, slot: int, length: int, heads: int, dtype: str) -> ServedSequence:
    qkv = np.random.default_rng(seed).standard_normal((length, heads * 3 * HEAD_DIM), np.float32)
    return ServedSequence(np.asarray(jnp.asarray(qkv, dtype)), slot)


def _compare_sequence(
    server: SlotServer, sequence: ServedSequence, label: str, dtype: str
) -> list[check.MeasuredError]:
    """Compare a sequence's outputs, and its state as of its last chunk's end."""
    heads, count = server.num_heads, len(sequence.outputs)
    zero_state = np.zeros((1, heads, HEAD_DIM, HEAD_DIM))

    def run_oracle(num_tokens: int) -> oracles.LightningResult:
        qkv = oracles.to_float64(sequence.qkv[:num_tokens])[None]
        d_o = np.zeros((1, num_tokens, heads * HEAD_DIM))
        return oracles.attend_lightning(qkv, server.slopes, None, zero_state, d_o, zero_state)

    wanted = run_oracle(count).o.reshape(count, heads, HEAD_DIM)
    got = np.stack(sequence.outputs).reshape(wanted.shape)
    errors = [
        check.MeasuredError(
            f"o, {label}", _worst_share(got, wanted, (0, 2)), OUTPUT_TOLERANCES[dtype]
        )
    ]
    if whole := count // server.chunk * server.chunk:
        wanted_state = run_oracle(whole).state[0]
        state = oracles.to_float64(server.memory.states[(*STACK_INDEX, sequence.slot)])
        errors.append(
            check.MeasuredError(
                f"state, {label}", _worst_share(state, wanted_state, (1, 2)), STATE_TOLERANCE
            )
        )
    return errors


def _worst_share(actual: np.ndarray, expected: np.ndarray, axes: tuple[int, int]) -> float:
    """Return the largest difference over the largest number of its head."""
    difference, scale = np.abs(actual - expected).max(axes), np.abs(expected).max(axes)
    return float(np.max(difference / scale))


def _find_foreign_writes(server: SlotServer, sequences: list[ServedSequence]) -> list[str]:
    """Return a line for each array that was written outside of the sequences' slots.

    XLA's form writes slot 0, which is padding's.
    """
    problems = []
    for name in ("states", "keys", "values"):
        array = np.array(oracles.to_float64(getattr(server.memory, name)))
        array[(*STACK_INDEX, [0, *(sequence.slot for sequence in sequences)])] = np.nan
        if not np.isnan(array).all():
            problems.append(f"{name}: memory of other slots or layers was written")
    return problems


def list_checks() -> list[check.DeviceCheck]:
    """Return the checks of both forms."""
    titles = {"tpu": "TPU kernel", "xla": "XLA"}
    return [
        check.DeviceCheck(
            f"serving lightning attention ({title}), {dtype}",
            "kernels",
            functools.partial(check_slots, name, dtype),
        )
        for name, title in titles.items()
        for dtype in OUTPUT_TOLERANCES
    ]
