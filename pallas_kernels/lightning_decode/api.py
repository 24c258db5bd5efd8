"""Entry to decoding and serving prefill: validates arguments and chooses the implementation."""

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.lightning_decode import reference as decode_reference
from pallas_kernels.lightning_decode import ring as decode_ring
from pallas_kernels.lightning_decode import tpu_in_place, tpu_prefill, tpu_ring

_log = logging.getLogger(__name__)

# Names for the argument `implementation`. "tpu" lowers for TPU alone.
DECODE_IMPLEMENTATIONS = {
    "reference": decode_reference.lightning_decode,
    "tpu": tpu_in_place.lightning_decode,
}
RING_DECODE_IMPLEMENTATIONS = {
    "reference": decode_ring.lightning_decode,
    "tpu": tpu_ring.lightning_decode,
}
PREFILL_IMPLEMENTATIONS = {
    "reference": decode_reference.lightning_prefill,
    "tpu": tpu_prefill.lightning_prefill,
}


def lightning_decode(
    qkv: Float[Array, "B N3H"],
    slopes: Float[Array, "N"],
    pool: Float[Array, "slots N H H"],
    slots: Int[Array, "B"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B NH"], Float[Array, "slots N H H"]]:
    """Advance the states of B sequences by one token: S <- S - c S + k^T v, then o = q S.

    c = -expm1(-s). Source: M1 report, section 2; docs/kernels.md, "Decode".

    Args:
      qkv: fused projection, one row a sequence. A head is q | k | v, each of width H.
      slopes: decay rates s >= 0, one per head.
      pool: float32 states by slot. Donate it to the surrounding jit, or XLA copies it.
      slots: slot of each row, each at most once. A row with a negative slot is inactive, and its
        output is zero. Slots that no row names keep their bytes.
      implementation: a key of `DECODE_IMPLEMENTATIONS`, which then runs or raises. None takes the
        kernel where the program is lowered for TPU, and the reference elsewhere.

    Returns:
      (o in qkv's dtype, heads concatenated; the pool after this token).

    Raises:
      ValueError: shapes or dtypes that do not fit, or an unknown implementation. Where `slots` is
        concrete, also duplicates and slots beyond the pool. Under jit the values are unknown, so
        call `check_slots` before. A slot beyond the pool is then inactive. Where rows share a
        slot, any one of them may win.
    """
    _validate_inputs("pool", pool, qkv, slopes, ndim=2)
    _validate_int_vector("slots", slots, qkv.shape[0])
    slots = _check_or_mask_slots(slots, pool.shape[0])
    return _choose_implementation(DECODE_IMPLEMENTATIONS, implementation, "decode")(
        qkv, slopes, pool, slots
    )


def lightning_decode_ring(
    qkv: Float[Array, "B N3H"],
    slopes: Float[Array, "N"],
    pool: decode_ring.RingPool,
    slots: Int[Array, "B"],
    positions: Int[Array, "B"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B NH"], decode_ring.RingPool]:
    """Advance B sequences by one token and write their states only every W tokens.

    The result is that of `lightning_decode`, for 0.36 of its bytes at W = 16. `ring` has the
    equations.

    Args:
      qkv, slopes, slots: as in `lightning_decode`. The ring keeps k and v in bfloat16.
      pool: of `init_ring_pool`, filled by `ring.write_states`. Donate it to the surrounding jit.
      positions: how many tokens of each row's sequence come before this one. A position earlier
        than that of the last call takes tokens back, up to `pool.rollback_tokens`. It cannot lie
        below the tokens that the slot's state already holds.
      implementation: a key of `RING_DECODE_IMPLEMENTATIONS`, which then runs or raises. None takes
        the kernel where the program is lowered for TPU, and the reference elsewhere.

    Returns:
      (o in qkv's dtype, heads concatenated; the pool after this token).

    Precision: o reads the state rounded to bfloat16 (2^-9 of each element). The state itself is
    kept to 2^-17 and rounded only every W tokens.

    Raises:
      ValueError: as `lightning_decode`. Where slots and positions are concrete, also a position
        that the slot cannot take: below its state, or past the newest token by more than one.
    """
    if pool.hi.dtype != jnp.bfloat16 or pool.lo.dtype != jnp.bfloat16:
        raise ValueError(f"pool: got planes {pool.hi.dtype}, {pool.lo.dtype}; wanted bfloat16")
    # The checks of an in-place pool, whose float32 states have the shape of a plane.
    _validate_inputs("pool", jax.ShapeDtypeStruct(pool.hi.shape, jnp.float32), qkv, slopes, ndim=2)
    _validate_int_vector("slots", slots, qkv.shape[0])
    _validate_int_vector("positions", positions, qkv.shape[0])
    # Under jit the values are unknown: traced arguments go unchecked.
    if not any(isinstance(x, core.Tracer) for x in (slots, positions, pool.base)):
        check_slots(slots, pool.hi.shape[0])
        _check_positions(pool, slots, positions)
    slots = _check_or_mask_slots(slots, pool.hi.shape[0])
    # Under jit positions are not checked: a negative one counts as 0.
    positions = jnp.maximum(positions, 0).astype(jnp.int32)
    run = _choose_implementation(RING_DECODE_IMPLEMENTATIONS, implementation, "ring decode")
    return run(qkv, slopes, pool, slots, positions)


def init_ring_pool(
    num_slots: int, num_heads: int, head_dim: int, *, window: int = 16, rollback_tokens: int = 0
) -> decode_ring.RingPool:
    """Return a pool of empty sequences for `lightning_decode_ring`.

    Args:
      num_slots: sequences that the pool holds.
      num_heads: heads of a sequence.
      head_dim: width H of a head.
      window: W, tokens between two flushes. 16 moves the fewest bytes at H = 128.
      rollback_tokens: tokens that can always be taken back. Each costs one more row of the ring.

    Raises:
      ValueError: a window below 1 or negative rollback_tokens.
    """
    if window < 1 or rollback_tokens < 0:
        raise ValueError(
            f"got window {window}, rollback_tokens {rollback_tokens}; wanted at least 1 and 0"
        )
    # The blocks of the kernel, on every backend: a pool may move from the reference to the kernel.
    blocks = num_heads // tpu_ring.heads_per_block(num_heads, head_dim)
    return decode_ring.init_pool(
        num_slots,
        num_heads,
        head_dim,
        window=window,
        rollback_tokens=rollback_tokens,
        num_blocks=blocks,
    )


def _check_positions(pool, slots, positions) -> None:
    slots, positions = np.asarray(slots), np.asarray(positions)
    active = slots >= 0
    base = np.asarray(pool.base)[slots[active]]
    # Blocks of heads flush at different steps, so a slot has one base for each block.
    steps_since_base = positions[active][:, None] - base
    wrong = np.any((steps_since_base < 0) | (steps_since_base >= pool.ring.shape[1]), axis=1)
    if np.any(wrong):
        low, high = base.max(1)[wrong], base.min(1)[wrong] + pool.ring.shape[1] - 1
        allowed = [f"{a}..{b}" for a, b in zip(low.tolist(), high.tolist(), strict=True)]
        refused = positions[active][wrong].tolist()
        raise ValueError(
            f"positions: got {refused} in slots {slots[active][wrong]}; wanted {allowed}"
        )


def lightning_prefill(
    qkv: Float[Array, "T N3H"],
    slopes: Float[Array, "N"],
    pool: Float[Array, "slots N H H"],
    slots: Int[Array, "R"],
    starts: Int[Array, "R"],
    lengths: Int[Array, "R"],
    fresh: Bool[Array, "R"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "T NH"], Float[Array, "slots N H H"]]:
    """Run R sequences of any lengths through lightning attention, each from its slot's state.

    S_t = exp(-s) S_(t-1) + k_t^T v_t, o_t = q_t S_t. Source: M1 report, section 2; docs/kernels.md,
    "Serving prefill".

    Args:
      qkv: tokens of all sequences in one flat array. Rows of no sequence may hold anything.
      slopes: decay rates s >= 0, one per head.
      pool: float32 states by slot. Donate it to the surrounding jit, or XLA copies it.
      slots: slot of each sequence, each at most once. A negative slot: the sequence is ignored.
      starts: first row of each sequence, in any order and at any row.
      lengths: rows of each sequence. A sequence of length 0 leaves its slot alone.
      fresh: whether the sequence starts from a zero state, whatever its slot holds.
      implementation: a key of `PREFILL_IMPLEMENTATIONS`, which then runs or raises. None takes the
        kernel where the program is lowered for TPU, and the reference elsewhere.

    Returns:
      (o in qkv's dtype, zero in rows of no sequence; the pool with the state after each sequence's
      last token). Every other slot keeps its bytes.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an unknown implementation. Where the values
        are concrete, also duplicate slots, slots beyond the pool, and sequences that overlap or
        leave the rows. Under jit call `check_slots` and `check_sequences` before.
    """
    _validate_inputs("pool", pool, qkv, slopes, ndim=2)
    # `fresh` is the one vector that is no integer, so its check stands apart.
    count = len(slots)
    for name, values in (("slots", slots), ("starts", starts), ("lengths", lengths)):
        _validate_int_vector(name, values, count)
    if count == 0 or fresh.shape != (count,) or fresh.dtype != jnp.bool_:
        raise ValueError(f"fresh: got {jax.typeof(fresh)}; wanted bool[{max(count, 1)}]")
    if not any(isinstance(x, core.Tracer) for x in (slots, starts, lengths)):
        check_sequences(slots, starts, lengths, qkv.shape[0])
    slots = _check_or_mask_slots(slots, pool.shape[0])
    starts, lengths = (x.astype(jnp.int32) for x in (starts, lengths))
    run = _choose_implementation(PREFILL_IMPLEMENTATIONS, implementation, "prefill")
    return run(qkv, slopes, pool, slots, starts, lengths, fresh)


def check_sequences(slots, starts, lengths, num_tokens: int) -> None:
    """Raise ValueError for active sequences that overlap or leave rows 0..num_tokens-1."""
    # Values must be concrete: numpy raises on a tracer.
    slots, starts, lengths = (np.asarray(x) for x in (slots, starts, lengths))
    active = (slots >= 0) & (lengths != 0)
    # Sorted by first row, so that sequences that overlap are neighbours.
    order = np.argsort(starts[active])
    first, length = starts[active][order], lengths[active][order]
    last = first + length
    if np.any(length < 0) or np.any(first < 0) or np.any(last > num_tokens):
        extents = f"starts {starts.tolist()} and lengths {lengths.tolist()}"
        raise ValueError(f"sequences: got {extents}; wanted them in {num_tokens} rows")
    if np.any(first[1:] < last[:-1]):
        raise ValueError(f"sequences: rows {first[1:][first[1:] < last[:-1]].tolist()} have two")


def check_slots(slots, num_slots: int) -> None:
    """Raise ValueError for slots beyond the pool or named twice. Negative slots are inactive."""
    slots = np.asarray(slots)
    beyond = slots[slots >= num_slots]
    if beyond.size:
        raise ValueError(f"slots: got {sorted(set(beyond.tolist()))}; wanted less than {num_slots}")
    # Two rows of one slot would both start from its state, and one would overwrite the other's.
    active, counts = np.unique(slots[slots >= 0], return_counts=True)
    if np.any(counts > 1):
        raise ValueError(f"slots: got {active[counts > 1].tolist()} more than once; wanted once")


def _check_or_mask_slots(slots, num_slots):
    """Check concrete slots. Traced slots beyond the pool become inactive instead."""
    if not isinstance(slots, core.Tracer):
        check_slots(slots, num_slots)
    return jnp.where(slots < num_slots, slots, -1).astype(jnp.int32)


def _choose_implementation(
    implementations: dict[str, Callable], implementation: str | None, operation: str
) -> Callable:
    if implementation is not None:
        if implementation not in implementations:
            choices = f"None or one of {list(implementations)}"
            raise ValueError(f"implementation is {implementation!r}; wanted {choices}")
        return implementations[implementation]
    _log_choice(operation)
    # Chosen when the program is lowered, so that a machine without a TPU can compile for one.
    return functools.partial(
        jax.lax.platform_dependent, tpu=implementations["tpu"], default=implementations["reference"]
    )


# Cached, so that each operation is logged once.
@functools.cache
def _log_choice(operation: str) -> None:
    _log.info("lightning %s: the Pallas kernel on TPU, the XLA reference elsewhere", operation)


def _validate_inputs(name, pool, qkv, slopes, *, ndim) -> None:
    if slopes.ndim != 1 or slopes.dtype != jnp.float32:
        raise ValueError(f"slopes: got {jax.typeof(slopes)}; wanted float32[N]")
    num_heads = slopes.shape[0]
    square = pool.ndim == 4 and pool.shape[1] == num_heads and pool.shape[2] == pool.shape[3]
    if not square or pool.dtype != jnp.float32:
        pool_type = f"float32[slots, {num_heads}, H, H]"
        raise ValueError(f"{name}: got {jax.typeof(pool)}; wanted {pool_type}")
    width = num_heads * 3 * pool.shape[3]  # q, k and v of every head
    if qkv.ndim != ndim or qkv.shape[-1] != width or qkv.shape[0] == 0:
        raise ValueError(f"qkv: got shape {qkv.shape}; wanted at least one row of {width}")
    if qkv.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"qkv: got dtype {qkv.dtype}; wanted float32 or bfloat16")


def _validate_int_vector(name, values, count) -> None:
    if values.shape != (count,) or not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(f"{name}: got {jax.typeof(values)}; wanted int32[{count}]")
