"""Lightning attention over a sequence whose length is split over devices.

A span of tokens multiplies the incoming state by g and adds S. So devices need no tokens of each
other, but only these pairs (g, S). Whatever the length, that is one all-gather of N H H floats a
device, and as much back for the gradient. Source: LASP-2, arXiv 2502.07563; docs/kernels.md, "Spans
of tokens".
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1_jax import collectives

_F32 = jnp.float32


def attend_sharded_length(
    kernel: Callable,
    qkv: Float[Array, "B t N3H"],
    slopes: Float[Array, "N"],
    segment_ids: Int[Array, "B t"] | None,
    state: Float[Array, "B N H H"] | None,
) -> tuple[Float[Array, "B t NH"], Float[Array, "B N H H"]]:
    """Run `kernel`, an `api.lightning_attention`, on this device's part of each row.

    Args:
      kernel: called as kernel(qkv, slopes, segment_ids=, initial_state=).
      qkv: tokens of this device, which follow those of the device before.
      documents: numbers of the documents of the whole row, which never fall; 0 is padding. None:
        one document, no padding.
      state: of the row's first document before the row, the same on all devices. None: zeros.

    Returns:
      (o of this device's tokens, the state after the whole row, the same on all devices).
    """
    devices = collectives.axis_size("length")
    if devices == 1:
        return kernel(qkv, slopes, segment_ids=segment_ids, initial_state=state)
    me = collectives.axis_index("length")
    heads = qkv.reshape(*qkv.shape[:2], slopes.shape[0], 3, -1)
    span, first, last, length = _summarize_span(
        heads[:, :, :, 1], heads[:, :, :, 2], slopes, segment_ids
    )
    spans = collectives.all_gather_stacked(span, "length")  # [P, B, N, H, H]
    first, last, length = (
        collectives.all_gather_stacked(x, "length") for x in (first, last, length)
    )
    # The document that is open when a device's tokens begin; one that the row brought in is 1.
    before = jnp.concatenate([jnp.ones_like(last[:1]), jnp.maximum(jax.lax.cummax(last), 1)[:-1]])
    opens = jnp.where(first > 0, first, before)
    if state is not None:
        spans = jnp.concatenate([state[None], spans])
        last = jnp.concatenate([jnp.ones_like(last[:1]), last])
        length = jnp.concatenate([jnp.zeros_like(length[:1]), length])
    # Tokens between the end of one span and the start of this device: all of the same document,
    # where the document is the same at both ends.
    ends = jnp.cumsum(length, axis=0)
    place = me + (0 if state is None else 1)
    gap = (ends[place] - length[place])[None] - ends
    flows = (last == opens[me][None]) & (jnp.arange(last.shape[0]) < place)[:, None]
    steps = jnp.where(flows, gap, 0).astype(_F32)[:, :, None]
    weight = jnp.where(flows[:, :, None], jnp.exp(-slopes[None, None] * steps), 0)
    carry = jnp.sum(spans * weight[..., None, None], axis=0)
    o, after = kernel(qkv, slopes, segment_ids=segment_ids, initial_state=carry)
    final = jnp.where(me == devices - 1, after, 0)
    return o, collectives.psum(final, "length")


def _summarize_span(k, v, slopes, segment_ids):
    """Return what these tokens alone leave of their last document, and three numbers a row.

    The numbers: first and last document (0: no real token), and how many real tokens there are.

    Precision: as in the kernels, k is weighted in float32 and rounded to its dtype once.
    """
    batch, length = k.shape[:2]
    if segment_ids is None:
        ones = jnp.ones((batch,), jnp.int32)
        after = jnp.broadcast_to(jnp.arange(length - 1, -1, -1, dtype=_F32), (batch, length))
        first, last, number, mine = ones, ones, ones * length, None
    else:
        real = segment_ids > 0
        last = jnp.max(segment_ids, axis=1)
        first = jnp.min(jnp.where(real, segment_ids, jnp.iinfo(jnp.int32).max), axis=1)
        first = jnp.where(last > 0, first, 0)
        number = jnp.sum(real, axis=1, dtype=jnp.int32)
        after = (number[:, None] - jnp.cumsum(real, axis=1, dtype=jnp.int32)).astype(_F32)
        mine = real & (segment_ids == last[:, None])
    ramp = jnp.exp(-after[:, :, None] * slopes[None, None])
    weighted = k.astype(_F32) * ramp[..., None]
    if mine is not None:
        # Selects, so that NaN in padding goes nowhere.
        weighted = jnp.where(mine[:, :, None, None], weighted, 0)
        v = jnp.where(mine[:, :, None, None], v, 0)
    span = jnp.einsum(
        "btnk,btnv->bnkv",
        weighted.astype(k.dtype),
        v,
        precision=jax.lax.Precision.HIGHEST if k.dtype == _F32 else None,
        preferred_element_type=_F32,
    )
    return span, first, last, number
