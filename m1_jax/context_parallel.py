"""Lightning attention over a sequence whose length is split over devices.

What a span of tokens does to the state is a pair (g, S): it multiplies the incoming state by g and
adds S. So devices need no tokens of each other, only these pairs. One all-gather moves N H H floats
a device, whatever the length, and the gradient moves as many back (LASP-2, arXiv 2502.07563;
docs/kernels.md, "Spans of tokens").

With documents, a span's state is that of its last document alone. It reaches a later device only if
that document is still open there.
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
      segment_ids: document numbers in the full row, which never fall. 0 is padding. None: the row
        is one document without padding.
      state: state of the row's first document before the row, the same on all devices. None: zeros.

    Returns:
      (o of this device's tokens, the state after the full row, the same on all devices).
    """
    num_devices = collectives.axis_size("length")
    if num_devices == 1:
        return kernel(qkv, slopes, segment_ids=segment_ids, initial_state=state)
    this_device = collectives.axis_index("length")
    heads = qkv.reshape(*qkv.shape[:2], slopes.shape[0], 3, -1)
    span, first, last, length = _summarize_span(
        heads[:, :, :, 1], heads[:, :, :, 2], slopes, segment_ids
    )
    spans = collectives.all_gather_stacked(span, "length")  # [P, B, N, H, H]
    first, last, length = (
        collectives.all_gather_stacked(x, "length") for x in (first, last, length)
    )  # [P, B] each
    # The document that is open where a device's tokens begin. Before the row it is number 1. A
    # device of padding alone has last = 0, so the running maximum passes over it.
    previous = jnp.concatenate([jnp.ones_like(last[:1]), jnp.maximum(jax.lax.cummax(last), 1)[:-1]])
    open_document = jnp.where(first > 0, first, previous)
    if state is not None:
        # The incoming state is one more span, of document 1 and without length, before the others.
        spans = jnp.concatenate([state[None], spans])
        last = jnp.concatenate([jnp.ones_like(last[:1]), last])
        length = jnp.concatenate([jnp.zeros_like(length[:1]), length])
    # Tokens between the end of each span and the start of this device. If the document is the same
    # at both ends, all of them belong to it, and each of them decays the state once.
    ends = jnp.cumsum(length, axis=0)
    span_index = this_device + (0 if state is None else 1)  # of this device's own span
    gap = (ends[span_index] - length[span_index])[None] - ends
    is_open_here = last == open_document[this_device][None]
    reaches_here = is_open_here & (jnp.arange(last.shape[0]) < span_index)[:, None]
    steps = jnp.where(reaches_here, gap, 0).astype(_F32)[:, :, None]
    weight = jnp.where(reaches_here[:, :, None], jnp.exp(-slopes[None, None] * steps), 0)
    carry = jnp.sum(spans * weight[..., None, None], axis=0)
    o, state_after = kernel(qkv, slopes, segment_ids=segment_ids, initial_state=carry)
    # The last device alone knows the state after the row, and the sum brings it to all.
    final = jnp.where(this_device == num_devices - 1, state_after, 0)
    return o, collectives.psum(final, "length")


def _summarize_span(k, v, slopes, segment_ids):
    """Return what these tokens alone add to the state of their last document, and three numbers.

    The numbers, one each a row, are the first and the last document (0 without a real token), and
    how many real tokens there are.

    Precision: as in the kernels, k is weighted in float32 and rounded to its dtype once.
    """
    batch, length = k.shape[:2]
    # `num_after` counts the real tokens after each token: so often its product decays by the end.
    if segment_ids is None:
        ones = jnp.ones((batch,), jnp.int32)
        num_after = jnp.broadcast_to(jnp.arange(length - 1, -1, -1, dtype=_F32), (batch, length))
        first, last, num_tokens, is_last_document = ones, ones, ones * length, None
    else:
        is_token = segment_ids > 0
        last = jnp.max(segment_ids, axis=1)
        first = jnp.min(jnp.where(is_token, segment_ids, jnp.iinfo(jnp.int32).max), axis=1)
        first = jnp.where(last > 0, first, 0)
        num_tokens = jnp.sum(is_token, axis=1, dtype=jnp.int32)
        num_after = num_tokens[:, None] - jnp.cumsum(is_token, axis=1, dtype=jnp.int32)
        num_after = num_after.astype(_F32)
        is_last_document = is_token & (segment_ids == last[:, None])
    ramp = jnp.exp(-num_after[:, :, None] * slopes[None, None])
    weighted = k.astype(_F32) * ramp[..., None]
    if is_last_document is not None:
        # Selects and not products with a mask, so that NaN in padding spreads nowhere.
        weighted = jnp.where(is_last_document[:, :, None, None], weighted, 0)
        v = jnp.where(is_last_document[:, :, None, None], v, 0)
    span = jnp.einsum(
        "btnk,btnv->bnkv",
        weighted.astype(k.dtype),
        v,
        precision=jax.lax.Precision.HIGHEST if k.dtype == _F32 else None,
        preferred_element_type=_F32,
    )
    return span, first, last, num_tokens
